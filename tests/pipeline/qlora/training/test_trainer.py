"""Trackers: local files, and words where one is not installed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RunConfig, TrainConfig
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.model_folder.manifest import model_id
from pipeline.qlora.training import trainer
from pipeline.steps.train import train
from tests.prepared_rows import write_rows


@pytest.fixture
def attempt(
    tiny: Any, tiny_llama: Path, tmp_path: Path, make_attempt: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Attempt]:
    """Make an attempt at training that reports to a tracker."""
    for name, value in (("DROPFORGE_DEVICE", "cpu"), ("TENSORBOARD_LOGGING_DIR", "")):
        monkeypatch.setenv(name, value)

    def make() -> Attempt:
        dataset = write_rows(tmp_path, tiny.rows(9, seed=5))
        config = RunConfig(
            track="default", base_model=str(tiny_llama), base_model_id=model_id(tiny_llama), salt="s",
            train=TrainConfig.model_validate({"quantization": "none", "rank": 4, "report_to": ["tensorboard"]}),
        )  # fmt: skip
        return make_attempt("train", config=config, inputs={"prepare": dataset})

    return make


def test_a_tracker_that_is_not_installed_is_refused_with_the_command(
    attempt: Callable[[], Attempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "find_spec", lambda _: None)
    with pytest.raises(CannotTrain, match="'tensorboard', and there is no such package") as caught:
        train(attempt())
    assert "pip install tensorboard" in caught.value.hint


def test_a_tracker_writes_into_the_attempts_folder(attempt: Callable[[], Attempt]) -> None:
    made = attempt()
    train(made)
    assert len(list((made.folder / "tracking").rglob("events.out.tfevents.*"))) == 1
