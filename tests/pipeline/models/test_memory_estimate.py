"""How much memory a training takes by arithmetic, and how much there is."""

import shutil
from pathlib import Path

import pytest

from pipeline.config import TrainConfig
from pipeline.models import memory_estimate as training_memory
from pipeline.models.memory_estimate import available_memory, base_sizes, estimate, trained_numbers
from tests.made_artifacts import memory_plan


def test_the_sizes_of_a_base_are_read_from_its_headers(tiny_llama: Path) -> None:
    base = base_sizes(tiny_llama)
    # Two layers: four matrices of attention, with 4 heads of which 2 are for keys, and three of the feed-forward layer.
    assert (base.layers, base.hidden, base.inner, base.attention, base.matrices) == (2, 96, 192, 96, 14)
    assert base.inputs == 2 * (6 * 96 + 192)
    assert base.outputs == 2 * (96 + 2 * 48 + 96 + 2 * 192 + 96)
    assert base.linear == 2 * (2 * 96 * 96 + 2 * 96 * 48 + 3 * 96 * 192)
    assert base.width == 4


def test_weights_that_no_index_names_are_not_counted(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    shutil.copyfile(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert base_sizes(folder) == base_sizes(tiny_llama)


def test_weights_of_the_base_that_are_trained_are_counted_once_as_what_they_are(tiny_llama: Path) -> None:
    base, plan = base_sizes(tiny_llama), memory_plan(batch_tokens=100)
    full, half, galore = (
        TrainConfig.model_validate(values)
        for values in ({"method": "full"}, {"method": "spectrum", "share": 0.5}, {"method": "galore", "rank": 4})
    )
    assert [trained_numbers(base, one) for one in (full, half, galore)] == [base.weights, base.linear // 2, base.linear]
    found = {one.method: estimate(base, plan, one, "cpu") for one in (full, half, galore)}
    assert found["full"]["weights"] == 0
    assert found["spectrum"]["weights"] == 4 * (base.weights - base.linear // 2)
    assert found["full"]["optimizer"] == 8 * base.weights
    assert found["galore"]["optimizer"] == 4 * 2 * 4 * (base.inputs + base.outputs) < found["spectrum"]["optimizer"]
    # An adapter's products are kept beside what each layer keeps in any case.
    assert found["full"]["activations"] < estimate(base, plan, TrainConfig(), "cpu")["activations"]


def test_a_control_group_bounds_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = available_memory()
    assert free > 0
    for name, text in (("max", "1000"), ("current", "700"), ("stat", "anon 600\ninactive_file 40\nactive_file 10\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(training_memory, "_CGROUPS", tmp_path)
    assert available_memory() == 350
    (tmp_path / "memory.max").write_text("max")
    assert available_memory() > 350
