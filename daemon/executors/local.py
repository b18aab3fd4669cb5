"""
The own machine: a spool folder that `dropforge worker` serves.

    spool/queue/KEY.json     ordered; written by the executor
    spool/running/KEY.json   taken by the worker, with the identity of its process
    spool/cancel/KEY         somebody wants it stopped
    spool/worker.lock        held by the living worker

The worker writes result.json before it takes the entry out of `running`, so an attempt that is in neither folder and
has no result is lost.
"""

from pathlib import Path

from daemon.executors import JobState
from daemon.processes import Identity, is_alive, lock_holder
from pipeline import durable
from pipeline.contract import RESULT_NAME, SPEC_NAME, StepSpec


class Spool:
    """The folders that executor and worker meet in."""

    def __init__(self, state_folder: Path) -> None:
        """Make the folders where they are missing."""
        self.root = state_folder
        self.folder = state_folder / "spool"
        self.queue = self.folder / "queue"
        self.running = self.folder / "running"
        self.cancelled = self.folder / "cancel"
        self.worker_lock = self.folder / "worker.lock"
        for folder in (self.queue, self.running, self.cancelled):
            folder.mkdir(parents=True, exist_ok=True)

    def remove_leftovers(self) -> None:
        """Remove the entries that a dead daemon did not finish writing; for a daemon that holds the folder's lock."""
        durable.remove_leftovers(self.queue)

    def process_of(self, key: str) -> Identity | None:
        """Return the process that the worker wrote down for an attempt, if it has."""
        entry = durable.read_json(self.running / f"{key}.json")
        process = entry and entry.get("process")
        return Identity(**process) if process else None


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
        durable.write_json(self._spool.queue / f"{spec.key}.json", {"folder": spec.folder})

    def poll(self, spec: StepSpec) -> JobState:
        """Say how far an attempt is, from the files alone."""
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

    def cancel(self, spec: StepSpec) -> None:
        """Leave a mark that the worker acts on."""
        if self._is_known(spec.key):
            (self._spool.cancelled / spec.key).touch()

    def list_mine(self) -> list[str]:
        """Return the keys in the queue and in the worker's hands."""
        paths = [*self._spool.queue.glob("[!.]*.json"), *self._spool.running.glob("[!.]*.json")]
        return sorted(path.name.removesuffix(".json") for path in paths)

    def _is_known(self, key: str) -> bool:
        return any((folder / f"{key}.json").exists() for folder in (self._spool.queue, self._spool.running))
