"""
The spool: folders through which the daemon gives step attempts to `dropforge worker`.

    spool/queue/KEY.json     ordered; written by the executor
    spool/running/KEY.json   taken by the worker, with the identity of its process
    spool/cancel/KEY         to be stopped
    spool/worker.lock        held by the living worker

KEY is the attempt's run, step and number, the content the fence of its spec: an entry names no path and no program.
Only the state folder's owner can write one, as the folder is closed to others.

The worker writes result.json before it takes the entry out of `running`, so an attempt that is in neither folder and
has no result is lost.
"""

import contextlib
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import structlog
from pydantic import BaseModel

from daemon.state import run_files
from daemon.state.layout import WORKER_LOCK
from daemon.system.folders import StateFolder, WorkFolder
from daemon.system.processes import Identity, is_alive, lock_holder
from pipeline import durable
from pipeline.contract import RESULT_NAME, SPEC_NAME, StepSpec
from pipeline.errors import DropforgeError

_KEY = re.compile(r"([1-9][0-9]*)-([a-z]+)-([1-9][0-9]*)")
log = structlog.get_logger()


class JobState(StrEnum):
    """State of an attempt, as its files show it."""

    #: It is ordered and has not begun.
    QUEUED = "queued"
    #: The worker took it: its process runs, or is about to begin or end.
    RUNNING = "running"
    #: Its result.json is there.
    ENDED = "ended"
    #: It has no result, and is not in the spool, or was taken and neither a worker nor its process is alive.
    LOST = "lost"


class _Entry(BaseModel):
    """Content of a spool entry: the attempt's fence, and its process once the worker has started it."""

    fence: str
    process: Identity | None = None


@dataclass(frozen=True)
class Order:
    """A valid spool entry with its spec, and its process once the worker has recorded that."""

    entry: Path
    spec: StepSpec
    process: Identity | None


def read_order(root: Path, entry: Path) -> Order:
    """
    Resolve a spool entry to its attempt and spec without trusting the entry's content.

    Raises `OSError` or `ValueError` if the entry or its spec cannot be read, is incomplete or belongs to another
    attempt.
    """
    content = _Entry.model_validate_json(durable.read_regular(entry))
    return Order(entry, read_spec(root, entry.name.removesuffix(".json"), content.fence), content.process)


def folder_of(key: str) -> str:
    """Return the folder of the attempt `key`, relative to the root. Raises `ValueError` if it is no attempt's key."""
    if (name := _KEY.fullmatch(key)) is None:
        raise ValueError(f"{key} is no attempt's key")
    return run_files.attempt_folder(int(name[1]), name[2], int(name[3]))


def read_spec(root: Path, key: str, fence: str) -> StepSpec:
    """Return the spec of the attempt `key`. Raises `OSError` or `ValueError` if it cannot be read or is another's."""
    path = root / folder_of(key) / SPEC_NAME
    spec = StepSpec.model_validate_json(durable.read_regular(path))
    if (spec.key, spec.fence) != (key, fence) or not Path(spec.root).samefile(root):
        raise ValueError(f"{path} has another key, fence or root")
    return spec


class Spool:
    """The spool's folders in a state folder, shared by executor and worker."""

    def __init__(self, state_folder: StateFolder, work_folder: WorkFolder) -> None:
        """Create the folders that are missing; the attempts are below `work_folder`."""
        self.root = work_folder
        self.folder = state_folder / "spool"
        self.queue = self.folder / "queue"
        self.running = self.folder / "running"
        self.cancelled = self.folder / "cancel"
        self.worker_lock = state_folder / WORKER_LOCK
        for folder in (self.queue, self.running, self.cancelled, work_folder / "runs"):
            folder.mkdir(parents=True, exist_ok=True)

    def entries(self, folder: Path) -> list[Path]:
        """Return the files in `folder` (`queue` or `running`), oldest first, without those still being written."""
        found = []
        with os.scandir(folder) as listed:
            for entry in listed:
                # A queued one may be cancelled meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False) and not entry.name.startswith("."):
                        found.append((entry.stat().st_mtime_ns, folder / entry.name))
        return [path for _, path in sorted(found)]

    def accept(self, folder: Path) -> Iterator[Order]:
        """Yield the valid orders in `folder` (`queue` or `running`), oldest first; delete and log invalid files."""
        for entry in self.entries(folder):
            try:
                order = read_order(self.root, entry)
            except (OSError, ValueError) as error:
                # An order that was cancelled meanwhile is not there any more.
                with contextlib.suppress(FileNotFoundError):
                    entry.unlink()
                    log.warning("order_removed", entry=f"{folder.name}/{entry.name}", error=str(error))
            else:
                yield order

    def has_living(self) -> bool:
        """Return whether the process of any step is alive, one that was told to stop included."""
        found = (self.process_of(entry.stem) for entry in self.entries(self.running))
        return any(process is not None and is_alive(process) for process in found)

    def process_of(self, key: str) -> Identity | None:
        """
        Return the step's process, perhaps dead, as the worker recorded it.

        `None` if the worker has not recorded it yet, or if the attempt's entry is gone or damaged.
        """
        try:
            return _Entry.model_validate_json(durable.read_regular(self.running / f"{key}.json")).process
        except (FileNotFoundError, ValueError):
            return None


class Executor(Protocol):
    """Runs step attempts; all of its methods return at once."""

    def submit(self, spec: StepSpec) -> None:
        """Have the attempt run; do nothing if it is known or has a result."""

    def poll(self, spec: StepSpec) -> JobState:
        """Return the attempt's state."""

    def cancel(self, key: str) -> None:
        """Have the attempt stopped if it runs, and not begun if it does not."""

    def outlives(self, key: str) -> bool:
        """Return whether the attempt goes on when the daemon ends."""


def refuse_moved(spool: Spool, on_nodes: Collection[str]) -> None:
    """Raise `DropforgeError` if an attempt was begun here whose step is among `on_nodes` now, or the reverse."""
    here: Iterable[Path] = (path for place in (spool.queue, spool.running) for path in place.glob("*-*-*.json"))
    moved = [path for path in here if path.name.split("-")[1] in on_nodes]
    moved += [path for path in run_files.open_jobs(spool.root) if path.parent.name.split("-")[0] not in on_nodes]
    if moved:
        message = f"the attempt of {moved[0]} has no result, and its step is to run elsewhere now"
        attempt = moved[0].stem if moved[0].parent in (spool.queue, spool.running) else moved[0].parents[2].name
        hint = "set executor.kind and executor.slurm.local back until the run has ended: dropforge cancel "
        hint += f"{attempt.partition('-')[0]} ends it"
        raise DropforgeError(message, hint)


class ByStep:
    """Runs the steps named `steps` by one executor and all others by another one."""

    def __init__(self, steps: Collection[str], theirs: Executor, others: Executor) -> None:
        """Run `steps` by `theirs`."""
        self._steps, self._theirs, self._others = frozenset(steps), theirs, others

    def submit(self, spec: StepSpec) -> None:
        """Have the attempt run."""
        self._of(spec.key).submit(spec)

    def poll(self, spec: StepSpec) -> JobState:
        """Return the attempt's state."""
        return self._of(spec.key).poll(spec)

    def cancel(self, key: str) -> None:
        """Have the attempt stopped."""
        self._of(key).cancel(key)

    def outlives(self, key: str) -> bool:
        """Return whether the attempt goes on when the daemon ends."""
        return self._of(key).outlives(key)

    def _of(self, key: str) -> Executor:
        return self._theirs if key.split("-")[1] in self._steps else self._others


class LocalExecutor:
    """Submits attempts to the worker on this machine."""

    def __init__(self, spool: Spool) -> None:
        """Use `spool`."""
        self._spool = spool

    def submit(self, spec: StepSpec) -> None:
        """Write the attempt's spec.json and its queue entry; do nothing if it is in the spool or has a result."""
        folder = run_files.make_attempt_folder(spec)
        if (folder / RESULT_NAME).exists():
            return
        if not (folder / SPEC_NAME).exists():
            durable.write_bytes(folder / SPEC_NAME, spec.model_dump_json().encode())
            durable.fsync_folder(folder.parent)
        if not self._is_known(spec.key):
            durable.write_json(self._spool.queue / f"{spec.key}.json", {"fence": spec.fence})

    def poll(self, spec: StepSpec) -> JobState:
        """Return an attempt's state from its files; `LOST` also if it was taken and worker and process are dead."""
        # In the order of an attempt's life, so that one moving on meanwhile is not taken for lost.
        if (self._spool.queue / f"{spec.key}.json").exists():
            return JobState.QUEUED
        running = (self._spool.running / f"{spec.key}.json").exists()
        if (Path(spec.root) / spec.folder / RESULT_NAME).exists():
            return JobState.ENDED
        if not running:
            return JobState.LOST
        if lock_holder(self._spool.worker_lock) is not None:
            return JobState.RUNNING
        process = self._spool.process_of(spec.key)
        return JobState.RUNNING if process and is_alive(process) else JobState.LOST

    def cancel(self, key: str) -> None:
        """Remove an attempt from the queue; if it runs already, have the worker stop it, without waiting for that."""
        (self._spool.queue / f"{key}.json").unlink(missing_ok=True)
        if self._is_known(key):
            (self._spool.cancelled / key).touch()

    def outlives(self, _key: str) -> bool:
        """Return `False`: the worker ends with the daemon, or is not stopped by it at all."""
        return False

    def _is_known(self, key: str) -> bool:
        return any((folder / f"{key}.json").exists() for folder in (self._spool.queue, self._spool.running))
