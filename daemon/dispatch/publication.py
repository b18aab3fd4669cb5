"""Publish the results of steps in threads: hashing gigabytes keeps neither other runs nor the watchdog waiting."""

from concurrent.futures import Future, wait

from daemon.state import run_files
from daemon.storage import gc
from daemon.system.folders import StateFolder
from daemon.system.sd_notify import in_background
from pipeline.artifacts import Artifact
from pipeline.contract import StepResult, StepSpec
from pipeline.errors import StepFailed

#: How long the beginning waits for the end: most publications take less.
_AT_ONCE_SECONDS = 1.0


class Publisher:
    """Publishes one result of each run at a time; `take` raises `KeyError` for a run that is not in it."""

    def __init__(self, state_folder: StateFolder) -> None:
        """Hold the collection's lock of `state_folder` while files are moved."""
        self._state_folder = state_folder
        self._going: dict[int, Future[Artifact]] = {}

    def __contains__(self, run: int) -> bool:
        """Return whether `begin` was called for the run and its outcome was neither taken nor forgotten."""
        return run in self._going

    def begin(self, spec: StepSpec, result: StepResult) -> None:
        """Begin to publish a good result in a thread, and wait up to 1 s for its end; `take` has the outcome."""
        lock = gc.collecting(self._state_folder)
        self._going[spec.run] = in_background(run_files.publish, spec, result, lock)
        wait([self._going[spec.run]], _AT_ONCE_SECONDS)

    def take(self, run: int) -> Artifact | StepFailed | None:
        """Return, once, the published artifact or why it cannot be; `None` while that goes on. Raises other errors."""
        if not self._going[run].done():
            return None
        future = self._going.pop(run)
        error = future.exception()
        return error if isinstance(error, StepFailed) else future.result()

    def forget(self, run: int) -> None:
        """Discard the outcome of a run's publication, if any has begun; its thread goes on to the end."""
        self._going.pop(run, None)
