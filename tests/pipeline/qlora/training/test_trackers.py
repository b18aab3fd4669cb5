"""Trackers: local files, and words where one is not installed."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import Dataset
from pipeline.config import RunConfig, TrainConfig
from pipeline.contract import Attempt
from pipeline.dataset.heldout import dataset_hash
from pipeline.errors import CannotTrain
from pipeline.model_folder.manifest import model_id
from pipeline.qlora.training import trackers
from pipeline.steps.train import train


@pytest.fixture
def attempt(
    tiny: Any, tiny_llama: Path, tmp_path: Path, make_attempt: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Attempt]:
    """Make an attempt at training that reports to a tracker."""
    for name, value in (("DROPFORGE_DEVICE", "cpu"), ("TENSORBOARD_LOGGING_DIR", ""), ("TRACKIO_DIR", "")):
        monkeypatch.setenv(name, value)

    def make(tracker: str) -> Attempt:
        (tmp_path / "data").mkdir()
        lines = (json.dumps({"id": str(number), **row}) + "\n" for number, row in enumerate(tiny.rows(9, seed=5)))
        (tmp_path / "data/train.jsonl").write_text("".join(lines))
        dataset = Dataset(
            folder="data", train_rows=9, dev_rows=0, heldout_rows=0, heldout_groups=0, heldout_pinned=False,
            heldout_version="v", dataset_sha256=dataset_hash(tmp_path / "data"), duplicates=0, replaced=0,
            removed_heldout=0, metric="exact_match", max_new_tokens=8,
        )  # fmt: skip
        config = RunConfig(
            track="default", base_model=str(tiny_llama), base_model_id=model_id(tiny_llama), salt="s",
            train=TrainConfig.model_validate({"quantization": "none", "rank": 4, "report_to": [tracker]}),
        )  # fmt: skip
        return make_attempt("train", config=config, inputs={"prepare": dataset})

    return make


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_command(
    attempt: Callable[[str], Attempt], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(CannotTrain, match=f"'{name}', and there is no such package") as caught:
        train(attempt(name))
    assert f"pip install {name}" in caught.value.hint


@pytest.mark.parametrize(("name", "kind"), [("tensorboard", "events.out.tfevents.*"), ("trackio", "*.db")])
def test_a_tracker_writes_into_the_attempts_folder(attempt: Callable[[str], Attempt], name: str, kind: str) -> None:
    if not any(map(find_spec, {"tensorboard": ("tensorboard", "tensorboardX")}.get(name, (name,)))):
        pytest.skip(f"{name} is not installed")
    made = attempt(name)
    train(made)
    assert len(list((made.folder / "tracking" / name).rglob(kind))) == 1
