"""Models for inference on GPUs: on one, on all, in NF4, or refused."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from pipeline.errors import StepFailed
from pipeline.models import placement
from pipeline.models.loading import load_model
from pipeline.models.memory_estimate import base_sizes, nf4_bytes
from pipeline.models.placement import inference_quantization, key_value_bytes, prompts_at_once
from tests.made_adapters import save_base

Gpus = Callable[..., None]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Return a function that sets the free memory of each GPU."""

    def has(*free: float) -> None:
        monkeypatch.setattr("torch.cuda.device_count", lambda: len(free))
        monkeypatch.setattr(placement, "free_on_gpus", lambda: [int(one) for one in free])

    return has


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the arguments with which the next model is loaded; it is one with the weights that `device_map` says."""
    given: dict[str, Any] = {"placed": {"": 0}}

    def load(_folder: Path, **arguments: Any) -> Any:
        given.update(arguments)
        model = SimpleNamespace(hf_device_map=given["placed"], modules=list, eval=lambda: None)
        return model, {"missing_keys": []}

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    return given


def test_a_model_is_on_the_first_gpu_that_holds_it_or_on_all(
    tiny_llama: Path, gpus: Gpus, given: dict[str, Any]
) -> None:
    weights = placement.weight_bytes(tiny_llama, "none")
    gpus(1.2 * weights, 1 << 40)
    load_model(tiny_llama, "cuda", spread=True)
    assert (given["device_map"], "max_memory" in given) == ({"": "cuda"}, False)
    gpus(0.7 * weights, 0.8 * weights)
    assert inference_quantization("cuda", tiny_llama) == "none"
    load_model(tiny_llama, "cuda", spread=True)
    assert given["device_map"] == "auto"
    assert given["max_memory"] == {0: int(0.9 * int(0.7 * weights)), 1: int(0.9 * int(0.8 * weights))}
    load_model(tiny_llama, "cuda")
    assert given["device_map"] == {"": "cuda"}, "each process of a training has the whole model on its GPU"
    given["placed"] = {"model": 0, "lm_head": "disk"}
    with pytest.raises(StepFailed, match="not enough memory to load the model"):
        load_model(tiny_llama, "cuda", spread=True)


def test_models_that_no_gpus_hold_as_saved_are_evaluated_in_nf4_or_refused(
    tiny_llama: Path, gpus: Gpus, given: dict[str, Any]
) -> None:
    least = nf4_bytes(base_sizes(tiny_llama))
    assert least < placement.weight_bytes(tiny_llama, "none")
    gpus(1.2 * least)
    assert inference_quantization("cuda", tiny_llama, tiny_llama) == "nf4"
    assert inference_quantization("cpu", tiny_llama) == "none"
    load_model(tiny_llama, "cuda", "nf4", spread=True)
    assert given["device_map"] == {"": "cuda"}
    gpus(0.4 * least, 0.5 * least)
    with pytest.raises(
        StepFailed, match=r"does not fit on the GPU for evaluation, even in NF4.*free on 2 GPUs"
    ) as raised:
        inference_quantization("cuda", tiny_llama)
    assert "smaller base model" in raised.value.hint


def test_as_many_prompts_are_generated_together_as_each_models_keys_and_values_leave_room_for(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on(*memory: float, folders: tuple[Path, ...] = (tiny_llama,)) -> int:
        monkeypatch.setattr("torch.cuda.device_count", lambda: len(memory))
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda gpu: SimpleNamespace(total_memory=memory[gpu]))
        return prompts_at_once("cuda", "none", 100, folders)

    weights = placement.weight_bytes(tiny_llama, "none")
    # Keys and values of 2 layers with 2 heads of 24, and 3 times 192 and 4 times 96 numbers of a prefill.
    each = 100 * 2 * (2 * 2 * 2 * 24 + 3 * 192 + 4 * 96)
    assert key_value_bytes(tiny_llama, 1) == 4 * 2 * 2 * 2 * 24
    assert prompts_at_once("cpu", "none", 100, [tiny_llama]) == 32
    assert [on((weights + count * each + 1) / 0.9) for count in (0, 1, 20, 64, 127, 128, 1000)] == [
        *(1, 1, 16, 64, 64, 128, 128)
    ]
    assert on(weights, 0.5 * weights) == on(1.5 * weights)
    wide = save_base(transformers.LlamaConfig, tiny_llama, tmp_path / "wide", intermediate_size=20_000)
    assert on(4e7, folders=(tiny_llama, wide)) == on(4e7, folders=(wide,)) < on(4e7)


def test_the_prompts_generated_together_of_a_model_without_keys_are_known_too(tiny_llama: Path, tmp_path: Path) -> None:
    base = save_base(transformers.MambaConfig, tiny_llama, tmp_path / "mamba")
    assert key_value_bytes(base, 1) > 0
