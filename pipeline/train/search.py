"""
Hyperparameter search: several trainings (trials) in one run; the one with the lowest dev loss is chosen.

The state of the trials is in files below the run's checkpoint folder, from which a killed search resumes: `search.json`
holds the search's fingerprint; `trial-<N>` the trainer's checkpoints of trial N, its `adapter`, and its state:
`trial.json` while it runs, `ended.json` once it has ended. Each write replaces a whole file. Optuna stores nothing: its
study is rebuilt from the states of earlier trials, with a seed that follows from the run's seed and the trial's number.
So a killed search draws the same settings again, if its trials run one at a time.
"""

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.artifacts import Trained, Trial
from pipeline.config import TrainConfig
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, DropforgeError, Interrupted
from pipeline.search_settings import Range, grid, most_trials, settings_words, with_settings

_HOUR = 3600.0
_SEARCH, _TRIAL, _ENDED, _ADAPTER = "search.json", "trial.json", "ended.json", "adapter"
#: Share of the trials that are drawn at random before the sampler uses their results.
_RANDOM = 1 / 3
#: Draws before giving up when Optuna repeats settings that were tried already.
_DRAWS = 10
_SEEDS = 2**32
#: Trains once with an attempt's settings, on the GPUs from number `gpu` on if there are any, and saves in a folder.
Train = Callable[..., Trained]


class TrialState(Trial):
    """The saved state of a trial."""

    once: Trained | None = None
    """The training, once it has finished."""
    hint: str = ""


class TrialFiles:
    """Reads and writes the files of a search; trials are numbered from 1 without gaps."""

    def __init__(self, folder: Path, mark: str) -> None:
        """Create `folder` if it is missing; unless it has the fingerprint `mark`, delete its trials and save `mark`."""
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

    def load(self) -> list[TrialState]:
        """Return the saved states by number up to the first unreadable file; a trial that has not ended is running."""
        trials: list[TrialState] = []
        while True:
            folder = self.trial(len(trials) + 1)
            value = durable.read_object(folder / _ENDED) or durable.read_object(folder / _TRIAL)
            if not value:
                return trials
            trials.append(TrialState.model_validate(value))

    def save(self, trial: TrialState) -> None:
        """Write a trial's state durably, to ended.json if it has ended, else to trial.json; create its folder."""
        folder = self.trial(trial.number)
        folder.mkdir(exist_ok=True)
        durable.write_json(folder / (_TRIAL if trial.outcome == "running" else _ENDED), trial.model_dump(mode="json"))
        durable.fsync_folder(self.folder)


def search(
    attempt: Attempt, config: TrainConfig, mark: str, train: Train, gpus: Sequence[int]
) -> tuple[Trained, Path, tuple[Trial, ...]]:
    """
    Run the trials of `config.search` within its budget; return the first one with the lowest last dev loss.

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
        Trial(**trial.model_dump(exclude={"once", "hint", "chosen"}), chosen=trial.number == number) for trial in trials
    )
    return once, files.trial(number) / _ADAPTER, tuple(outcomes)


class _TrialAttempt(Attempt):
    """One trial within the step's attempt, with its own settings, folder and checkpoints."""

    def __init__(self, whole: Attempt, number: int, note: str, train: TrainConfig) -> None:
        """Make the attempt of trial `number` with the settings `train`, and its folder; its progress has the `note`."""
        folders = {name: f"{getattr(whole.spec, name)}/trial-{number}" for name in ("checkpoints", "folder")}
        config = whole.config.model_copy(update={"train": train})
        super().__init__(whole.spec.model_copy(update={**folders, "config": config}))
        self.stop = whole.stop
        self.show_curve = whole.show_curve  # type: ignore[method-assign]
        self._whole, self._note = whole, note
        self.folder.mkdir(exist_ok=True)

    def progress(self, done: int, total: int, **fields: Any) -> None:
        """Report the trial's progress as the step's, with the trial's note."""
        self._whole.progress(done, total, note=self._note, **fields)


def _next(train: TrainConfig, trials: Sequence[TrialState], begun: Collection[int]) -> TrialState | None:
    """
    Return an interrupted trial not in `begun`, else a new one, not saved; `None` if space or budget is exhausted.

    Standard error says so if it is `train.search.hours`.
    """
    interrupted = [trial for trial in trials if trial.outcome == "running" and trial.number not in begun]
    if interrupted:
        return interrupted[0]
    longest = max((trial.seconds for trial in trials), default=0.0)
    running = sum(trial.outcome == "running" for trial in trials)
    # Spent, and reserved for those that run and the next.
    seconds = sum(trial.seconds for trial in trials) + longest * (1 + running)
    if train.search.hours and longest and seconds > train.search.hours * _HOUR:
        sys.stderr.write(f"no further trial fits into train.search.hours = {train.search.hours:g}\n")
        return None
    settings = suggest(train, trials)
    return None if settings is None else TrialState(number=len(trials) + 1, settings=settings)


def _run(whole: Attempt, config: TrainConfig, files: TrialFiles, trial: TrialState, train: Train) -> None:
    """
    Train a trial, save its outcome and delete its checkpoints; a `DropforgeError` but `Interrupted` is a failure.

    Raises `Interrupted`, after saving the time that it took so far, and errors of other classes: a later attempt
    continues the trial.
    """
    began = time.monotonic()
    note = f"trial {trial.number} of {most_trials(config.search)}: {settings_words(trial.settings)}"
    sys.stderr.write(f"{note}\n")
    attempt = _TrialAttempt(whole, trial.number, note, with_settings(config, trial.settings))
    folder = files.trial(trial.number)
    adapter = folder / _ADAPTER
    shutil.rmtree(adapter, ignore_errors=True)
    adapter.mkdir()
    ended: dict[str, Any]
    try:
        once = train(attempt, adapter)
        ended = {"once": once, "dev_loss": once.dev_curve[-1].loss, "outcome": "finished"}
        durable.fsync_tree(adapter)
    except Interrupted:
        files.save(trial.model_copy(update={"seconds": trial.seconds + time.monotonic() - began}))
        raise
    except DropforgeError as error:
        ended = {"outcome": "failed", "why": error.message, "hint": error.hint}
    shutil.rmtree(attempt.folder)
    files.save(trial.model_copy(update={**ended, "seconds": trial.seconds + time.monotonic() - began}))
    for checkpoint in folder.glob("step-*"):
        shutil.rmtree(checkpoint)


def suggest(train: TrainConfig, past: Sequence[TrialState]) -> dict[str, Any] | None:
    """
    Return the settings of the trial after `past`; `None` after the last, or if ten draws give tried ones only.

    Optuna draws away from a trial that still runs.
    """
    search = train.search
    if search.method == "grid":
        return next(islice(grid(search), len(past), None), None)
    if len(past) >= search.trials:
        return None
    for draw in range(_DRAWS):
        settings = _draw(train, past, (train.seed + len(past) + draw * search.trials) % _SEEDS)
        if all(settings != trial.settings for trial in past):
            return settings
    return None


def _draw(train: TrainConfig, past: Sequence[TrialState], seed: int) -> dict[str, Any]:
    """Return settings drawn by Optuna, given the results of `past`; listed values are JSON texts in its study."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = train.search
    kinds = {name: _distribution(train, name) for name in search.space}
    listed = {name for name, values in search.space.items() if not isinstance(values, Range)}
    startup = max(1, round(search.trials * _RANDOM))
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup))
    states = optuna.trial.TrialState
    kind_of = {"running": states.RUNNING, "finished": states.COMPLETE, "failed": states.FAIL}
    for trial in past:
        study.add_trial(
            optuna.create_trial(
                state=kind_of[trial.outcome],
                value=trial.dev_loss,
                params={name: json.dumps(x) if name in listed else x for name, x in trial.settings.items()},
                distributions=kinds,
            )
        )
    return {name: json.loads(x) if name in listed else x for name, x in study.ask(kinds).params.items()}


def _distribution(train: TrainConfig, name: str) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values = train.search.space[name]
    if not isinstance(values, Range):
        return CategoricalDistribution([json.dumps(value) for value in values])
    if isinstance(getattr(train, name), int):
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)
