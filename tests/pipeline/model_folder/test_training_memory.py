"""How much memory a training takes by arithmetic, and how much there is."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import MemoryPlan
from pipeline.model_folder import training_memory
from pipeline.model_folder.training_memory import available_memory, base_sizes, estimate


def a_plan(**values: Any) -> MemoryPlan:
    return MemoryPlan.model_validate(
        {"device": "cpu", "quantization": "none", "batch_tokens": 100, "activations": "kept", **values}
    )


def test_the_sizes_of_a_base_are_read_from_its_headers(tiny_llama: Path) -> None:
    base = base_sizes(tiny_llama)
    # Two layers: four matrices of attention, with 4 heads of which 2 are for keys, and three of the feed-forward layer.
    assert (base.layers, base.hidden, base.inner, base.attention, base.matrices) == (2, 96, 192, 96, 14)
    assert base.inputs == 2 * (6 * 96 + 192)
    assert base.outputs == 2 * (96 + 2 * 48 + 96 + 2 * 192 + 96)
    assert base.linear == 2 * (2 * 96 * 96 + 2 * 96 * 48 + 3 * 96 * 192)
    assert base.width == 4


def test_less_of_everything_takes_less(tiny_llama: Path) -> None:
    base = base_sizes(tiny_llama)
    whole = estimate(base, a_plan(), 16, "cpu")
    assert estimate(base, a_plan(batch_tokens=50), 16, "cpu")["activations"] == whole["activations"] // 2
    assert estimate(base, a_plan(), 8, "cpu")["adapter"] == whole["adapter"] // 2
    assert estimate(base, a_plan(quantization="nf4"), 16, "cpu")["weights"] == int(
        4 * (base.weights - base.linear) + base.linear * 4.127 / 8
    )
    recomputed = estimate(base, a_plan(activations="recomputed"), 16, "cuda")["activations"]
    offloaded = estimate(base, a_plan(activations="offloaded"), 16, "cuda")["activations"]
    assert offloaded < recomputed < estimate(base, a_plan(), 16, "cuda")["activations"]


def test_a_control_group_bounds_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = available_memory()
    assert free > 0
    for name, text in (("max", "1000"), ("current", "700"), ("stat", "anon 600\ninactive_file 40\nactive_file 10\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(training_memory, "_CGROUPS", tmp_path)
    assert available_memory() == 350
    (tmp_path / "memory.max").write_text("max")
    assert available_memory() > 350
