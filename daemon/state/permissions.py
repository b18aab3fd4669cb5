"""Who this process is, and what it may read and write: tried, not guessed, and nothing is left behind."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from daemon.state.layout import DATABASE_NAME, FOLDERS
from daemon.system.programs import name_of, user

#: What file systems answer that know no files without a name.
_NO_NAMELESS = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})


def is_closed(path: Path) -> bool:
    """Say whether this user may not read a file or folder; one that is not there is not closed."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def state_rights(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield in words, each with its remedy, who else may enter a state folder, and whose it is if not this user's."""
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
    """Say whether others than a folder's owner may take away files in it that are not theirs."""
    try:
        mode = folder.stat().st_mode
    except FileNotFoundError:
        return False
    return bool(mode & 0o022) and not mode & stat.S_ISVTX


def refusal(state_folder: Path) -> OSError | None:
    """
    Return what the kernel says to the first thing in a state folder that this user may not write; `None` if to none.

    Tried are the folder, those in it that Dropforge makes, the database and the locks. Where there is no state folder
    yet, it is the folder that it would be made in.
    """
    try:
        for place in _written(state_folder):
            _try_folder(place) if place.is_dir() else _try_file(place)
    except OSError as error:
        return error
    return None


def _written(state_folder: Path) -> Iterator[Path]:
    place = state_folder
    while not place.exists():
        place = place.parent
    yield place
    if place == state_folder:
        folders = (place / name for name in FOLDERS)
        yield from (path for path in folders if path.is_dir() and not path.is_symlink())
        yield from (path for path in (place / DATABASE_NAME, *sorted(place.glob("*.lock"))) if path.is_file())


def _try_folder(folder: Path) -> None:
    """Make a file without a name, which nobody who looks into the folder meanwhile can see."""
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError as error:
        if error.errno not in _NO_NAMELESS:
            raise
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder)) from error


def _try_file(path: Path) -> None:
    """Open a file for writing, and write nothing."""
    os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
