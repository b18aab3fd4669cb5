"""
The files of a search's trials in the run's checkpoint folder, from which a killed search resumes.

`search.json` holds the search's fingerprint; `trial-<N>` the trainer's checkpoints of trial N, `trial.json` (its
settings, written before it begins), `adapter` and `trained.json` (after training), `ended.json` (its outcome, written
last).
"""

import shutil
from pathlib import Path
from typing import Any, Literal

from pipeline import durable
from pipeline.artifacts import Frozen
from pipeline.config import MemoryPlan
from pipeline.train.checkpoints import latest_step, remove_checkpoints
from pipeline.train.memory import NOTE_NAME
from pipeline.train.training import Trained

#: A trial fails after so many of its processes vanished in a row without progress.
MOST_DEATHS = 2
_SEARCH, _TRIAL, _TRAINED, _ENDED, _ADAPTER = "search.json", "trial.json", "trained.json", "ended.json", "adapter"


class TrainedOnce(Frozen):
    """The result of one finished training, with its memory plan and cost."""

    trained: Trained
    plan: MemoryPlan
    estimated_memory: dict[str, int]
    """Bytes by purpose."""
    cost: float
    """Trained tokens times weights: the amount of computation, on any machine."""


class Begun(Frozen):
    """A trial that has begun, or is about to, and has not ended."""

    number: int
    settings: dict[str, Any]
    of: tuple[str, ...] = ()
    """The adapters that a soup combines, as `trial 2`; empty for a training."""
    seconds: float = 0.0
    """Spent by earlier processes, as far as they could record it."""
    running: bool = False
    """Whether a process works on it, or did when it vanished."""
    at_step: int = 0
    """Step of the newest checkpoint when that process began."""
    deaths: int = 0
    """Processes that vanished in a row without leaving a newer checkpoint."""


class Ended(Frozen):
    """A trial that finished, was pruned or failed."""

    number: int
    settings: dict[str, Any]
    of: tuple[str, ...] = ()
    """As in `Begun`."""
    outcome: Literal["finished", "pruned", "failed"]
    seconds: float = 0.0
    losses: tuple[float, ...] = ()
    """Dev losses in nats per token, in the order in which they were measured."""
    once: TrainedOnce | None = None
    by: str = ""
    """What it was scored by: "nll", or a metric's name."""
    scores: tuple[float, ...] = ()
    """Per dev row, higher is better."""
    weights: tuple[float, ...] = ()
    why: str = ""
    """Why it failed."""
    hint: str = ""


class TrialFiles:
    """Reads and writes the files of one search's trials, which are numbered from 1 without gaps."""

    def __init__(self, folder: Path) -> None:
        """Use the run's checkpoint folder, which need not exist."""
        self.folder = folder

    def claim(self, mark: str) -> None:
        """Delete all trials unless they belong to the search with the fingerprint `mark`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if durable.read_object(self.folder / _SEARCH).get("fingerprint") != mark:
            self.clear()
            durable.write_json(self.folder / _SEARCH, {"fingerprint": mark})

    def clear(self) -> None:
        """Delete all trials."""
        (self.folder / _SEARCH).unlink(missing_ok=True)
        durable.fsync_folder(self.folder)
        for trial in self.folder.glob("trial-*"):
            shutil.rmtree(trial)

    def trial(self, number: int) -> Path:
        """Return the folder of a trial."""
        return self.folder / f"trial-{number}"

    def adapter(self, number: int) -> Path:
        """Return the folder of a trial's adapter."""
        return self.trial(number) / _ADAPTER

    def ended(self) -> list[Ended]:
        """Return the trials that have ended, in their order."""
        trials: list[Ended] = []
        while value := durable.read_object(self.trial(len(trials) + 1) / _ENDED):
            trials.append(Ended.model_validate(value))
        return trials

    def begun(self, number: int) -> Begun | None:
        """Return a trial as its `trial.json` has it; `None` if there is none."""
        value = durable.read_object(self.trial(number) / _TRIAL)
        return Begun.model_validate(value) if value else None

    def write(self, begun: Begun) -> None:
        """Write `trial.json`, before a trial begins or while it runs."""
        folder = self.trial(begun.number)
        folder.mkdir(exist_ok=True)
        durable.write_json(folder / _TRIAL, begun.model_dump(mode="json"))
        durable.fsync_folder(self.folder)

    def enter(self, begun: Begun) -> Begun:
        """Record that this process begins or continues a trial; count the previous process if it vanished."""
        step = latest_step(self.trial(begun.number))
        deaths = begun.deaths
        if begun.running:
            deaths = 1 if step > begun.at_step else deaths + 1
        entered = begun.model_copy(update={"running": True, "at_step": step, "deaths": deaths})
        self.write(entered)
        return entered

    def leave(self, begun: Begun, seconds: float) -> None:
        """Record that this process leaves a trial to a later one."""
        self.write(begun.model_copy(update={"running": False, "seconds": begun.seconds + seconds}))

    def trained(self, number: int) -> TrainedOnce | None:
        """Return the result of a trial's training; `None` before it has finished."""
        value = durable.read_object(self.trial(number) / _TRAINED)
        return TrainedOnce.model_validate(value) if value else None

    def new_adapter(self, number: int) -> Path:
        """Create and return an empty folder for a trial's adapter."""
        shutil.rmtree(self.adapter(number), ignore_errors=True)
        self.adapter(number).mkdir()
        return self.adapter(number)

    def keep(self, number: int, once: TrainedOnce) -> None:
        """Make the adapter in the trial's folder durable, and save its training's result."""
        durable.fsync_tree(self.adapter(number))
        durable.write_json(self.trial(number) / _TRAINED, once.model_dump(mode="json"))

    def end(self, ended: Ended) -> None:
        """Save a trial's outcome and remove its checkpoints."""
        durable.write_json(self.trial(ended.number) / _ENDED, ended.model_dump(mode="json"))
        remove_checkpoints(self.trial(ended.number))

    def plan(self) -> MemoryPlan | None:
        """Return the latest trial's memory plan, which the next one starts with; `None` if there is none."""
        for number in range(len(self.ended()), 0, -1):
            if plan := durable.read_object(self.trial(number) / NOTE_NAME).get("plan"):
                return MemoryPlan.model_validate(plan)
        return None
