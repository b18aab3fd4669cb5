"""The attempt of one trial: its own settings and checkpoints, with the step's progress and stop signal."""

import time
from collections.abc import Sequence
from typing import Any

from pipeline.config import MemoryPlan, TrainConfig
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.words import duration

_HOUR = 3600.0
#: Optimizer steps, or the share of them, after which a training's duration can be estimated.
_KNOWN_STEPS, _KNOWN_SHARE = 10, 0.25


class BudgetTooSmall(CannotTrain):
    """Not even one trial fits into the hours of the search."""


class TrialAttempt(Attempt):
    """One trial within the step's attempt, with its own settings, folder and checkpoints."""

    def __init__(self, whole: Attempt, number: int, train: TrainConfig, memory: MemoryPlan | None) -> None:
        """Make the attempt of trial `number`; `memory` is the memory plan of earlier trials."""
        name = f"trial-{number}"
        update = {
            "config": whole.config.model_copy(update={"train": train}),
            "checkpoints": f"{whole.spec.checkpoints}/{name}",
            "folder": f"{whole.spec.folder}/{name}",
            "memory": memory or whole.spec.memory,
        }
        super().__init__(whole.spec.model_copy(update=update))
        self.stop = whole.stop
        self._whole = whole
        self._began = time.monotonic()
        self.folder.mkdir(exist_ok=True)

    def describe(self, note: str, others: int, spent: float, each: float | None) -> None:
        """Set progress's note and the ETA's inputs: trials to come, seconds spent, seconds per trial."""
        self._note, self._others, self._spent, self._each = note, others, spent, each

    @property
    def seconds(self) -> float:
        """Seconds that this process has spent on the trial."""
        return time.monotonic() - self._began

    def progress(self, done: int, total: int, **fields: Any) -> None:
        """Report the trial's progress with the search's ETA. Raises `BudgetTooSmall`."""
        left = fields.get("eta_seconds")
        if left is not None:
            takes = self.seconds + left
            if done >= min(_KNOWN_STEPS, _KNOWN_SHARE * total):
                self._check_budget(takes)
            fields["eta_seconds"] = self._within_budget(left, left + self._others * (self._each or takes))
        self._whole.progress(done, total, note=self._note, **fields)

    def show_curve(self, losses: Sequence[tuple[int, float]], dev: Sequence[tuple[int, float]]) -> None:
        """Show this trial's curve as the step's."""
        self._whole.show_curve(losses, dev)

    def _check_budget(self, takes: float) -> None:
        hours = self._whole.config.train.search.hours
        if self._each is None and hours and takes > hours * _HOUR:
            message = f"one trial takes about {duration(takes)}, and train.search.hours = {hours:g}"
            raise BudgetTooSmall(message, "raise train.search.hours, or lower train.epochs")

    def _within_budget(self, trial: float, eta: float) -> float:
        hours = self._whole.config.train.search.hours
        return max(trial, min(eta, hours * _HOUR - self._spent - self.seconds)) if hours else eta
