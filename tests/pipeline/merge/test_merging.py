"""Merging: the numbers are PEFT's in float32 rounded once, nothing is lost, and what files do not show goes to PEFT."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen3MoeConfig,
)

from pipeline.errors import CannotTrain, StepFailed
from pipeline.merge import changes
from pipeline.merge.changes import NeedsWholeModel
from pipeline.merge.step import merge_into
from pipeline.models.safetensors_files import read_header
from tests.made_adapters import save_adapter
from tests.made_adapters import save_base as save_small

#: PEFT warns of much that is meant here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

EMBEDDING, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
LOST = "base_model.model.model.layers.1.self_attn.v_proj"
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


def save_base(folder: Path, *, dtype: torch.dtype = torch.bfloat16, tied: bool = True, shard: str = "5GB") -> Path:
    """Save a random two-layer Llama, with biases in its attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def save_trained(base: Path, path: Path, *names: str) -> dict[str, torch.Tensor]:
    """Save the base's weights of these names, moved, in float32."""
    dice = torch.Generator().manual_seed(1)
    stored = weights(base)
    made = {
        name: stored[name].float() + 0.05 * torch.randn(stored[name].shape, generator=dice)
        for name in names or (EMBEDDING, UP)
    }
    save_file(made, path)
    return made


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return what PEFT makes of the two in float32, its weights then rounded to `dtype`."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    return {name: weight.to(dtype) for name, weight in model.state_dict().items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors in a folder's files."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def loaded(folder: Path) -> Any:
    """Return the model as transformers opens it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that are not equal to the last bit."""
    assert found.keys() <= expected.keys()
    return [name for name, weight in found.items() if not weight.equal(expected[name])]


class Merged(NamedTuple):
    """The name of the folder's dtype, and why the whole model was in memory, empty if it was not."""

    dtype: str
    whole_because: str


@pytest.fixture
def merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Merged, Path]]:
    """Merge as the step does, into a new folder: merge(base, trained)."""

    def make(base: Path, trained: Path, name: str = "merged") -> tuple[Merged, Path]:
        target = tmp_path / name
        capsys.readouterr()
        dtype = merge_into(base, trained, target)
        shutil.copyfile(base / "config.json", target / "config.json")
        said = capsys.readouterr().err.partition("merged with the whole model in memory: ")[2]
        return Merged(dtype, said.partition("\n")[0]), target

    return make


def go(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each merge go "by file", as it does by itself, or by the "whole" model."""

    def not_this_one(*_: Any) -> None:
        raise NeedsWholeModel("the test says so")

    if how == "whole":
        monkeypatch.setattr(changes, "_changes_by_name", not_this_one)


@pytest.mark.parametrize(("kind", "dtype"), [("lora", torch.float32), *((kind, torch.bfloat16) for kind in KINDS)])
def test_weights_are_those_of_peft_in_float32_rounded_once(
    tmp_path: Path, merge: Any, kind: str, dtype: torch.dtype
) -> None:
    base = save_base(tmp_path / "base", dtype=dtype)
    adapter = save_adapter(base, tmp_path / "adapter", **KINDS[kind])
    merged, folder = merge(base, adapter)
    assert merged == Merged(str(dtype).removeprefix("torch."), "")
    found = loaded(folder)
    assert found.dtype == dtype
    assert differing(found.state_dict(), merged_by_peft(base, adapter, dtype)) == []
    assert len(differing(weights(folder), weights(base))) == 14
    assert weights(folder).keys() == weights(base).keys()
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_files_and_index_are_named_as_the_bases_also_where_the_whole_model_is_merged(
    tmp_path: Path, merge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", shard="20KB", tied=False)
    adapter = save_adapter(base, tmp_path / "adapter")
    merged, folder = merge(base, adapter)
    assert merged.whole_because == ""
    shards = {path.name: set(load_file(path)) for path in base.glob("*.safetensors")}
    assert len(shards) == 3
    assert {path.name: set(load_file(path)) for path in folder.glob("*.safetensors")} == shards
    assert differing(loaded(folder).state_dict(), merged_by_peft(base, adapter, torch.bfloat16)) == []
    go("whole", monkeypatch)
    _, whole = merge(base, adapter, "whole")
    assert {path.name for path in whole.iterdir()} == {path.name for path in folder.iterdir()}
    assert differing(weights(whole), weights(folder)) == []


@pytest.mark.parametrize("how", ["by file", "whole"])
def test_trained_weights_take_the_place_of_the_bases_rounded_once(
    tmp_path: Path, merge: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    base = save_base(tmp_path / "base")
    made = save_trained(base, tmp_path / "weights.safetensors")
    with monkeypatch.context() as patch:
        go(how, patch)
        merged, folder = merge(base, tmp_path / "weights.safetensors")
    assert (merged.whole_because == "") == (how == "by file")
    stored = weights(base)
    expected = {name: made.get(name, stored[name]).bfloat16() for name in stored}
    assert differing(weights(folder), expected) == []
    assert loaded(folder).lm_head.weight.equal(expected[EMBEDDING])


@pytest.mark.parametrize(("broken", "how"), [(float("nan"), "by file"), (3.4e38, "whole")])
def test_a_trained_weight_that_is_no_number_in_the_bases_dtype_is_refused(
    tmp_path: Path, merge: Any, monkeypatch: pytest.MonkeyPatch, broken: float, how: str
) -> None:
    base = save_base(tmp_path / "base")
    made = save_trained(base, tmp_path / "weights.safetensors")
    made[UP][3, 5] = broken
    save_file(made, tmp_path / "weights.safetensors")
    go(how, monkeypatch)
    with pytest.raises(CannotTrain, match=r"layers\.1\.mlp\.up_proj\.weight would hold numbers that are not finite"):
        merge(base, tmp_path / "weights.safetensors")


def test_a_base_in_a_dtype_that_is_not_merged_is_refused_by_a_name(tmp_path: Path, merge: Any) -> None:
    base = save_base(tmp_path / "base", dtype=torch.float64)
    save_trained(base, tmp_path / "weights.safetensors")
    with pytest.raises(CannotTrain, match=r"is stored as F64, not as F32, F16, BF16"):
        merge(base, tmp_path / "weights.safetensors")


def test_a_disk_that_takes_a_part_of_a_block_is_full(
    tmp_path: Path, merge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[: len(data) // 2], offset))
    with pytest.raises(OSError, match="No space left"):
        merge(base, adapter)


def test_an_adapter_that_gives_no_numbers_is_refused(tmp_path: Path, merge: Any) -> None:
    base = save_base(tmp_path / "base", dtype=torch.float16)
    adapter = save_adapter(base, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    pairs = load_file(path)
    pairs[f"{LOST}.lora_B.weight"][3, 0] = 1e38
    save_file(pairs, path)
    with pytest.raises(CannotTrain, match=r"layers\.1\.self_attn\.v_proj\.weight would hold numbers that are not"):
        merge(base, adapter)


@pytest.mark.parametrize(("change", "how"), [("lost", "whole"), ("rank", "by file"), ("strange", "by file")])
def test_an_adapter_file_that_is_not_as_its_config_says_is_refused_by_a_name(
    tmp_path: Path, merge: Any, monkeypatch: pytest.MonkeyPatch, change: str, how: str
) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    path, name = adapter / "adapter_model.safetensors", f"{LOST}.lora_A.weight"
    pairs = load_file(path)
    if change == "strange":
        name = name.replace("layers.1.", "layers.9.")
        pairs[name] = torch.ones(1)
    else:
        taken = pairs.pop(name)
        if change == "rank":
            pairs[name] = taken[:2].contiguous()
    save_file(pairs, path)
    go(how, monkeypatch)
    with pytest.raises(StepFailed, match=f"do not agree on {name}".replace(".", r"\.")):
        merge(base, adapter)


def doubled_head(base: Path) -> None:
    """Write the tied weight a second time, as some programs do."""
    found = weights(base)
    save_file({**found, "lm_head.weight": found[EMBEDDING].clone()}, base / "model.safetensors", {"format": "pt"})


def one_in_float32(base: Path) -> None:
    found = weights(base)
    found["model.norm.weight"] = found["model.norm.weight"].float()
    save_file(found, base / "model.safetensors", {"format": "pt"})


def test_each_weight_keeps_the_dtype_of_the_bases_files_though_the_config_names_none(
    tmp_path: Path, merge: Any
) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    one_in_float32(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({name: config[name] for name in config if "dtype" not in name}))
    merged, folder = merge(base, adapter)
    assert merged == Merged("bfloat16, float32", "")
    found = weights(folder)
    assert found.pop("model.norm.weight").equal(weights(base)["model.norm.weight"])
    assert differing(found, merged_by_peft(base, adapter, torch.bfloat16)) == []


def test_trained_weights_of_a_head_that_the_files_have_twice_are_changed_in_both_places(
    tmp_path: Path, merge: Any
) -> None:
    base = save_base(tmp_path / "base")
    doubled_head(base)
    made = save_trained(base, tmp_path / "weights.safetensors", EMBEDDING)
    merged, folder = merge(base, tmp_path / "weights.safetensors")
    assert merged.whole_because == ""
    assert weights(folder)["lm_head.weight"].equal(made[EMBEDDING].bfloat16())
    assert weights(folder)[EMBEDDING].equal(made[EMBEDDING].bfloat16())


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_layers_that_are_not_linear_go_to_peft(tmp_path: Path, merge: Any, prefix: str) -> None:
    base = tmp_path / "base"
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(base)
    # As OpenAI's own files: some without the prefix, and with masks, which the model does not load.
    found = {name.replace("transformer.", prefix): weight for name, weight in weights(base).items()}
    mask = torch.ones(16, 16, dtype=torch.uint8).tril()
    save_file({**found, f"{prefix}h.0.attn.mask": mask}, base / "model.safetensors", {"format": "pt"})
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["c_attn"])
    merged, folder = merge(base, adapter)
    assert "c_attn, which is a Conv1D, not linear" in merged.whole_because
    assert weights(folder).keys() == weights(base).keys()
    assert weights(folder)[f"{prefix}h.0.attn.mask"].equal(mask)
    assert differing(dict(loaded(folder).state_dict()), merged_by_peft(base, adapter, torch.float32)) == []


MIXTURES: Any = {
    "Mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "Qwen3-MoE": (Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16}),
    "gpt-oss": (GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_of_experts_has_the_bases_names_and_loads_with_the_bases_config(
    tmp_path: Path, tiny_llama: Path, merge: Any, kind: str
) -> None:
    config, options = MIXTURES[kind]
    base = save_small(config, tiny_llama, tmp_path / "base", **options)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
    merged, folder = merge(base, adapter)
    # Transformers fuses the experts of the first two when it loads them.
    assert ("converts the weights" in merged.whole_because) == (kind != "gpt-oss")
    changed = differing(weights(folder), weights(base))
    assert weights(folder).keys() == weights(base).keys()
    assert changed
    assert all("self_attn" in name for name in changed)
    assert differing(dict(loaded(folder).state_dict()), merged_by_peft(base, adapter, torch.float32)) == []


def test_a_weight_that_has_no_place_in_the_bases_files_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    header, _ = read_header(base / "model.safetensors")
    del header["model.norm.weight"]
    with pytest.raises(CannotTrain, match=r"model\.norm\.weight under another name or shape"):
        # No model is known that transformers saves so.
        changes._changes_of_whole(base, adapter, header)
