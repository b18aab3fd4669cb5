"""Current errors of tracks, hooks and addresses: each is logged once, and what failed is retried after a minute."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy.exc import OperationalError

from daemon.state.ownership import ShareGone
from pipeline.errors import DropforgeError, is_disk_full, os_words

_PAUSE_SECONDS = 60.0
_LASTING_SECONDS = 600.0
log = structlog.get_logger()


class Troubles:
    """The current error of each track, hook or address, and when it is retried; kept in memory."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Measure pauses by `monotonic`, in seconds."""
        self._monotonic = monotonic
        self._words: dict[str, str] = {}
        #: End of the pause on the monotonic clock, in seconds.
        self._until: dict[str, float] = {}
        #: When the errors noted with `message` began, on the same clock.
        self._since: dict[str, float] = {}

    def note(self, whose: str, error: Exception | None, *, message: bool = False) -> None:
        """
        Record the error of `whose` (as "track a"), log it if it is new, and begin or restart a pause of a minute.

        With `message` it is in `lasting` once it has lasted for ten minutes. Without an error `whose` is cleared.
        """
        if error is None:
            self.clear(whose)
            return
        words = in_words(error)
        known = self._words.get(whose)
        self._words[whose] = words
        self._until[whose] = self._monotonic() + _PAUSE_SECONDS
        if message:
            self._since.setdefault(whose, self._monotonic())
        if known != words:
            log.warning("trouble", whose=whose, error=words)

    def clear(self, whose: str) -> None:
        """Forget the error and the pause of `whose`, and log that it is over; do nothing if there is no error."""
        if self._words.pop(whose, None) is not None:
            del self._until[whose]
            self._since.pop(whose, None)
            log.info("trouble_over", whose=whose)

    @contextmanager
    def alone(self, whose: str) -> Iterator[None]:
        """
        Note what the block raises as the error of `whose`, so that others go on; clear it if nothing is raised.

        An error that `concerns_all` is raised and not noted.
        """
        try:
            yield
        except Exception as error:
            if concerns_all(error):
                raise
            self.note(whose, error)
        else:
            self.clear(whose)

    def is_pausing(self, whose: str) -> bool:
        """Return whether a pause of `whose` has not ended yet; `False` if there was none."""
        return self._monotonic() < self._until.get(whose, 0.0)

    @property
    def words(self) -> dict[str, str]:
        """The current error messages, by name."""
        return dict(self._words)

    @property
    def lasting(self) -> dict[str, str]:
        """The messages of the errors noted with `message` that have lasted for ten minutes, by name."""
        words, until = self.words, self._monotonic() - _LASTING_SECONDS
        return {whose: words[whose] for whose, since in dict(self._since).items() if since <= until and whose in words}


def concerns_all(error: Exception) -> bool:
    """Return whether an error is of a full disk, a database that is locked or unreadable, or the shared folder."""
    return isinstance(error, OperationalError | ShareGone) or is_disk_full(error)


def in_words(error: Exception) -> str:
    """Return an error's message for users: an `OSError`'s with the file name, an unforeseen error's with its class."""
    if isinstance(error, DropforgeError):
        return error.message
    if isinstance(error, OSError):
        return os_words(error)
    return f"{type(error).__name__}: {error}"
