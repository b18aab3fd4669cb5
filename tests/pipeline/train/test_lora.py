"""The method's settings: which layers get which adapter, what the trainer makes of the rest, and what is refused."""

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from pipeline.config import TrainConfig
from pipeline.errors import CannotTrain
from pipeline.merge.step import merge
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.train import trainer as trainer_module
from pipeline.train.lora import fuse, target_layers
from pipeline.train.trainer import TokenRow, make_trainer
from tests.made_adapters import made_training, save_base
from tests.training_runs import TrainingRun

MLP = {"gate_proj", "up_proj", "down_proj"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.fixture
def trainer(tiny_llama: Path, tmp_path: Path) -> Callable[..., Any]:
    """Build the step's trainer of sixteen rows: trainer(**train settings)."""

    def make(**settings: Any) -> Any:
        rows = [TokenRow([3 + number] * 8, [0] * 4 + [1] * 4) for number in range(16)]
        config = TrainConfig.model_validate({"quantization": "none", "rank": 4, "batch_size": 2, **settings})
        return make_trainer(made_training(tiny_llama, tmp_path, rows, config), load_tokenizer(tiny_llama))

    return make


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return load_model(tiny_llama, "cpu")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["all-linear"], MLP | ATTENTION),
        (["mlp"], MLP),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["mlp", "o_proj"], MLP | {"o_proj"}),
        (["self_attn.k_proj"], {"k_proj"}),
    ],
)
def test_targets_are_the_layers_of_that_name(model: Any, targets: list[str], expected: set[str]) -> None:
    found = target_layers(model, targets)
    assert {name.rsplit(".", 1)[-1] for name in found} == expected
    assert len(found) == 2 * len(expected), "in both layers"


def test_targets_of_a_model_with_other_names_are_found() -> None:
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    other = transformers.GPT2LMHeadModel(config)
    assert target_layers(other, ["mlp"]) == ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]
    assert "transformer.h.0.attn.c_attn" in target_layers(other, ["all-linear"])
    assert "lm_head" not in target_layers(other, ["all-linear"])


@pytest.mark.parametrize("target", ["proj", "embed_tokens", "mlp.q_proj", ""])
def test_a_target_that_does_not_exist_is_refused_with_those_that_do(model: Any, target: str) -> None:
    with pytest.raises(CannotTrain, match="the base model has no such linear layer") as caught:
        target_layers(model, ["q_proj", target])
    assert f"train.targets has {target!r}" in caught.value.message
    assert caught.value.hint == (
        'allowed are "all-linear", "mlp" and the layers down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj'
    )


def test_an_adapter_on_the_output_head_is_refused(model: Any) -> None:
    with pytest.raises(CannotTrain, match="'lm_head', the output head") as caught:
        target_layers(model, ["q_proj", "lm_head"])
    assert caught.value.hint.startswith("take it out of train.targets")


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 16), (True, 8 / 4)])
def test_updates_are_scaled_by_the_rank_or_its_root(trainer: Callable[..., Any], rslora: bool, scale: float) -> None:
    layer = trainer(rank=16, alpha=8, rslora=rslora, dropout=0.3).model.get_base_model().model.layers[0].mlp.up_proj
    assert layer.scaling == {"default": scale}
    assert layer.lora_dropout["default"].p == 0.3


def test_dora_trains_the_lengths_too_in_float32(trainer: Callable[..., Any]) -> None:
    trainable = {
        name: weight
        for name, weight in trainer(method="dora", quantization="nf4").model.named_parameters()
        if weight.requires_grad
    }
    assert sum("lora_magnitude_vector" in name for name in trainable) == 14
    assert {weight.dtype for weight in trainable.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("quantization", "settings", "saved"),
    [("nf4", {"method": "dora"}, (True, False)), ("none", {"rslora": True}, (False, True))],
)
def test_an_adapter_of_each_kind_is_saved_as_such_and_merges_by_shard(
    new_run: Callable[..., TrainingRun],
    tiny_llama: Path,
    quantization: str,
    settings: dict[str, Any],
    saved: tuple[bool, bool],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = new_run(tiny_llama, quantization=quantization, epochs=0.5, **settings)
    adapter, weights = run.finish()
    assert any("magnitude" in name for name in weights) == saved[0]
    config = json.loads((run.root / adapter.folder / "adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"]) == saved
    merge(run.make_attempt("merge", config=run.config(), inputs={"prepare": run.dataset, "train": adapter}))
    assert "whole model in memory" not in capsys.readouterr().err


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_float32_base_is_loaded_in_bfloat16_on_a_gpu(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    base = save_base(transformers.LlamaConfig, tiny_llama, tmp_path / "base")
    monkeypatch.setattr(trainer_module, "check_gpu", lambda _: None)
    monkeypatch.setattr(trainer_module, "load_model", lambda *given: load_model(base, "cpu", *given[2:]))
    monkeypatch.setattr(trainer_module, "_check_vocabulary", lambda model, _: sys.exit(str(model.dtype)))
    config = TrainConfig.model_validate({"quantization": quantization})
    job = made_training(base, tmp_path, [TokenRow([3, 4], [0, 1])], config)
    with pytest.raises(SystemExit, match=r"torch\.bfloat16"):
        make_trainer(replace(job, device="cuda"), load_tokenizer(base))


# The fused forward ---------------------------------------------------------------------------------------------------

LINEAR_LAYERS = 14
TOKENS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture(scope="module")
def tiny_qwen(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2, whose queries, keys and values have a bias."""
    return save_base(transformers.Qwen2Config, tiny_llama, tmp_path_factory.mktemp("qwen"))


def adapted(base: Path, dtype: torch.dtype | None = torch.float32, quantization: Any = "none", **options: Any) -> Any:
    """Return the model in `base` with an adapter and biases that are away from the zeros that they begin at."""
    model = get_peft_model(
        load_model(base, "cpu", quantization, dtype), LoraConfig(r=4, target_modules="all-linear", **options)
    )
    dice = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data = torch.empty_like(weight, dtype=torch.float32).normal_(0, 0.1, generator=dice)
        elif name.endswith(".bias"):
            weight.data.normal_(0, 0.5, generator=dice)
    return model


def outcome(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the logits and each gradient of a pass as the trainer makes it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        made = model(input_ids=TOKENS, labels=TOKENS)
    made.loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return {"logits": made.logits.detach(), **found}


def assert_pefts(model: Any, dtype: torch.dtype, tolerance: float) -> None:
    """Hold logits and gradients of `model` with fused layers against those with PEFT's."""
    fused = deepcopy(model)
    assert fuse(fused) == LINEAR_LAYERS
    expected, found = outcome(model, dtype), outcome(fused, dtype)
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        assert found[name].dtype == numbers.dtype
        assert torch.linalg.vector_norm(found[name] - numbers) <= tolerance * torch.linalg.vector_norm(numbers), name


#: Of float32 an epsilon over some hundred terms, of bfloat16 the rounding of each of the layers.
EXACT, ROUNDED = (torch.float32, 1e-5), (torch.bfloat16, 0.1)


@pytest.mark.parametrize(("dtype", "tolerance"), [EXACT, ROUNDED])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("base", ["tiny_llama", "tiny_qwen"])
def test_logits_and_gradients_are_pefts(
    base: str, quantization: str, dtype: torch.dtype, tolerance: float, request: pytest.FixtureRequest
) -> None:
    model = adapted(request.getfixturevalue(base), dtype, quantization, lora_alpha=16)
    assert_pefts(model, dtype, tolerance)


def test_logits_and_gradients_of_rslora_are_pefts(tiny_llama: Path) -> None:
    assert_pefts(adapted(tiny_llama, lora_alpha=16, use_rslora=True), *EXACT)


def test_a_float32_base_in_nf4_has_float32_between_its_layers(tiny_llama: Path) -> None:
    model: Any = adapted(tiny_llama, None, "nf4", lora_alpha=16)
    assert_pefts(model, *ROUNDED)
    layer, numbers = model.get_base_model().model.layers[0].mlp.up_proj, torch.randn(3, 96)
    expected = layer(numbers)
    fuse(model)
    assert layer(numbers).dtype == expected.dtype == torch.float32


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_what_is_not_plain_stays_pefts(tiny_llama: Path, options: dict[str, Any]) -> None:
    model = adapted(tiny_llama, lora_alpha=8, **options)
    assert fuse(model) == 0
