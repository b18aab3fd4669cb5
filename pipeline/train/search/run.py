"""Run the trials of a search until its budget is spent, then choose one by the dev rows."""

import contextlib
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.artifacts import Trial
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, DropforgeError, Interrupted, StartAgain, StepFailed, is_disk_full
from pipeline.search_settings import most_trials, settings_words, with_settings
from pipeline.train.checkpoints import latest_step, remove_checkpoints
from pipeline.train.search.choice import choose
from pipeline.train.search.dev_scores import NLL, DevSet, score_dev
from pipeline.train.search.suggest import MedianRule, suggest
from pipeline.train.search.trials import TrainedOnce, TrialFiles, TrialState

_HOUR = 3600.0
_ERROR_CHARACTERS = 1000
#: A trial fails after so many of its processes vanished in a row without progress.
_MOST_VANISHED = 2


#: Trains once with an attempt's settings and saves the adapter in a folder.
Train = Callable[[Attempt, Path, MedianRule], TrainedOnce]


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


def search(attempt: Attempt, mark: str, dev: DevSet, train: Train) -> SearchResult:
    """
    Run the trials of [train.search] within its budget, and return the trial that the dev rows choose.

    `mark` is the search's fingerprint: trials saved under another fingerprint are deleted. Raises `Interrupted` and
    `StartAgain` as a training does, `CannotTrain` if all trials failed.
    """
    files = TrialFiles(attempt.path(attempt.spec.checkpoints), mark)
    running = _Search(attempt, files, dev, train)
    while (trial := running.next()) is not None:
        running.work_on(trial)
    trials = files.load()
    if all(trial.outcome == "failed" for trial in trials):
        files.clear()
        hint = trials[0].hint or "set smaller values in [train.search]"
        raise CannotTrain(f"all trials of the search failed; the first: {trials[0].why}", hint)
    return running.result()


class _TrialAttempt(Attempt):
    """One trial within the step's attempt, with its own settings, folder and checkpoints."""

    def __init__(self, whole: Attempt, number: int, note: str, **update: Any) -> None:
        """Make the attempt of trial `number`; `note` is shown in its progress, `update` changes the spec."""
        folders = {name: f"{getattr(whole.spec, name)}/trial-{number}" for name in ("checkpoints", "folder")}
        super().__init__(whole.spec.model_copy(update={**folders, **update}))
        self.stop = whole.stop
        self.show_curve = whole.show_curve  # type: ignore[method-assign]
        self._whole, self._note = whole, note
        self.folder.mkdir(exist_ok=True)

    def progress(self, done: int, total: int, **fields: Any) -> None:
        """Report the trial's progress as the step's."""
        self._whole.progress(done, total, note=self._note, **fields)


@dataclass(frozen=True)
class _Search:
    """A running search; all its state is in its files."""

    attempt: Attempt
    files: TrialFiles
    dev: DevSet
    train: Train

    def next(self) -> TrialState | None:
        """Return the interrupted trial, else a new one; `None` if the space or the budget is exhausted."""
        trials = self.files.load()
        if trials and trials[-1].outcome is None:
            return trials[-1]
        train = self.attempt.config.train
        longest = max((trial.seconds for trial in trials), default=0.0)
        if train.search.hours and trials and _seconds(trials) + longest > train.search.hours * _HOUR:
            sys.stderr.write(f"no further trial fits into train.search.hours = {train.search.hours:g}\n")
            return None
        settings = suggest(train, trials)
        return None if settings is None else TrialState(number=len(trials) + 1, settings=settings)

    def work_on(self, trial: TrialState) -> None:
        """
        Run a trial and save its outcome; a trial that raises an error is saved as failed.

        Raises `Interrupted`, or the error of a full disk, if a later process must continue the trial. Raises
        `StartAgain` after an unexpected error, as the next trial needs a fresh process.
        """
        folder, began = self.files.trial(trial.number), time.monotonic()
        step = latest_step(folder)
        vanished = trial.vanished if step == trial.at_step else min(trial.vanished, 1)
        attempt = self._attempt(trial)
        entered = trial.model_copy(update={"vanished": vanished + 1, "at_step": step})
        self.files.save(entered)
        again = None
        try:
            ended = self._ended(attempt, entered)
        except Exception as error:
            if isinstance(error, Interrupted) or is_disk_full(error):
                seconds = trial.seconds + time.monotonic() - began
                self.files.save(self.files.load()[-1].model_copy(update={"vanished": vanished, "seconds": seconds}))
                raise
            if isinstance(error, DropforgeError):
                why, hint = error.message, error.hint
            else:
                traceback.print_exc()
                why, hint = f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS], ""
                # Libraries and device may be in an undefined state.
                again = StartAgain(f"trial {trial.number} failed, the next begins in a fresh process: {why}")
            ended = trial.model_copy(update={"outcome": "failed", "why": why, "hint": hint})
        finally:
            with contextlib.suppress(OSError):  # experiment trackers may have left files
                attempt.folder.rmdir()
        self.files.save(ended.model_copy(update={"seconds": trial.seconds + time.monotonic() - began}))
        remove_checkpoints(folder)
        if again is not None:
            raise again

    def _attempt(self, trial: TrialState) -> _TrialAttempt:
        """Log the trial; return its attempt, with its settings and the last trained trial's memory plan."""
        train = self.attempt.config.train
        most = max(most_trials(train.search), trial.number)
        note = f"trial {trial.number} of {most}: {settings_words(trial.settings)}"
        sys.stderr.write(f"{note}\n")
        config = with_settings(train, trial.settings)
        plans = [past.once.plan for past in self.files.load() if past.once]
        return _TrialAttempt(
            self.attempt,
            trial.number,
            note,
            config=self.attempt.config.model_copy(update={"train": config}),
            memory=plans[-1] if plans else self.attempt.spec.memory,
        )

    def _ended(self, attempt: Attempt, trial: TrialState) -> TrialState:
        """Train the trial unless already done, score it on the dev rows, and return it with its outcome."""
        if trial.vanished > _MOST_VANISHED:
            message = f"its process vanished {_MOST_VANISHED} times in a row without an error"
            raise StepFailed(message, "see dmesg for a lack of memory")
        adapter = self.files.adapter(trial.number)
        if trial.once is None:
            shutil.rmtree(adapter, ignore_errors=True)
            adapter.mkdir()
            once = self.train(attempt, adapter, self._median())
            durable.fsync_tree(adapter)
            trial = trial.model_copy(update={"once": once})
            self.files.save(trial)
        if trial.once is not None and trial.once.trained.pruned:
            return trial.model_copy(update={"outcome": "pruned"})
        return trial.model_copy(update={"outcome": "finished", "scored": score_dev(self.dev, adapter, attempt)})

    def _median(self) -> MedianRule:
        trials = self.files.load()
        return MedianRule(tuple(x.losses for x in trials if x.outcome == "finished"))

    def result(self) -> SearchResult:
        """
        Choose among the finished trials and return the search's result.

        At least one trial must have finished.
        """
        trials = self.files.load()
        finished = [x for x in trials if x.outcome == "finished"]
        chosen = _best(finished)
        best = max(finished, key=lambda trial: trial.mean or 0.0)
        why = "best on the dev rows"
        if best.mean != chosen.mean:
            why = f"within one standard error of the best (trial {best.number}), and cheaper"
        assert chosen.once is not None  # noqa: S101 - it finished
        return SearchResult(
            once=chosen.once,
            adapter=self.files.adapter(chosen.number),
            trials=tuple(_trial(trial, why if trial is chosen else "") for trial in trials),
            seconds=_seconds(trials),
        )


def _best(finished: Sequence[TrialState]) -> TrialState:
    """Return the trial that the one-standard-error rule chooses by the dev scores."""
    return finished[choose([trial.dev for trial in finished if trial.dev])]


def _trial(trial: TrialState, chosen: str) -> Trial:
    by = trial.scored.by if trial.scored else ""
    return Trial(
        number=trial.number,
        settings=trial.settings,
        outcome=trial.outcome or "failed",
        dev_score=None if trial.mean is None else trial.mean * (1 if by == NLL else 100),
        scored_by=by,
        dev_loss=trial.losses[-1] if trial.losses else None,
        seconds=trial.seconds,
        tokens=trial.once.trained.trained_tokens if trial.once else 0,
        chosen=bool(chosen),
        why=chosen or trial.why,
    )


def _seconds(trials: Sequence[TrialState]) -> float:
    return sum(trial.seconds for trial in trials)
