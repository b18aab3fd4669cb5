"""The method's settings: which layers get which adapter, what the trainer makes of the rest, and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from pipeline.config import RunConfig, TrainConfig
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.merge.step import merge
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.manifest import model_id
from pipeline.train.lora import target_layers
from pipeline.train.step import train
from pipeline.train.trainer import TokenRow, Training, make_trainer
from tests.prepared_rows import write_rows

MLP = {"gate_proj", "up_proj", "down_proj"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPFORGE_DEVICE", "cpu")


@pytest.fixture
def trainer(tiny_llama: Path, tmp_path: Path) -> Callable[..., Any]:
    """Build the step's trainer of sixteen rows: trainer(**train settings)."""

    def make(**settings: Any) -> Any:
        rows = [TokenRow([3 + number] * 8, [0] * 4 + [1] * 4) for number in range(16)]
        config = TrainConfig.model_validate({"quantization": "none", "rank": 4, "batch_size": 2, **settings})
        job = Training(tiny_llama, "cpu", tmp_path / "adapter", tmp_path / "scratch", "mark")
        return make_trainer(job, load_tokenizer(tiny_llama), rows, [], config)

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


def test_one_layer_can_be_named_alone(model: Any) -> None:
    assert target_layers(model, ["model.layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]


def test_targets_of_a_model_with_other_names_are_found() -> None:
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    other = transformers.GPT2LMHeadModel(config)
    assert target_layers(other, ["mlp"]) == ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]
    assert "transformer.h.0.attn.c_attn" in target_layers(other, ["all-linear"])
    assert "lm_head" not in target_layers(other, ["all-linear"])


@pytest.mark.parametrize("target", ["query", "proj", "embed_tokens", "mlp.q_proj", "model.layers.7.mlp.up_proj", ""])
def test_a_target_that_does_not_exist_is_refused_with_those_that_do(trainer: Callable[..., Any], target: str) -> None:
    with pytest.raises(CannotTrain, match="the base model has no such linear layer") as caught:
        trainer(targets=["q_proj", target])
    assert f"train.targets has {target!r}" in caught.value.message
    assert caught.value.hint == (
        'allowed are "all-linear", "mlp" and the layers down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj'
    )


def test_an_adapter_on_the_output_head_is_refused(trainer: Callable[..., Any]) -> None:
    with pytest.raises(CannotTrain, match="'lm_head', the output head") as caught:
        trainer(targets=["q_proj", "lm_head"])
    assert caught.value.hint.startswith("take it out of train.targets")


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 16), (True, 8 / 4)])
def test_updates_are_scaled_by_the_rank_or_its_root(trainer: Callable[..., Any], rslora: bool, scale: float) -> None:
    layer = trainer(rank=16, alpha=8, rslora=rslora, dropout=0.3).model.get_base_model().model.layers[0].mlp.up_proj
    assert layer.scaling == {"default": scale}
    assert layer.lora_dropout["default"].p == 0.3


def test_dora_trains_the_lengths_too_in_float32(trainer: Callable[..., Any]) -> None:
    trainable = {
        name: weight for name, weight in trainer(method="dora").model.named_parameters() if weight.requires_grad
    }
    assert sum("lora_magnitude_vector" in name for name in trainable) == 14
    assert {weight.dtype for weight in trainable.values()} == {torch.float32}


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(trainer: Callable[..., Any]) -> None:
    made = trainer(warmup=0.25, learning_rate=1e-3)
    made.train()
    found = [entry["learning_rate"] for entry in made.state.log_history if "learning_rate" in entry]
    after = [0.5 + 0.5 * math.cos(math.pi * step / 6) for step in range(6)]
    assert found == pytest.approx([0, 0.5e-3, *(1e-3 * share for share in after)])


@pytest.mark.parametrize("settings", [{"method": "dora"}, {"rslora": True}, {"method": "dora", "rslora": True}])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_merged_model_answers_as_its_adapter(
    tiny: Any,
    tiny_llama: Path,
    tmp_path: Path,
    make_attempt: Callable[..., Attempt],
    settings: dict[str, Any],
    quantization: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset = write_rows(tmp_path, tiny.rows(16, seed=5), longest=12)
    values = {"quantization": quantization, "rank": 4, "learning_rate": 3e-3, "epochs": 2, **settings}
    config = RunConfig(
        track="default",
        base_model=str(tiny_llama),
        base_model_id=model_id(tiny_llama),
        salt="s",
        train=TrainConfig.model_validate(values),
    )
    adapter = train(make_attempt("train", config=config, inputs={"prepare": dataset}))
    check(tmp_path / adapter.folder, **settings)
    merge(make_attempt("merge", config=config, inputs={"prepare": dataset, "train": adapter}))
    assert "whole model in memory" not in capsys.readouterr().err
    assert adapter.adapter_change > 0.1


def check(folder: Path, method: str = "lora", *, rslora: bool = False) -> None:
    """Hold a saved adapter against the settings."""
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert (saved["use_dora"], saved["use_rslora"]) == (method == "dora", rslora)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert any("magnitude" in name for name in file.keys()) == (method == "dora")  # noqa: SIM118 - no mapping
