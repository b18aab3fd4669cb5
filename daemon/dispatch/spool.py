"""
The spool: a folder through which the daemon gives step attempts to `dropforge worker`.

    spool/queue/KEY.json     an attempt that is ordered here and has no result; written by the executor
    spool/worker.lock        held by the living worker

KEY is the attempt's run, step and number, the content the fence of its spec: an entry names no path and no program.
Only the state folder's owner can write one, as the folder is closed to others. All else about the attempt is in its own
folder (`attempt`). An entry goes when the attempt has its result.
"""

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import structlog

from daemon.dispatch.attempt import claim, end_revoked, folder_of, listed, process_of, read_spec, run_of, write_spec
from daemon.dispatch.step_process import result_of_dead
from daemon.state import run_files
from daemon.state.layout import WORKER_LOCK
from daemon.system.folders import StateFolder, WorkFolder
from daemon.system.processes import is_alive, lock_holder
from pipeline import durable
from pipeline.contract import CLAIM_NAME, RESULT_NAME, REVOKED_NAME, SPEC_NAME, StepSpec
from pipeline.errors import DropforgeError

log = structlog.get_logger()


class JobState(StrEnum):
    """State of an attempt, as its files show it."""

    #: It is ordered and has not begun.
    QUEUED = "queued"
    #: It is claimed: its process runs, or is about to begin or end.
    RUNNING = "running"
    #: Its result.json is there.
    ENDED = "ended"


class Spool:
    """The spool's folder in a state folder, shared by executor and worker."""

    def __init__(self, state_folder: StateFolder, work_folder: WorkFolder) -> None:
        """Create the folder if it is missing; the attempts are below `work_folder`."""
        self.root = work_folder
        self.queue = state_folder / "spool" / "queue"
        self.worker_lock = state_folder / WORKER_LOCK
        self.queue.mkdir(parents=True, exist_ok=True)

    def entry(self, key: str) -> Path:
        """Return the path of an attempt's entry."""
        return self.queue / f"{key}.json"

    def orders(self, busy: Collection[int] = ()) -> Iterator[StepSpec]:
        """Yield the specs of the valid orders of runs not in `busy`, oldest first; delete and log invalid entries."""
        for entry in self._entries():
            key = entry.name.removesuffix(".json")
            try:
                if run_of(key) not in busy:
                    yield read_spec(self.root, key, durable.read_object(entry).get("fence", ""))
            except (OSError, ValueError) as error:
                # An order that was cancelled meanwhile is not there any more.
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry)
                    else:
                        entry.unlink()
                    log.warning("order_removed", entry=entry.name, error=str(error))

    def _entries(self) -> list[Path]:
        dated = []
        with os.scandir(self.queue) as names:
            for entry in names:
                # It may be taken away meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    if not entry.name.startswith("."):
                        dated.append((entry.stat(follow_symlinks=False).st_mtime_ns, self.queue / entry.name))
        return [path for _, path in sorted(dated)]

    def has_living(self) -> bool:
        """Return whether the process of any ordered step is alive, including one that is to stop."""
        for entry in self._entries():
            with contextlib.suppress(ValueError):  # no order; the worker deletes it
                process = process_of(self.root / folder_of(entry.stem))
                if process is not None and is_alive(process):
                    return True
        return False

    def end_dead(self, spec: StepSpec, *, stopped: bool = False) -> None:
        """
        Write the result of a claimed attempt, whose process the caller knows to be dead, and delete its entry.

        If it was `stopped` or is revoked, the result is that of `end_revoked`, else "failed"; an existing one stays.
        """
        folder = self.root / spec.folder
        if stopped or REVOKED_NAME in listed(folder):
            end_revoked(spec)
        else:
            durable.write_json(folder / RESULT_NAME, result_of_dead(spec, None).model_dump(), first=True)
        self.entry(spec.key).unlink(missing_ok=True)


class Executor(Protocol):
    """Runs step attempts; all of its methods return at once."""

    def submit(self, spec: StepSpec) -> None:
        """Have the attempt run; do nothing if it is known or has a result."""

    def poll(self, spec: StepSpec) -> JobState:
        """Return the attempt's state."""

    def cancel(self, key: str) -> None:
        """Have the attempt stopped if it runs, and not begun if it does not."""


def refuse_moved(spool: Spool, on_nodes: Collection[str]) -> None:
    """Raise `DropforgeError` if a step in `on_nodes` has an open attempt here, or another step one on the cluster."""
    moved: list[Path] = [path for path in spool.queue.glob("*-*-*.json") if path.name.split("-")[1] in on_nodes]
    moved += [path for path in run_files.open_jobs(spool.root) if path.parent.name.split("-")[0] not in on_nodes]
    if moved:
        message = f"the attempt of {moved[0]} has no result, and its step is to run elsewhere now"
        attempt = moved[0].stem if moved[0].parent == spool.queue else moved[0].parents[2].name
        hint = "set executor.kind and executor.slurm.local back until the run has ended: dropforge cancel "
        hint += f"{attempt.partition('-')[0]} ends it"
        raise DropforgeError(message, hint)


class LocalExecutor:
    """Submits attempts to the worker on this machine."""

    def __init__(self, spool: Spool) -> None:
        """Use `spool`."""
        self._spool = spool

    def submit(self, spec: StepSpec) -> None:
        """Write the attempt's spec.json and its entry; do nothing if it has a result."""
        if write_spec(spec):
            self._order(spec)

    def poll(self, spec: StepSpec) -> JobState:
        """Return an attempt's state; order an unclaimed one again, and end a claimed one if worker and process died."""
        folder = self._spool.root / spec.folder
        names = listed(folder)
        if RESULT_NAME in names:
            return JobState.ENDED
        if CLAIM_NAME not in names:
            self._order(spec)  # the daemon that submitted it may have died before
            return JobState.QUEUED
        if self._is_dead(folder):
            self._spool.end_dead(spec)
            return JobState.ENDED
        return JobState.RUNNING

    def cancel(self, key: str) -> None:
        """
        Revoke an attempt, without waiting for its step to stop; write its result at once if no process works on it.

        Raises `OSError` or `ValueError` if its files cannot be read or written.
        """
        folder = self._spool.root / folder_of(key)
        durable.write_json(folder / REVOKED_NAME, {}, first=True)
        spec = StepSpec.model_validate_json(durable.read_regular(folder / SPEC_NAME))
        if claim(folder) or self._is_dead(folder):
            self._spool.end_dead(spec)

    def _order(self, spec: StepSpec) -> None:
        if not self._spool.entry(spec.key).exists():
            durable.write_json(self._spool.entry(spec.key), {"fence": spec.fence})

    def _is_dead(self, folder: Path) -> bool:
        """Return whether neither a worker nor the process of a claimed attempt is alive."""
        process = process_of(folder)
        return lock_holder(self._spool.worker_lock) is None and not (process and is_alive(process))
