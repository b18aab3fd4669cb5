"""Publish the results of steps in threads: hashing gigabytes keeps neither other runs nor the watchdog waiting."""

from concurrent.futures import Future, wait

from daemon.state import run_files
from daemon.storage import gc
from daemon.system.folders import StateFolder
from daemon.system.sd_notify import in_background
from pipeline.artifacts import Artifact
from pipeline.contract import StepResult, StepSpec

#: How long the first call waits for the end: most publications take less.
_AT_ONCE_SECONDS = 1.0


class Publisher:
    """Publishes one result of each run at a time."""

    def __init__(self, state_folder: StateFolder) -> None:
        """Hold the collection's lock of `state_folder` while files are moved."""
        self._state_folder = state_folder
        self._going: dict[int, Future[Artifact]] = {}

    def __contains__(self, run: int) -> bool:
        """Return whether a result of the run is being published."""
        return run in self._going

    def publish(self, spec: StepSpec, result: StepResult) -> Artifact | None:
        """Publish a good result, and return its artifact; `None` while that goes on. Raises `StepFailed`."""
        future = self._going.get(spec.run)
        if future is None:
            lock = gc.collecting(self._state_folder)
            future = self._going[spec.run] = in_background(run_files.publish, spec, result, lock)
            wait([future], _AT_ONCE_SECONDS)
        if not future.done():
            return None
        del self._going[spec.run]
        return future.result()

    def forget(self, run: int) -> None:
        """Ask no more for the result of a run; a thread that publishes it goes on."""
        self._going.pop(run, None)
