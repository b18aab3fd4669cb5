"""
Files of the daemon's own where others may write too, known by their owner and their first line.

Anybody may have put a file of that name there, or a link. Such a one is left alone: only a regular file of the daemon's
user that begins with `MARK` is replaced or removed, and no link is ever followed.
"""

import contextlib
import os
import stat
import uuid

from daemon.inbox.folders import Folder

#: The first line of each such file says whose it is.
MARK = "Dropforge keeps this file up to date; one of your own by this name stays as it is."
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
#: Longer than any file that is written here.
_MOST_BYTES = 1 << 20


def read(folder: Folder, name: str | bytes) -> bytes | None:
    """Return the first `_MOST_BYTES` of a regular file of the daemon's user; `None` if there is none."""
    try:
        fd = os.open(name, _READ, dir_fd=folder.fd)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        info = os.fstat(fd)
        own = stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid()
        return file.read(_MOST_BYTES) if own else None


def keep(folder: Folder, aside: Folder, name: str, text: str | None) -> None:
    """
    Let `name` in `folder` be `text` under the mark, or be gone for `None`, unless somebody else's file has that name.

    It is written in the folder `aside` first, which only the daemon may write to. Raises `OSError`.
    """
    data, old = None if text is None else f"{MARK}\n\n{text}".encode(), read(folder, name)
    ours = old is not None and old.startswith(MARK.encode())
    if old == data or (not ours and (data is None or _is_there(folder, name))):
        return
    if data is None:
        os.unlink(name, dir_fd=folder.fd)
        return
    temporary = f".{name}.{uuid.uuid4().hex}.tmp"
    try:
        with os.fdopen(os.open(temporary, _WRITE, 0o644, dir_fd=aside.fd), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not ours:
            # Unlike a rename this never takes the place of a file that came in this very moment.
            with contextlib.suppress(FileExistsError):
                os.link(temporary, name, src_dir_fd=aside.fd, dst_dir_fd=folder.fd, follow_symlinks=False)
        else:
            os.rename(temporary, name, src_dir_fd=aside.fd, dst_dir_fd=folder.fd)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=aside.fd)


def _is_there(folder: Folder, name: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        os.stat(name, dir_fd=folder.fd, follow_symlinks=False)
        return True
    return False
