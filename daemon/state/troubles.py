"""Errors of single runs, tracks and hooks: each is logged once and retried after a pause that doubles."""

import time
from collections.abc import Callable
from pathlib import Path

import structlog

from daemon.system.programs import user
from pipeline.errors import DropforgeError

_FIRST_SECONDS = 30.0
_LONGEST_SECONDS = 600.0
log = structlog.get_logger()


class SetApart(DropforgeError):
    """A run cannot use its own files: only this run waits, for `pause_ms` milliseconds; other runs go on."""

    def __init__(self, message: str, hint: str, pause_ms: int) -> None:
        """Set message and hint as `DropforgeError` does, and the pause in milliseconds."""
        super().__init__(message, hint)
        self.pause_ms = pause_ms


class Troubles:
    """The current error of each run, track or hook, and when it is retried; kept in memory."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Measure pauses by `monotonic`, in seconds."""
        self._monotonic = monotonic
        self._words: dict[str, str] = {}
        #: End of the pause on the monotonic clock, and its length, in seconds.
        self._pauses: dict[str, tuple[float, float]] = {}

    def note(self, whose: str, error: Exception) -> float:
        """Record the error of `whose` (a name such as "run 12"), log it if new, and return the pause in seconds."""
        words = in_words(error)
        if self._words.get(whose) != words:
            log.warning("trouble", whose=whose, error=words)
        self._words[whose] = words
        _, last = self._pauses.get(whose, (0.0, 0.0))
        pause = min(2 * last, _LONGEST_SECONDS) if last else _FIRST_SECONDS
        self._pauses[whose] = (self._monotonic() + pause, pause)
        return pause

    def clear(self, whose: str) -> None:
        """Forget the error and the pause of `whose`, if there is one."""
        self._pauses.pop(whose, None)
        if self._words.pop(whose, None) is not None:
            log.info("trouble_over", whose=whose)

    def is_pausing(self, whose: str) -> bool:
        """Return whether the pause of `whose` has not ended yet."""
        until, _ = self._pauses.get(whose, (0.0, 0.0))
        return self._monotonic() < until

    @property
    def words(self) -> dict[str, str]:
        """The current error messages, by name."""
        return dict(self._words)


class RunsApart:
    """The errors of runs that cannot use their own files, each with its own pause."""

    def __init__(self, state_folder: Path) -> None:
        """Name the run folders in `state_folder` in hints."""
        self._root = state_folder
        self._troubles = Troubles()

    def words(self, run_id: int, error: Exception) -> SetApart:
        """Return the error for the run's row, with a pause that doubles each time, up to 10 minutes."""
        pause = self._troubles.note(f"run {run_id}", error)
        message = f"the files of run {run_id} cannot be used: {in_words(error)}"
        hint = (
            f"let {user()}, that the daemon runs as, own all of {self._root / 'runs' / str(run_id)}: the run then "
            f"goes on by itself; or end it: dropforge cancel {run_id}"
        )
        return SetApart(message, hint, round(1000 * pause))

    def clear(self, run_id: int) -> None:
        """Forget the error of a run, if there is one."""
        self._troubles.clear(f"run {run_id}")


def in_words(error: Exception) -> str:
    """Return an error's message for users; that of an `OSError` includes the file name."""
    if isinstance(error, DropforgeError):
        return error.message
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    return f"{type(error).__name__}: {error}"
