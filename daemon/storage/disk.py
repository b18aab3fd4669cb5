"""Room on the disk: whether a run fits, and what is said where there is little."""

import sqlite3
from collections.abc import Mapping

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from daemon.settings.model import Settings
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.storage.free_space import FreeSpace
from daemon.system.sd_notify import notify
from pipeline.errors import DropforgeError, is_disk_full
from pipeline.words import size_words

log = structlog.get_logger()


def is_full(error: BaseException) -> bool:
    """Say whether a full disk is behind an error of ours, of a library or of the database."""
    if isinstance(error, DBAPIError) and error.orig is not None and error.orig is not error:
        return is_full(error.orig)
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    return is_disk_full(error)


class Disk(FreeSpace):
    """The file system that the state folder lies on, and what is done about it."""

    def __init__(self, settings: Settings) -> None:
        """Look at the state folder of `settings`, which need not exist."""
        super().__init__(settings)
        self._was_low = False

    def require(self, needs: Mapping[str, int], *, margin: bool = True) -> None:
        """Raise `DropforgeError` unless each step's bytes fit, with `margin` above the low-water mark."""
        need = sum(needs.values())
        free = self.free_bytes()
        kept = self.low_water_bytes if margin else 0
        if free >= need + kept:
            return
        parts = ", ".join(f"{step} {size_words(size)}" for step, size in needs.items() if size)
        mark = f" beside the {size_words(kept)} of disk.low_water_bytes" if kept else ""
        message = f"the disk of {self._root} has no room for the run: it needs {size_words(need)}{mark} ({parts})"
        hint = "free some room there, the run then begins by itself; dropforge gc --dry-run says what can be given back"
        raise DropforgeError(message, hint)

    def look(self, engine: Engine, now: int) -> str:
        """Return what `shortage` does, and record a change. Raises what the database raises on a full disk."""
        words = self.shortage()
        if bool(words) != self._was_low:
            with transaction(engine) as session:
                record_event(session, "disk_low" if words else "disk_has_room", now, free_bytes=self.free_bytes())
            self._was_low = bool(words)
            log.warning("disk_low", why=words) if words else log.info("disk_has_room")
            notify(f"STATUS={words or 'the disk has room again'}")
        return words
