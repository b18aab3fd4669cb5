"""
What is proven on: SmolLM2-135M in NF4, which really learns. `make prove` alone runs these tests.

What a model learns differs from processor to processor; that the gate decides rightly on given predictions is tested
in tests/pipeline/decide and tests/pipeline/decide/test_step.py, what follows from it in tests/daemon/dispatch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from daemon.cli.demo import demo_base
from pipeline.decide.explain import clauses, sentence
from tests.prove.box import Box
from tests.prove.tasks import desk_task

_SETTINGS = """\
base_model = {base}
run_after_quiet_seconds = 0
device = "cpu"
[intake]
settle_seconds = 0
[retry]
limit = 1
[split]
heldout = 0.4
dev = 0
[train]
{train}
[evaluate]
general = {general}
[gate]
min_records = {least}
trials_per_week = {trials}
"""


@dataclass(frozen=True)
class Ground:
    """One base model, and how many rows of a task it takes to learn it."""

    base: Path
    train: dict[str, Any]
    rows: int
    """Of a drop from which the task is learned."""

    def box(
        self, folder: Path, *, general: tuple[str, ...] = (), trials: int = 0, least: int = 100, **train: Any
    ) -> Box:
        """
        Make a workspace whose training is set as it suits the model, but for `train`.

        `trials` a week cost time, and so do the rows for verdicts on `least` records.
        """
        lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in {**self.train, **train}.items())
        base = json.dumps(str(self.base))
        words = {"base": base, "train": lines, "general": json.dumps(list(general)), "trials": trials, "least": least}
        return Box(folder, _SETTINGS.format(**words))


@pytest.fixture(scope="session")
def ground() -> Ground:
    """What everything here stands on."""
    train = {
        "format": "chat",
        "quantization": "nf4",
        "epochs": 1,
        "batch_size": 4,
    }
    return Ground(demo_base(), train, rows=400)


@pytest.fixture(scope="session")
def learned(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Box:
    """A box whose champion learned the track's own task from one honest drop. Tests work on copies."""
    box = ground.box(tmp_path_factory.mktemp("learned") / "box")
    box.drop("honest.jsonl", desk_task(1).rows(ground.rows))
    night = box.night()
    assert night.verdict.outcome == "promoted", sentence(clauses(night.verdict))
    return box
