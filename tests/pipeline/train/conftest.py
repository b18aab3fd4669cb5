"""Fixtures of the training's tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.contract import Attempt
from tests.training_runs import TrainingRun


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPFORGE_DEVICE", "cpu")


@pytest.fixture
def new_run(tiny: Any, tmp_path: Path, make_attempt: Callable[..., Attempt]) -> Callable[..., TrainingRun]:
    """Begin a run on a base: new_run(base, **settings of [train])."""
    return lambda base, **settings: TrainingRun(tmp_path, base, tiny.rows(74, seed=3), make_attempt, settings)
