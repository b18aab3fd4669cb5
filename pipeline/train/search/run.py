"""Run the trials of a search until its budget is spent, then choose the one with the lowest dev loss."""

import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.artifacts import Trained, Trial
from pipeline.config import TrainConfig
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, DropforgeError, Interrupted
from pipeline.search_settings import most_trials, settings_words, with_settings
from pipeline.train.checkpoints import remove_checkpoints
from pipeline.train.search.suggest import suggest
from pipeline.train.search.trials import TrialFiles, TrialState

_HOUR = 3600.0


#: Trains once with an attempt's settings, on the GPUs from number `gpu` on if there are any, and saves in a folder.
Train = Callable[..., Trained]


def search(
    attempt: Attempt, config: TrainConfig, mark: str, train: Train, gpus: Sequence[int]
) -> tuple[Trained, Path, tuple[Trial, ...]]:
    """
    Run the trials of `config.search` within its budget; return the one with the lowest last dev loss.

    It is returned as the training, the folder of its adapter below the checkpoints, and the outcomes of all trials.
    Their other settings are those of `config`, the precision that of trials that have finished. As many trials run at a
    time as `gpus` has numbers, each with its own. `mark` is the search's fingerprint: trials saved under another
    fingerprint are deleted; others are not repeated, and an interrupted trial continues. Raises what `train` raises,
    once the other running trials have ended, but for a `DropforgeError` that is neither `Interrupted` nor `StartAgain`,
    which fails its trial only. If all failed, deletes them and raises `CannotTrain`.
    """
    files = TrialFiles(attempt.path(attempt.spec.checkpoints), mark)
    # Dev losses over an NF4 base and over one in 16 bits cannot be compared.
    first = next((trial.once.quantization for trial in files.load() if trial.once), config.quantization)
    shared = config.model_copy(update={"quantization": first})
    # Those begun here; one that has ended stays, as a thread may still hold what was saved before its end.
    begun: set[int] = set()
    lock, failed = threading.Lock(), threading.Event()

    def run_trials(gpu: int) -> None:
        try:
            while True:
                with lock:
                    trial = None if failed.is_set() else _next(shared, files.load(), begun)
                    if trial is None:
                        return
                    files.save(trial)
                    begun.add(trial.number)
                _run(attempt, shared, files, trial, partial(train, gpu=gpu))
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(len(gpus)) as threads:
        list(threads.map(run_trials, gpus))
    return _best(files)


def _best(files: TrialFiles) -> tuple[Trained, Path, tuple[Trial, ...]]:
    """Return what `search` returns; if all trials failed, delete them and raise `CannotTrain`."""
    trials = files.load()
    losses = {trial.number: trial.dev_loss for trial in trials if trial.dev_loss is not None}
    if not losses:
        files.clear()
        hint = trials[0].hint or "set smaller values in [train.search]"
        raise CannotTrain(f"all trials of the search failed; the first: {trials[0].why}", hint)
    number = min(losses, key=losses.__getitem__)
    once = trials[number - 1].once
    assert once is not None  # noqa: S101 - it has a dev loss
    outcomes = (
        Trial(**trial.model_dump(exclude={"once", "hint"}), dev_loss=trial.dev_loss, chosen=trial.number == number)
        for trial in trials
    )
    return once, files.adapter(number), tuple(outcomes)


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


def _next(train: TrainConfig, trials: Sequence[TrialState], begun: Collection[int]) -> TrialState | None:
    """Return an interrupted trial not in `begun`, else a new one; `None` if the space or the budget is exhausted."""
    interrupted = [trial for trial in trials if trial.outcome is None and trial.number not in begun]
    if interrupted:
        return interrupted[0]
    longest = max((trial.seconds for trial in trials), default=0.0)
    # Spent, and reserved for those that run and the next.
    seconds = sum(trial.seconds for trial in trials) + longest * (1 + sum(trial.outcome is None for trial in trials))
    if train.search.hours and longest and seconds > train.search.hours * _HOUR:
        sys.stderr.write(f"no further trial fits into train.search.hours = {train.search.hours:g}\n")
        return None
    settings = suggest(train, trials)
    return None if settings is None else TrialState(number=len(trials) + 1, settings=settings)


def _run(whole: Attempt, config: TrainConfig, files: TrialFiles, trial: TrialState, train: Train) -> None:
    """
    Train a trial and save its outcome; a trial that raises a `DropforgeError` is saved as failed.

    Other errors go up: a later attempt continues the trial.
    """
    began = time.monotonic()
    note = f"trial {trial.number} of {most_trials(config.search)}: {settings_words(trial.settings)}"
    sys.stderr.write(f"{note}\n")
    attempt = _TrialAttempt(whole, trial.number, note, with_settings(config, trial.settings))
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
