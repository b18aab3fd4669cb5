"""Run the trials of a search until its budget is spent, then choose the one with the lowest dev loss."""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.artifacts import Trial
from pipeline.config import TrainConfig
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, DropforgeError, Interrupted
from pipeline.search_settings import most_trials, settings_words, with_settings
from pipeline.train.checkpoints import remove_checkpoints
from pipeline.train.search.suggest import suggest
from pipeline.train.search.trials import TrainedOnce, TrialFiles, TrialState

_HOUR = 3600.0

#: Trains once with an attempt's settings and saves the adapter in a folder.
Train = Callable[[Attempt, Path], TrainedOnce]


@dataclass(frozen=True)
class SearchResult:
    """A search's chosen trial, and the outcomes of all trials."""

    once: TrainedOnce
    """The chosen training."""
    adapter: Path
    """Its adapter, in the checkpoint folder."""
    trials: tuple[Trial, ...]
    seconds: float
    """All trials together."""


def search(attempt: Attempt, mark: str, train: Train) -> SearchResult:
    """
    Run the trials of [train.search] within its budget, and return the one whose last dev loss is the lowest.

    `train` trains once with an attempt's settings and saves in a folder. `mark` is the search's fingerprint: trials
    saved under another fingerprint are deleted; others are not repeated, and an interrupted trial continues. Raises
    `Interrupted` and `StartAgain` as a training does; any other `DropforgeError` fails its trial only. If all failed,
    deletes them and raises `CannotTrain`.
    """
    files = TrialFiles(attempt.path(attempt.spec.checkpoints), mark)
    while (trial := _next(attempt.config.train, files.load())) is not None:
        _run(attempt, files, trial, train)
    trials = files.load()
    losses = {trial.number: trial.dev_loss for trial in trials if trial.dev_loss is not None}
    if not losses:
        files.clear()
        hint = trials[0].hint or "set smaller values in [train.search]"
        raise CannotTrain(f"all trials of the search failed; the first: {trials[0].why}", hint)
    number = min(losses, key=losses.__getitem__)
    once = trials[number - 1].once
    assert once is not None  # noqa: S101 - it has a dev loss
    return SearchResult(
        once=once,
        adapter=files.adapter(number),
        trials=tuple(_artifact(trial, chosen=trial.number == number) for trial in trials),
        seconds=_seconds(trials),
    )


class _TrialAttempt(Attempt):
    """One trial within the step's attempt, with its own settings, folder and checkpoints."""

    def __init__(self, whole: Attempt, number: int, note: str, train: TrainConfig) -> None:
        """Make the attempt of trial `number` with the settings `train`; `note` is shown in its progress."""
        folders = {name: f"{getattr(whole.spec, name)}/trial-{number}" for name in ("checkpoints", "folder")}
        config = whole.config.model_copy(update={"train": train})
        super().__init__(whole.spec.model_copy(update={**folders, "config": config}))
        self.stop = whole.stop
        self.show_curve = whole.show_curve  # type: ignore[method-assign]
        self._whole, self._note = whole, note
        self.folder.mkdir(exist_ok=True)

    def progress(self, done: int, total: int, **fields: Any) -> None:
        """Report the trial's progress as the step's."""
        self._whole.progress(done, total, note=self._note, **fields)


def _next(train: TrainConfig, trials: Sequence[TrialState]) -> TrialState | None:
    """Return the interrupted trial, else a new one; `None` if the space or the budget is exhausted."""
    if trials and trials[-1].outcome is None:
        return trials[-1]
    longest = max((trial.seconds for trial in trials), default=0.0)
    if train.search.hours and trials and _seconds(trials) + longest > train.search.hours * _HOUR:
        sys.stderr.write(f"no further trial fits into train.search.hours = {train.search.hours:g}\n")
        return None
    settings = suggest(train, trials)
    return None if settings is None else TrialState(number=len(trials) + 1, settings=settings)


def _run(whole: Attempt, files: TrialFiles, trial: TrialState, train: Train) -> None:
    """
    Train a trial and save its outcome; a trial that raises a `DropforgeError` is saved as failed.

    Later trials train over the base in the precision of the first. Other errors go up: a later attempt continues the
    trial.
    """
    began = time.monotonic()
    config = whole.config.train
    note = f"trial {trial.number} of {most_trials(config.search)}: {settings_words(trial.settings)}"
    sys.stderr.write(f"{note}\n")
    settings = with_settings(config, trial.settings)
    if (first := next((one.once for one in files.load() if one.once), None)) is not None:
        # Dev losses over an NF4 base and over one in 16 bits cannot be compared.
        settings = settings.model_copy(update={"quantization": first.plan.quantization})
    attempt = _TrialAttempt(whole, trial.number, note, settings)
    files.save(trial)
    adapter = files.adapter(trial.number)
    shutil.rmtree(adapter, ignore_errors=True)
    adapter.mkdir()
    ended: dict[str, Any]
    try:
        ended = {"once": train(attempt, adapter), "outcome": "finished"}
        durable.fsync_tree(adapter)
    except Interrupted:
        files.save(trial.model_copy(update={"seconds": trial.seconds + time.monotonic() - began}))
        raise
    except DropforgeError as error:
        ended = {"outcome": "failed", "why": error.message, "hint": error.hint}
    shutil.rmtree(attempt.folder)
    files.save(trial.model_copy(update={**ended, "seconds": trial.seconds + time.monotonic() - began}))
    remove_checkpoints(files.trial(trial.number))


def _artifact(trial: TrialState, *, chosen: bool) -> Trial:
    """Return a trial as the adapter's artifact lists it."""
    return Trial(
        number=trial.number,
        settings=trial.settings,
        outcome=trial.outcome or "failed",
        dev_loss=trial.dev_loss,
        seconds=trial.seconds,
        chosen=chosen,
        why=trial.why,
    )


def _seconds(trials: Sequence[TrialState]) -> float:
    return sum(trial.seconds for trial in trials)
