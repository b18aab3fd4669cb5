"""
The own machine: a spool folder that `dropforge worker` serves.

    spool/queue/KEY.json     ordered; written by the executor
    spool/running/KEY.json   taken by the worker, with the identity of its process
    spool/cancel/KEY         somebody wants it stopped
    spool/refused/           what lay there and is not the daemon's word
    spool/worker.lock        held by the living worker

KEY is the attempt's and the content its fence, as `orders` reads it.

The worker writes result.json before it takes the entry out of `running`, so an attempt that is in neither folder and
has no result is lost.
"""

import contextlib
import os
import stat
import uuid
from pathlib import Path

import structlog

from daemon.dispatch.executor import JobState
from daemon.dispatch.orders import process_of
from daemon.state.layout import WORKER_LOCK
from daemon.system.processes import Identity, is_alive, lock_holder
from pipeline import durable
from pipeline.contract import RESULT_NAME, SPEC_NAME, StepSpec

#: Of a refused entry's name that is kept: room is left for what makes it unique.
_LONGEST_NAME = 200
log = structlog.get_logger()


class Spool:
    """The folders that executor and worker meet in."""

    def __init__(self, state_folder: Path) -> None:
        """Make the folders where they are missing."""
        self.root = state_folder
        self.folder = state_folder / "spool"
        self.queue = self.folder / "queue"
        self.running = self.folder / "running"
        self.cancelled = self.folder / "cancel"
        self.refused = self.folder / "refused"
        self.worker_lock = state_folder / WORKER_LOCK
        #: What could not even be moved, so that it is told once.
        self._stuck: set[Path] = set()
        for folder in (self.queue, self.running, self.cancelled, self.refused):
            folder.mkdir(parents=True, exist_ok=True)

    def remove_leftovers(self) -> None:
        """Remove the entries that a dead daemon did not finish writing; for a daemon that holds the folder's lock."""
        durable.remove_leftovers(self.queue)

    def entries(self, folder: Path) -> list[Path]:
        """Return what lies in `queue` or `running`, the oldest first, whatever it is; names with a dot are asides."""
        found = []
        with os.scandir(folder) as listed:
            for entry in listed:
                # A queued one may be called off meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    if not entry.name.startswith("."):
                        found.append((entry.stat(follow_symlinks=False).st_mtime_ns, folder / entry.name))
        return [path for _, path in sorted(found) if path not in self._stuck]

    def set_aside(self, path: Path, why: str) -> None:
        """Move what is not the daemon's word out of the way, with a line in the log; nothing if it is gone."""
        try:
            path.rename(self.refused / f"{path.name[:_LONGEST_NAME]}.{uuid.uuid4().hex}")
        except FileNotFoundError:
            return
        except OSError as error:
            self._stuck.add(path)
            why = f"{why}; it stays where it is: {error.strerror}"
        log.warning("order_refused", entry=str(path.relative_to(self.folder)), why=why)

    def make_way(self, path: Path) -> None:
        """Set aside what lies at an entry's or mark's place and is no file."""
        if os.path.lexists(path) and not is_file(path):
            self.set_aside(path, "it is no file")

    def is_cancelled(self, key: str) -> bool:
        """Say whether somebody wants an attempt stopped."""
        return is_file(self.cancelled / key)

    def has_living(self) -> bool:
        """Say whether the process of a step is there, one that was told to stop included."""
        found = (self.process_of(entry.stem) for entry in self.entries(self.running))
        return any(process is not None and is_alive(process) for process in found)

    def process_of(self, key: str) -> Identity | None:
        """Return the process that the worker wrote down for an attempt, if it has."""
        return process_of(self.running / f"{key}.json")


def is_file(path: Path) -> bool:
    """Say whether a regular file is there itself, and no link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


class LocalExecutor:
    """Executor over the spool folder."""

    def __init__(self, state_folder: Path) -> None:
        """Use the spool in `state_folder`."""
        self._spool = Spool(state_folder)

    def submit(self, spec: StepSpec) -> None:
        """Write the attempt's spec.json, then its entry in the queue. Idempotent on the key."""
        folder = Path(spec.root) / spec.folder
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / RESULT_NAME).exists() or self._is_known(spec.key):
            return
        durable.write_json(folder / SPEC_NAME, spec.model_dump(mode="json"))
        durable.fsync_folder(folder.parent)
        entry = self._spool.queue / f"{spec.key}.json"
        self._spool.make_way(entry)
        durable.write_json(entry, {"fence": spec.fence})

    def poll(self, spec: StepSpec) -> JobState:
        """Say how far an attempt is, from the files alone."""
        # In the order of an attempt's life, so that one moving on meanwhile is not taken for lost.
        if is_file(self._spool.queue / f"{spec.key}.json"):
            return JobState.QUEUED
        running = is_file(self._spool.running / f"{spec.key}.json")
        if (Path(spec.root) / spec.folder / RESULT_NAME).exists():
            return JobState.ENDED
        if not running:
            return JobState.LOST
        if lock_holder(self._spool.worker_lock) is not None:
            return JobState.RUNNING
        process = self._spool.process_of(spec.key)
        return JobState.RUNNING if process and is_alive(process) else JobState.LOST

    def cancel(self, key: str) -> None:
        """Take it out of the queue if no worker has begun it, else leave a mark that the worker acts on."""
        entry, mark = self._spool.queue / f"{key}.json", self._spool.cancelled / key
        self._spool.make_way(entry)
        entry.unlink(missing_ok=True)
        if self._is_known(key):
            self._spool.make_way(mark)
            mark.touch()

    def _is_known(self, key: str) -> bool:
        return any(is_file(folder / f"{key}.json") for folder in (self._spool.queue, self._spool.running))
