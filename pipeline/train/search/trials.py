"""
The state of a search's trials, in files below the run's checkpoint folder, from which a killed search resumes.

`search.json` holds the search's fingerprint; `trial-<N>` the trainer's checkpoints of trial N, its `adapter`, and its
state: `trial.json` while it runs, `ended.json` once it has ended. Each write replaces a whole file.
"""

import shutil
from pathlib import Path
from typing import Any, Literal

from pipeline import durable
from pipeline.artifacts import Frozen, Trained

_SEARCH, _TRIAL, _ENDED = "search.json", "trial.json", "ended.json"


class TrialState(Frozen):
    """The saved state of a trial."""

    number: int
    """From 1."""
    settings: dict[str, Any]
    """The tried settings."""
    outcome: Literal["finished", "failed"] | None = None
    """`None` until it has ended."""
    seconds: float = 0.0
    """Spent by earlier processes, as far as they could record it."""
    once: Trained | None = None
    """The training, once it has finished."""
    why: str = ""
    """Why it failed."""
    hint: str = ""

    @property
    def dev_loss(self) -> float | None:
        """The last dev loss in nats per token, which is that of the saved adapter; `None` unless the trial finished."""
        return self.once.dev_curve[-1].loss if self.once else None


class TrialFiles:
    """Reads and writes the files of a search; trials are numbered from 1 without gaps."""

    def __init__(self, folder: Path, mark: str) -> None:
        """Use the run's checkpoint folder; delete its trials if they have another fingerprint than `mark`."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if durable.read_object(folder / _SEARCH).get("mark") != mark:
            self.clear()
            durable.write_json(folder / _SEARCH, {"mark": mark})

    def clear(self) -> None:
        """Delete all trials, with checkpoints and adapters, and the search's fingerprint."""
        (self.folder / _SEARCH).unlink(missing_ok=True)
        durable.fsync_folder(self.folder)
        for trial in self.folder.glob("trial-*"):
            shutil.rmtree(trial)

    def trial(self, number: int) -> Path:
        """Return the path of a trial's folder, which need not exist."""
        return self.folder / f"trial-{number}"

    def adapter(self, number: int) -> Path:
        """Return the path of a trial's adapter folder, which need not exist."""
        return self.trial(number) / "adapter"

    def load(self) -> list[TrialState]:
        """Return the saved states up to the first unreadable file; a trial that has not ended has no outcome."""
        trials: list[TrialState] = []
        while True:
            folder = self.trial(len(trials) + 1)
            value = durable.read_object(folder / _ENDED) or durable.read_object(folder / _TRIAL)
            if not value:
                return trials
            trials.append(TrialState.model_validate(value))

    def save(self, trial: TrialState) -> None:
        """Write a trial's state durably, to ended.json if it has an outcome, else to trial.json."""
        folder = self.trial(trial.number)
        folder.mkdir(exist_ok=True)
        durable.write_json(folder / (_ENDED if trial.outcome else _TRIAL), trial.model_dump(mode="json"))
        durable.fsync_folder(self.folder)
