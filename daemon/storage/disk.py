"""
Room on the disk: whether a run fits, what is said where there is little, and the ballast for a full disk.

A full disk refuses the note that it is full, too. The ballast is a file of no use that is given up then, so that the
failure can be recorded; it is made again once there is room.
"""

import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from daemon.settings.model import Settings
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.layout import BALLAST_NAME
from daemon.storage.free_space import FreeSpace
from daemon.system.sd_notify import notify
from pipeline.errors import DropforgeError, is_disk_full
from pipeline.words import size_words

_MEGABYTE = 1 << 20
log = structlog.get_logger()


def is_full(error: BaseException) -> bool:
    """Say whether a full disk is behind an error of ours, of a library or of the database."""
    if isinstance(error, DBAPIError) and error.orig is not None and error.orig is not error:
        return is_full(error.orig)
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    return is_disk_full(error)


class Ballast:
    """A file of no use, really allocated."""

    def __init__(self, path: Path, size: int) -> None:
        """Keep `size` bytes at `path`; nothing is written before `make`. With 0 there is none."""
        self.path = path
        self.size = size

    @property
    def there(self) -> bool:
        """Whether the whole file is there, or none is wanted."""
        try:
            return self.path.stat().st_size == self.size
        except FileNotFoundError:
            return self.size == 0

    def make(self) -> None:
        """Allocate and write the file. Raises `OSError`, with nothing left behind, if there is no room."""
        self.path.unlink(missing_ok=True)
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, self.size)
            # Random: what compresses well takes no room on some file systems. Written: a promise may be broken.
            for start in range(0, self.size, _MEGABYTE):
                os.pwrite(fd, os.urandom(min(_MEGABYTE, self.size - start)), start)
            os.fsync(fd)
        except BaseException:
            self.path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def release(self) -> bool:
        """Give the room back; say whether there was any."""
        try:
            self.path.unlink()
        except FileNotFoundError:
            return False
        return True


class Disk(FreeSpace):
    """The file system that the state folder lies on, and what is done about it."""

    def __init__(self, settings: Settings) -> None:
        """Look at the state folder of `settings`, which need not exist."""
        super().__init__(settings)
        self._ballast = Ballast(self._root / BALLAST_NAME, settings.disk.ballast_bytes)
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

    def keep_ballast(self) -> None:
        """Make the ballast where it is missing and the disk has room for it."""
        if self._ballast.there or self.free_bytes() < self.low_water_bytes + 2 * self._ballast.size:
            return
        try:
            self._ballast.make()
        except OSError as error:
            log.warning("ballast_not_made", error=str(error))

    def make_way(self, error: BaseException) -> bool:
        """Give the ballast up if a full disk is behind `error`; say whether that made room to try again."""
        if not is_full(error) or not self._ballast.release():
            return False
        log.warning("disk_full", error=str(error), given_up_bytes=self._ballast.size)
        return True
