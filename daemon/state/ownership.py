"""Keep other users out of the state folder, and detect that it was moved or replaced."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import structlog

from daemon.state.layout import DATABASE_NAME, FOLDERS
from daemon.system.programs import name_of, user
from pipeline.errors import DropforgeError

#: Folders that the worker follows no link to.
_NO_LINK = frozenset({"runs", "spool"})
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
log = structlog.get_logger()


class StateFolderGone(DropforgeError):
    """The state folder was moved, removed or replaced while a process used it."""


class OwnFolder:
    """A state folder, held open so that its replacement by another folder is detected."""

    def __init__(self, path: Path, command: str) -> None:
        """
        Create the folder if it is missing, and revoke other users' rights; `command` is the subcommand for hints.

        Raises `DropforgeError` if another user owns the folder, or owns or could change one of `FOLDERS` in it.
        """
        self._path = path
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        info = os.fstat(self._fd)
        if info.st_uid != os.geteuid():
            owner = name_of(info.st_uid)
            message = f"the state folder {path} belongs to {owner}, and this is {user()}"
            raise DropforgeError(message, f"start it as its owner: sudo -u {owner} dropforge {command}")
        if info.st_mode & _OTHERS:
            os.fchmod(self._fd, stat.S_IMODE(info.st_mode) & ~_OTHERS)
            log.warning("state_folder_closed", folder=str(path), mode_was=f"{stat.S_IMODE(info.st_mode):04o}")
        for name in FOLDERS:
            _require_own(path / name)

    def require_there(self) -> None:
        """Raise `StateFolderGone` if the folder's path is gone or leads to another folder now."""
        try:
            there = self._path.stat()
        except OSError as error:
            raise self._gone(error.strerror or "it is not there") from error
        if not os.path.samestat(there, os.fstat(self._fd)):
            raise self._gone("another folder is in its place")

    def close(self) -> None:
        """Close the folder's descriptor."""
        os.close(self._fd)

    def _gone(self, why: str) -> StateFolderGone:
        message = f"the state folder {self._path} was moved or removed: {why}"
        return StateFolderGone(message, "put it back, or set state in dropforge.toml; then start again: dropforge run")


def _require_own(place: Path) -> None:
    """Raise `DropforgeError` if `place` exists and is not a folder of this user's own, or is an unsafe link."""
    try:
        info = place.lstat()
        linked = stat.S_ISLNK(info.st_mode)
        if linked:
            info = place.stat()
    except FileNotFoundError as error:
        if not place.is_symlink():
            return
        raise _not_own(place, "leads nowhere") from error
    if linked and place.name in _NO_LINK:
        raise _not_own(place, "is a link, which the worker does not follow")
    if not stat.S_ISDIR(info.st_mode):
        raise _not_own(place, "is no folder")
    if info.st_uid != os.geteuid():
        raise _not_own(place, f"belongs to {name_of(info.st_uid)}, and this is {user()}")
    if linked and info.st_mode & _OTHERS_WRITE:
        raise _not_own(place, "is a link to a folder that others may write to")


def _not_own(place: Path, what: str) -> DropforgeError:
    return DropforgeError(f"{place} {what}", f"let it be a folder that {user()} alone can write to, or move it away")


def state_rights(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield each problem of a state folder's mode and owner with its remedy; nothing if the folder is missing."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return
    if found.st_mode & 0o077:
        yield f"others may enter {folder}: mode {stat.S_IMODE(found.st_mode):o}", f"chmod 700 {folder}"
    if found.st_uid != os.geteuid():
        owner = name_of(found.st_uid)
        words = f"{folder} belongs to user {owner}, and this is user {user()}"
        yield words, f"ask as that user: sudo -u {owner} dropforge doctor"


def may_replace(folder: Path) -> bool:
    """Return whether users can delete each other's files in a folder; `False` if the folder is missing."""
    try:
        mode = folder.stat().st_mode
    except FileNotFoundError:
        return False
    return bool(mode & 0o022) and not mode & stat.S_ISVTX


def unwritable(state_folder: Path) -> Path | None:
    """
    Return the first path of a state folder that this user may not write; `None` if all are writable.

    Checked are the folder, the folders that Dropforge makes in it, the database and the locks; if there is no state
    folder yet, only the folder in which it would be created.
    """
    place = state_folder
    while not place.exists():
        place = place.parent
    written = [place]
    if place == state_folder:
        folders = (place / name for name in FOLDERS)
        written += [path for path in folders if path.is_dir() and not path.is_symlink()]
        written += [path for path in (place / DATABASE_NAME, *sorted(place.glob("*.lock"))) if path.is_file()]
    rights = ((path, os.W_OK | (os.X_OK if path.is_dir() else 0)) for path in written)
    return next((path for path, right in rights if not os.access(path, right)), None)
