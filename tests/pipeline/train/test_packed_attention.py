"""Records packed into one row: what they would be apart, and no record sees another."""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.train import packing
from pipeline.train import trainer as trainer_module
from pipeline.train.packing import collate, enable_packing, micro_batches, packed_attention
from tests.made_adapters import SMALL, assert_near, gradients_of, save_base, token_rows, trainer_of, trls_loss

Gradients = dict[str, torch.Tensor]
#: Sums of float32 in another order: an epsilon of 1.2e-7, some hundred terms, two layers.
TOLERANCE = 1e-5
TOKENS = [list(range(3, 40))]


@pytest.mark.parametrize("recomputed", [False, True])
def test_loss_and_gradients_of_packed_records_are_trls_of_padded_ones(
    tiny_llama: Path, tmp_path: Path, *, recomputed: bool
) -> None:
    trainer = trainer_of(tiny_llama, tmp_path, token_rows(12, seed=2))
    assert trainer.divide_step.keywords["packed"]
    model = trainer.model = trainer.accelerator.prepare_model(trainer.model)
    if recomputed:
        model.activation_checkpointing_enable()
    model.train(recomputed)
    assert model.get_base_model().model.layers[0].gradient_checkpointing == recomputed
    step = collate([dict(row) for row in trainer.train_dataset])

    def gradients(compute: Any, attention: str, *, packed: bool) -> tuple[float, Gradients]:
        model.get_base_model().set_attn_implementation(attention)
        model.zero_grad()
        (inputs,) = micro_batches(step, 10**6, packed=packed)
        loss = compute(model, inputs)
        loss.backward()
        return loss.item(), gradients_of(model)

    ours, found = gradients(trainer.compute_loss, "packed_records", packed=True)
    trls, expected = gradients(partial(trls_loss, trainer), "sdpa", packed=False)
    assert ours == pytest.approx(trls, rel=TOLERANCE)
    assert_near(found, expected, TOLERANCE)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.Qwen3Config(**SMALL, head_dim=16), ""),
        (transformers.MixtralConfig(**SMALL, num_local_experts=2), ""),
        (transformers.MistralConfig(**SMALL, sliding_window=64), ""),
        (transformers.MistralConfig(**SMALL, sliding_window=8), "attends to 8 tokens, and the longest record has 37"),
        (transformers.Gemma2Config(**SMALL, head_dim=16), "packed attention would ignore softcap"),
        (transformers.GptOssConfig(**SMALL, num_local_experts=4), "packed attention would ignore s_aux"),
        (
            transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2),
            "would attend across packed records",
        ),
        (transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=2), "it has its own attention"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value[:9],
)
def test_what_the_attention_cannot_take_is_padded_and_said(
    config: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    before = model.config._attn_implementation
    assert enable_packing(model, TOKENS) == (not reason)
    told = capsys.readouterr().err
    assert (reason in told) if reason else (told == "records are packed\n")
    assert model.config._attn_implementation == ("packed_records" if not reason else before)


def tiny() -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL)).eval()


def leaking(module: Any, *states: Any, **options: Any) -> Any:
    made, _ = packed_attention(module, *states, **options)
    return made + 0.002 * made[:, :1], None


def detached(*states: Any, **options: Any) -> Any:
    return packed_attention(*states, **options)[0].detach(), None


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (leaking, "would attend across packed records"),
        (detached, "its attention does not accept packed records (RuntimeError"),
    ],
)
def test_a_slight_leak_between_records_and_a_missing_gradient_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], attention: Any, reason: str
) -> None:
    monkeypatch.setattr(packing, "packed_attention", attention)
    assert not enable_packing(tiny(), TOKENS)
    assert reason in capsys.readouterr().err


@pytest.fixture
def _kernel_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(packing, "_has_kernel", lambda *_: True)
    packing._names_shared_heads.cache_clear()
    yield
    packing._names_shared_heads.cache_clear()


def varlen_attn_of_torch_2_10(
    query: Any, key: Any, value: Any, ends: Any, _ends_k: Any, longest: int, _longest_k: int, **options: Any
) -> Any:
    assert options.keys() == {"scale", "window_size"}
    assert longest == max(b - a for a, b in pairwise(ends.tolist()))
    # Torch 2.15 reads these two to choose a kernel.
    cuda: Any = torch.backends.cuda
    assert (cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled()) == (True, False)
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    states = (query, key, value)
    with sdpa_kernel(SDPBackend.MATH):
        parts = [
            attend(*(each[a:b].transpose(0, 1) for each in states), is_causal=True, enable_gqa=True)
            for a, b in pairwise(ends.tolist())
        ]
    return torch.cat([part.transpose(0, 1) for part in parts])


def varlen_attn_that_asks(*states: Any, enable_gqa: bool = False, **options: Any) -> Any:
    assert enable_gqa
    return varlen_attn_of_torch_2_10(*states, **options)


@pytest.mark.usefixtures("_kernel_on_cpu")
@pytest.mark.parametrize("kernel", [varlen_attn_of_torch_2_10, varlen_attn_that_asks])
def test_shared_heads_are_named_where_torch_asks_for_it(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    assert enable_packing(tiny(), TOKENS)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_trained_norms_of_queries_and_keys_do_not_cost_the_kernel(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    base = save_base(transformers.Qwen3Config, tiny_llama, tmp_path / "base", head_dim=16, dtype=torch.bfloat16)
    # Mixed precision on any processor, as on a GPU.
    monkeypatch.setattr(trainer_module, "arithmetic_dtype", lambda _: None)
    trainer, seen = trainer_of(base, tmp_path, token_rows(4, seed=2), method=method), []
    trainer.model = trainer.accelerator.prepare_model(trainer.model)
    monkeypatch.setattr(packing, "_has_kernel", lambda *states: seen.append({state.dtype for state in states}))
    trainer.training_step(trainer.model.train(), next(iter(trainer.get_train_dataloader())))
    assert seen == [{torch.bfloat16}] * 2
