"""Merging weights that were trained themselves: into the files one by one, or into the whole model, or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline.errors import CannotTrain, StepFailed
from pipeline.qlora import merging
from pipeline.qlora.loading import load_tokenizer
from pipeline.qlora.merging import Answering, ask, ask_trained, compare, merge_into
from pipeline.qlora.streamed_merge import CannotStream

PROMPTS = [[5, 9, 30, 44, 7], [8, 3]]
EMBEDDING, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"


def save_base(folder: Path, *, tied: bool = True) -> Path:
    """Save a random two-layer Llama in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def save_trained(base: Path, path: Path, *names: str) -> dict[str, torch.Tensor]:
    """Save the base's weights of these names, moved, in float32."""
    dice = torch.Generator().manual_seed(1)
    stored = load_file(base / "model.safetensors")
    made = {
        name: stored[name].float() + 0.05 * torch.randn(stored[name].shape, generator=dice)
        for name in names or (EMBEDDING, UP)
    }
    save_file(made, path)
    return made


@pytest.fixture
def merge(tmp_path: Path, tiny_llama: Path) -> Callable[..., tuple[Any, Any, Path]]:
    """Ask and merge as the step does, into a new folder."""

    def make(base: Path, weights: Path) -> tuple[Any, Any, Path]:
        adapted, expected = ask_trained(base, weights, PROMPTS)
        merge_into(adapted, load_tokenizer(tiny_llama), tmp_path / "merged", Answering("alpaca", 8, 1.0, [2]))
        return adapted, expected, tmp_path / "merged"

    return make


def not_this_one(*_: Any, **__: Any) -> None:
    raise CannotStream("the test says so")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("streamed", [True, False])
def test_trained_weights_take_the_place_of_the_bases_rounded_once(
    tmp_path: Path, merge: Any, monkeypatch: pytest.MonkeyPatch, *, tied: bool, streamed: bool
) -> None:
    base = save_base(tmp_path / "base", tied=tied)
    made = save_trained(base, tmp_path / "weights.safetensors")
    with monkeypatch.context() as patch:
        if not streamed:
            patch.setattr(merging, "open_streamed", not_this_one)
        adapted, expected, folder = merge(base, tmp_path / "weights.safetensors")
    assert (adapted.streamed is not None) == streamed
    stored, found = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    assert found.keys() == stored.keys()
    for name, weight in found.items():
        assert torch.equal(weight, made.get(name, stored[name]).bfloat16()), name
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    # What is expected is the float32 that was trained, in both places of a tied weight.
    whole: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, weight in made.items():
        whole.get_parameter(name).data = weight
    for ours, theirs in zip(expected.logits, ask(whole.eval(), PROMPTS).logits, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert 0 < compare(folder, PROMPTS, expected, streamed=streamed).distance < 0.1


def doubled_head(base: Path) -> None:
    """Write the tied weight a second time, as some programs do."""
    found = load_file(base / "model.safetensors")
    save_file({**found, "lm_head.weight": found[EMBEDDING].clone()}, base / "model.safetensors", {"format": "pt"})


def test_a_tied_weight_that_the_files_have_twice_is_changed_in_both_places(tmp_path: Path, merge: Any) -> None:
    base = save_base(tmp_path / "base")
    doubled_head(base)
    save_trained(base, tmp_path / "weights.safetensors", EMBEDDING)
    adapted, expected, folder = merge(base, tmp_path / "weights.safetensors")
    assert "lm_head.weight is not both" in adapted.not_streamed
    assert compare(folder, PROMPTS, expected, streamed=False).distance < 0.1


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("name", "shape"), [("model.layers.7.mlp.up_proj.weight", (80, 32)), (UP, (32, 80)), ("lm_head.weight", (64, 32))]
)
def test_a_tensor_that_the_base_does_not_have_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, ...], *, streamed: bool
) -> None:
    base = save_base(tmp_path / "base")
    if not streamed:
        monkeypatch.setattr(merging, "open_streamed", not_this_one)
    save_file({name: torch.zeros(shape)}, tmp_path / "weights.safetensors")
    with pytest.raises(StepFailed, match=rf"the trained weights hold {name} of the shape .* has no such tensor"):
        ask_trained(base, tmp_path / "weights.safetensors", PROMPTS)


@pytest.mark.parametrize("broken", [float("nan"), 3.4e38])
def test_a_trained_weight_that_is_no_number_in_the_bases_dtype_is_refused(
    tmp_path: Path, merge: Any, broken: float
) -> None:
    base = save_base(tmp_path / "base")
    made = save_trained(base, tmp_path / "weights.safetensors")
    made[UP][3, 5] = broken
    save_file(made, tmp_path / "weights.safetensors")
    with pytest.raises(CannotTrain, match=r"layers\.1\.mlp\.up_proj\.weight would hold numbers that are not finite"):
        merge(base, tmp_path / "weights.safetensors")
