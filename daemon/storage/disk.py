"""Free space on the disks of state and runs: whether a run fits, and the low-water mark below which no run begins."""

import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path

from daemon.settings.model import Settings
from daemon.state.database_file import cause_of
from pipeline.errors import DropforgeError, is_disk_full
from pipeline.words import size_words


def is_full(error: BaseException) -> bool:
    """Return whether a full disk caused an error, also one of SQLite or wrapped by SQLAlchemy."""
    cause = cause_of(error)
    return is_disk_full(error) if cause is None else getattr(cause, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL


class Disk:
    """The file systems that state folder and work folder lie on; they may be one."""

    def __init__(self, settings: Settings) -> None:
        """Use the folders of `settings`, which need not exist."""
        self._root, self._state = settings.work_folder, settings.state_folder
        self.low_water_bytes = settings.disk.low_water_bytes

    def free_bytes(self) -> int:
        """Return the free bytes of the work folder's file system that an ordinary user may use."""
        return _free_bytes(self._root)

    def least_free_bytes(self) -> int:
        """Return the free bytes of the fuller file system of the two, as `shortage` compares them."""
        return min(_free_bytes(self._root), _free_bytes(self._state))

    def shortage(self) -> str:
        """Return a message if either file system has less space free than the low-water mark; empty otherwise."""
        for folder in dict.fromkeys((self._root, self._state)):
            free, mark = _free_bytes(folder), self.low_water_bytes
            if free < mark:
                return (
                    f"the disk of {folder} has {size_words(free)} free, under the {size_words(mark)} of "
                    "disk.low_water_bytes: no run begins and files stay in the inbox until there is room "
                    "(dropforge gc --dry-run)"
                )
        return ""

    def require(self, needs: Mapping[str, int], *, margin: bool = True) -> None:
        """
        Raise `DropforgeError` unless `needs`, in bytes by step, fit on the work folder's file system.

        With `margin` they must leave the low-water mark free.
        """
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


def _free_bytes(path: Path) -> int:
    folder = next(folder for folder in (path, *path.parents) if folder.exists())
    volume = os.statvfs(folder)
    return volume.f_bavail * volume.f_frsize
