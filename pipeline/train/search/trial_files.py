"""
What is known of a search's trials, in the run's checkpoint folder: all that a killed step goes on from.

`search.json` has the fingerprint of what is searched; `trial-<N>` the trainer's checkpoints of trial N, `trial.json`
(what is tried, written before it begins), `adapter` and `trained.json` (once it is trained), `ended.json` (how it
ended, written last).
"""

import shutil
from pathlib import Path
from typing import Any, Literal

from pipeline import durable
from pipeline.artifacts import Frozen
from pipeline.config import MemoryPlan
from pipeline.train.checkpoints import latest_step, remove_checkpoints
from pipeline.train.fit import Trained
from pipeline.train.memory import NOTE_NAME

#: Processes that may vanish in one trial without getting any further: then it is lost.
MOST_DEATHS = 2
_SEARCH, _TRIAL, _TRAINED, _ENDED, _ADAPTER = "search.json", "trial.json", "trained.json", "ended.json", "adapter"


class TrainedOnce(Frozen):
    """One training that came to its end."""

    trained: Trained
    plan: MemoryPlan
    estimated_memory: dict[str, int]
    """Bytes by what takes them."""
    cost: float
    """Tokens times the weights that they went through: what was computed, on whatever machine."""


class Begun(Frozen):
    """A trial that has not ended."""

    number: int
    settings: dict[str, Any]
    of: tuple[str, ...] = ()
    """Of a soup, whose adapters are combined: `trial 2`, `the champion`; a training has none."""
    seconds: float = 0.0
    """That earlier processes spent on it and could note."""
    running: bool = False
    """Whether a process is at work on it, or was when it vanished."""
    at_step: int = 0
    """Of the newest checkpoint when that process began."""
    deaths: int = 0
    """Processes that vanished one after the other without leaving a newer checkpoint."""


class Ended(Frozen):
    """A trial that has ended, whatever became of it."""

    number: int
    settings: dict[str, Any]
    of: tuple[str, ...] = ()
    """As of a trial that begins."""
    outcome: Literal["finished", "pruned", "failed"]
    seconds: float = 0.0
    losses: tuple[float, ...] = ()
    """Dev losses in nats per token, in the order in which they were measured."""
    once: TrainedOnce | None = None
    by: str = ""
    """What it was scored by: "nll", or the name of a metric."""
    scores: tuple[float, ...] = ()
    """One a dev row, higher is better."""
    weights: tuple[float, ...] = ()
    why: str = ""
    """Why it failed."""
    hint: str = ""


class TrialFiles:
    """The trials of one search. Their numbers begin with 1 and have no gaps."""

    def __init__(self, folder: Path) -> None:
        """Take the run's checkpoint folder, which need not exist."""
        self.folder = folder

    def claim(self, mark: str) -> None:
        """Forget the trials of another search than that whose fingerprint is `mark`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if durable.read_object(self.folder / _SEARCH).get("fingerprint") != mark:
            self.clear()
            durable.write_json(self.folder / _SEARCH, {"fingerprint": mark})

    def clear(self) -> None:
        """Forget all trials: the next search begins with the first one."""
        (self.folder / _SEARCH).unlink(missing_ok=True)
        durable.fsync_folder(self.folder)
        for trial in self.folder.glob("trial-*"):
            shutil.rmtree(trial)

    def trial(self, number: int) -> Path:
        """Return the folder of a trial."""
        return self.folder / f"trial-{number}"

    def adapter(self, number: int) -> Path:
        """Return where a trial's adapter is."""
        return self.trial(number) / _ADAPTER

    def ended(self) -> list[Ended]:
        """Return the trials that have ended, in their order."""
        found: list[Ended] = []
        while said := durable.read_object(self.trial(len(found) + 1) / _ENDED):
            found.append(Ended.model_validate(said))
        return found

    def begun(self, number: int) -> Begun | None:
        """Return a trial that has been thought of and has not ended."""
        said = durable.read_object(self.trial(number) / _TRIAL)
        return Begun.model_validate(said) if said else None

    def write(self, begun: Begun) -> None:
        """Write down a trial, before or while it is worked on."""
        folder = self.trial(begun.number)
        folder.mkdir(exist_ok=True)
        durable.write_json(folder / _TRIAL, begun.model_dump(mode="json"))
        durable.fsync_folder(self.folder)

    def enter(self, begun: Begun) -> Begun:
        """Note that this process begins, or goes on with, a trial; count the one before if it vanished."""
        step = latest_step(self.trial(begun.number))
        deaths = begun.deaths
        if begun.running:
            deaths = 1 if step > begun.at_step else deaths + 1
        entered = begun.model_copy(update={"running": True, "at_step": step, "deaths": deaths})
        self.write(entered)
        return entered

    def leave(self, begun: Begun, seconds: float) -> None:
        """Note that this process leaves a trial to a later one."""
        self.write(begun.model_copy(update={"running": False, "seconds": begun.seconds + seconds}))

    def trained(self, number: int) -> TrainedOnce | None:
        """Return how a trial's training went, once it is through."""
        said = durable.read_object(self.trial(number) / _TRAINED)
        return TrainedOnce.model_validate(said) if said else None

    def new_adapter(self, number: int) -> Path:
        """Return an empty folder for a trial's adapter."""
        shutil.rmtree(self.adapter(number), ignore_errors=True)
        self.adapter(number).mkdir()
        return self.adapter(number)

    def keep(self, number: int, once: TrainedOnce) -> None:
        """Keep the adapter that lies in the trial's folder, and how it was made."""
        durable.fsync_tree(self.adapter(number))
        durable.write_json(self.trial(number) / _TRAINED, once.model_dump(mode="json"))

    def end(self, ended: Ended) -> None:
        """Write down how a trial ended; its checkpoints are of no use any more."""
        durable.write_json(self.trial(ended.number) / _ENDED, ended.model_dump(mode="json"))
        remove_checkpoints(self.trial(ended.number))

    def plan(self) -> MemoryPlan | None:
        """Return how the latest trial fitted into memory: what ran out in one is not tried in the next."""
        for number in range(len(self.ended()), 0, -1):
            if said := durable.read_object(self.trial(number) / NOTE_NAME).get("plan"):
                return MemoryPlan.model_validate(said)
        return None
