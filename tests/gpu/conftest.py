"""Fixtures of the tests on a GPU. `make gpu` runs them; without NVIDIA's driver they are left out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.contract import Attempt
from tests.conftest import HAS_GPU
from tests.training_runs import TrainingRun

collect_ignore_glob = [] if HAS_GPU else ["test_*.py"]


@pytest.fixture(autouse=True)
def _on_one_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPFORGE_DEVICE", "cuda")
    # On several each training has processes of its own, in which nothing is patched.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.fixture
def new_run(tiny: Any, tmp_path: Path, make_attempt: Callable[..., Attempt]) -> Callable[..., TrainingRun]:
    """Begin a run on a base: new_run(base, **settings of [train])."""
    return lambda base, **settings: TrainingRun(tmp_path, base, tiny.rows(74, seed=3), make_attempt, settings)
