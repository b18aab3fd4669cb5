"""Adapters combined without training: what they come to, with whom, and what is said of what they have seen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline import durable
from pipeline.artifacts import Adapter, Drop, ModelRef
from pipeline.contract import Attempt
from pipeline.errors import StepFailed
from pipeline.train.search.soup import combine
from pipeline.train.step import train
from tests.pipeline.train.search.test_run import Bench

DROP = Drop(id=1, sha256="01" * 32, name="a.jsonl", path="drops/1", role="train", rows=32)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPFORGE_DEVICE", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def bench(tmp_path: Path, tiny: Any, tiny_llama: Path, make_attempt: Callable[..., Attempt]) -> Bench:
    return Bench(tmp_path, tiny_llama, tiny, make_attempt)


def update_of(folder: Path) -> torch.Tensor:
    """Return what an adapter adds to the first layer's q_proj."""
    config = durable.read_json(folder / "adapter_config.json")
    named = load_file(folder / "adapter_model.safetensors")
    (a,) = (weight for name, weight in named.items() if "layers.0.self_attn.q_proj.lora_A" in name)
    (b,) = (weight for name, weight in named.items() if "layers.0.self_attn.q_proj.lora_B" in name)
    update: torch.Tensor = (b @ a) * config["lora_alpha"] / config["r"]
    return update


def test_two_adapters_become_one_by_each_method(bench: Bench, tiny_llama: Path, tmp_path: Path) -> None:
    attempts = [bench.attempt({}, seed=seed) for seed in (1, 2)]
    first, second = (attempt.path(train(attempt).folder) for attempt in attempts)
    mean = (update_of(first) + update_of(second)) / 2
    for method, rank in {"cat": 8, "svd": 4, "ties": 4, "dare_ties": 4}.items():
        target = tmp_path / method
        target.mkdir()
        combine(tiny_llama, "cpu", method, (first, second), target)
        assert sorted(path.name for path in target.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        update = update_of(target)
        if method == "cat":
            torch.testing.assert_close(update, mean)
        # What is left of the mean at the rank of one of them is nearer to it than nothing.
        if method == "svd":
            assert (update - mean).norm() < mean.norm()
        assert durable.read_json(target / "adapter_config.json")["r"] == rank
        assert update.isfinite().all()
        assert update.norm() > 0


def test_adapters_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    for name, config in {"a": {"r": 4}, "b": {"r": 8}, "c": {"r": 4, "use_dora": True}}.items():
        (tmp_path / name).mkdir()
        durable.write_json(tmp_path / name / "adapter_config.json", config)
    a, b, c = (tmp_path / name for name in "abc")
    with pytest.raises(StepFailed, match="ranks are 4 and 8"):
        combine(tmp_path, "cpu", "ties", (a, b), tmp_path)
    with pytest.raises(StepFailed, match="DoRA"):
        combine(tmp_path, "cpu", "cat", (a, c), tmp_path)


def with_champion(attempt: Attempt, adapter: Adapter | None, **champion: Any) -> Attempt:
    """Let the champion be of drop 1, with its adapter in a folder."""
    ref = ModelRef.model_validate(
        {"model_id": "c1" * 32, "path": "models/c", "generation": 1, "drops": (1,), **champion}
    )
    update = {"champion": ref, "champion_adapter": adapter and adapter.folder, "drops": (DROP,)}
    attempt.spec = attempt.spec.model_copy(update=update)
    return attempt


def test_the_new_adapter_is_combined_with_the_champions_and_the_dev_rows_choose(bench: Bench) -> None:
    champion = train(bench.attempt({}, seed=7))
    attempt = with_champion(bench.attempt({}, soup=["cat", "svd"]), champion)
    adapter = train(attempt)
    alone, *soups = adapter.candidates
    assert (alone.settings, alone.outcome) == ({}, "finished")
    of = ["trial 1", "champion c1c1c1c1c1c1"]
    assert [one.settings for one in soups] == [{"soup": "cat", "of": of}, {"soup": "svd", "of": of}]
    assert {one.outcome for one in soups} == {"finished"}
    assert [one.tokens for one in adapter.candidates] == [adapter.trained_tokens, 0, 0]
    chosen = next(one for one in adapter.candidates if one.chosen)
    assert adapter.also_trained_on == ((attempt.spec.champion,) if "of" in chosen.settings else ())


@pytest.mark.parametrize(
    ("champion", "words"),
    [
        ({"drops": (1, 2)}, "trained on drops that this run does not have: 2"),
        ({"drops": None}, "that this run does not have: unknown"),
    ],
)
def test_a_champion_that_knows_other_drops_is_no_part_of_a_soup(
    bench: Bench, capsys: pytest.CaptureFixture[str], champion: dict[str, Any], words: str
) -> None:
    made = train(bench.attempt({}, seed=7))
    adapter = train(with_champion(bench.attempt({}, soup=["cat"]), made, **champion))
    assert len(adapter.candidates) == 1
    assert words in capsys.readouterr().err
