"""The method's settings: which layers get which adapter, what the trainer makes of the rest, and what is refused."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipeline.config import TrainConfig
from pipeline.errors import CannotTrain
from pipeline.merge.step import merge
from pipeline.models.adapter import target_layers
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.train import trainer as trainer_module
from pipeline.train.job import TokenRow
from pipeline.train.packing import pack
from pipeline.train.trainer import Trainer
from tests.made_adapters import made_training, save_base
from tests.training_runs import TrainingRun

MLP = {"gate_proj", "up_proj", "down_proj"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


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
    run = new_run(tiny_llama, quantization=quantization, epochs=0.5, alpha=6, dropout=0.3, **settings)
    adapter, weights = run.finish()
    assert sum("magnitude" in name for name in weights) == 14 * saved[0]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}, "as they were trained"
    config = json.loads((run.root / adapter.folder / "adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"]) == saved
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.3)
    merge(run.make_attempt("merge", config=run.config(), inputs={"prepare": run.dataset, "train": adapter}))
    assert "whole model in memory" not in capsys.readouterr().err


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_float32_base_is_loaded_in_bfloat16_on_a_gpu(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    base = save_base(transformers.LlamaConfig, tiny_llama, tmp_path / "base")
    monkeypatch.setattr(trainer_module, "check_gpu", lambda _: None)
    monkeypatch.setattr(trainer_module, "load_model", lambda *given: load_model(base, "cpu", *given[2:]))
    monkeypatch.setattr(trainer_module, "has_plain_head", lambda model, _: sys.exit(str(model.dtype)))
    config = TrainConfig.model_validate({"quantization": quantization})
    job = made_training(base, tmp_path, [TokenRow([3, 4], [0, 1])], config)
    with pytest.raises(SystemExit, match=r"torch\.bfloat16"):
        Trainer(replace(job, device="cuda"), load_tokenizer(base))


def test_an_evaluation_does_not_end_the_learning_of_the_layers_below_it(trainer: Callable[..., Any]) -> None:
    # On a CPU with AVX512-BF16 bitsandbytes packs NF4 weights in an evaluation; then no gradient passes them.
    model, inputs = trainer(quantization="nf4").model, pack([torch.arange(3, 15)])
    with torch.inference_mode():
        model.eval()(**inputs)
    model.train()(**inputs).logits.sum().backward()
    names = [name for name, weight in model.named_parameters() if "lora_B" in name and not weight.grad.any()]
    assert names == []
