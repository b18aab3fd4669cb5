"""What a training adapts is what was planned, or the base is refused before any weight is read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import TrainConfig
from pipeline.errors import CannotTrain
from pipeline.models.adapter import Adapted, try_adapter
from tests.model_families import write_config

#: Linear layers and weights of experts of the families that can be trained.
TRAINED = {
    "llama3": (14, 0),
    "gemma3": (14, 0),
    "granite_hybrid": (10, 2 * 4 * (192 + 96) * 64),
    "qwen3_moe": (8, 2 * 4 * (64 + 32) * 64),
    "mixtral": (8, 2 * 4 * (192 + 96) * 64),
    "gpt_oss": (8, 2 * 4 * (192 + 96) * 64),
}
#: Whose layers PEFT would leave without an adapter, and the names of layers that it adapts as planned.
MOVED = {
    "deepseek_v3": ("mlp.down_proj", ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"]),
    "glm4_moe": ("mlp.down_proj", ["k_proj", "o_proj", "q_proj", "v_proj"]),
    "qwen3_next": ("shared_expert.down_proj", ["in_proj_ba", "in_proj_qkvz", "out_proj", "shared_expert_gate"]),
}


@pytest.mark.parametrize("family", TRAINED)
def test_the_layers_of_a_base_are_counted_without_its_weights(family: str, tmp_path: Path) -> None:
    assert try_adapter(write_config(tmp_path, family), TrainConfig()) == Adapted(*TRAINED[family])


@pytest.mark.parametrize("family", MOVED)
def test_a_base_whose_layers_would_get_no_adapter_is_refused_with_targets_that_get_one(
    family: str, tmp_path: Path
) -> None:
    layer, targets = MOVED[family]
    base = write_config(tmp_path, family)
    with pytest.raises(CannotTrain, match=rf"PEFT leaves \d+ of the \d+ linear layers .* as \S+{layer}") as caught:
        try_adapter(base, TrainConfig())
    assert json.loads(caught.value.hint.partition(" = ")[2].partition(", or ")[0]) == targets
    assert try_adapter(base, TrainConfig(targets=tuple(targets))).layers >= len(targets)


@pytest.mark.parametrize("family", ["falcon_h1", "mamba"])
def test_a_base_that_peft_does_not_support_is_refused_by_name(family: str, tmp_path: Path) -> None:
    with pytest.raises(CannotTrain, match=r"PEFT cannot add an adapter to a \w+ForCausalLM: .*'out_proj'") as caught:
        try_adapter(write_config(tmp_path, family), TrainConfig())
    assert caught.value.hint.startswith("name other layers in train.targets (of ")


def test_targets_that_match_nothing_are_refused_without_weights(tmp_path: Path) -> None:
    base = write_config(tmp_path, "llama3")
    for method in ("lora", "dora", "galore", "spectrum"):
        with pytest.raises(CannotTrain, match="has 'wqkv', and the base model has no such linear layer"):
            try_adapter(base, TrainConfig(method=method, targets=("wqkv",)))
    assert try_adapter(base, TrainConfig(method="full")) == Adapted(0, 0)


def test_a_config_of_no_language_model_is_refused(tmp_path: Path) -> None:
    for config in ({}, {"model_type": "sortformer"}, {"model_type": "vit"}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CannotTrain, match=r"cannot be created from its config\.json: "):
            try_adapter(tmp_path, TrainConfig())


def test_a_process_says_it_in_a_line_of_json(tmp_path: Path) -> None:
    request = {"folder": str(write_config(tmp_path, "mamba")), "train": TrainConfig().model_dump(mode="json")}
    argv = [sys.executable, "-m", "pipeline.models.adapter"]
    ended = subprocess.run(argv, input=json.dumps(request), capture_output=True, text=True, check=False)
    assert ended.returncode == CannotTrain.exit_code
    assert json.loads(ended.stdout)["error"].startswith("PEFT cannot add an adapter to a MambaForCausalLM")
