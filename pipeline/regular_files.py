"""Files in folders that may come from anybody: opened as regular files alone, without waiting, read up to a limit."""

import errno
import io
import os
import stat
from pathlib import Path

_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


def open_regular(path: Path) -> io.BufferedReader:
    """
    Return `path` open for reading; links are followed, as a download cache lays them out.

    Raises `OSError` if there is no such file or it is none that can be read to an end: to open a pipe would wait.
    """
    fd = os.open(path, _OPEN)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(fd, "rb")


def signature(path: Path) -> tuple[str, int, int, int]:
    """Return what changes when a file does: its path, size, time of change and inode; zeros where there is none."""
    try:
        info = path.stat()
    except OSError:
        return str(path), 0, 0, 0
    return str(path), info.st_size, info.st_mtime_ns, info.st_ino


def read_regular(path: Path, most: int) -> bytes:
    """Return the bytes of a regular file. Raises `OSError` if it cannot be read or has more than `most` bytes."""
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return data
