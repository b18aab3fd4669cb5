"""Copy one untrusted file of the inbox into the state folder and hash it."""

import hashlib
import os
import stat
import uuid
from pathlib import Path
from shlex import quote

from daemon.system.programs import user
from pipeline.errors import DropforgeError
from pipeline.words import printable

_CHUNK_BYTES = 1 << 20
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class SourceUnreadable(DropforgeError):
    """A file in the inbox cannot be opened or read; it is left where it is."""


class SourceChanged(DropforgeError):
    """A file in the inbox changed while it was read: it was not complete after all."""


def look(name: bytes, folder_fd: int) -> os.stat_result:
    """Return the stat of `name` in the open folder, not of a link's target. Raises `FileNotFoundError`, `OSError`."""
    return os.stat(name, dir_fd=folder_fd, follow_symlinks=False)


def identity(info: os.stat_result) -> str:
    """Return a string that changes if the file is changed, renamed or given another mode: inode, ctime and size."""
    return f"{info.st_ino}:{info.st_ctime_ns}:{info.st_size}"


def refusal(info: os.stat_result, most: int) -> tuple[str, str, str] | None:
    """Return rule, reason and remedy for a file rejected unopened (not regular, hard-linked, too large), or `None`."""
    if not stat.S_ISREG(info.st_mode):
        kind = _KINDS.get(stat.S_IFMT(info.st_mode), "no regular file")
        return "file", f"the file is {kind}", "copy the data itself into the inbox"
    if info.st_nlink > 1:
        reason = "the file has another name elsewhere (a hard link)"
        return "file", reason, "copy it into the inbox instead of linking it"
    return too_large(info, most)


def too_large(info: os.stat_result, most: int) -> tuple[str, str, str] | None:
    """Return rule, reason and remedy for a file of more than `most` bytes, else `None`."""
    if info.st_size <= most:
        return None
    reason = f"the file has {info.st_size:,} bytes, {most:,} are allowed"
    return "too_large", reason, "split it, or raise intake.max_bytes"


def copy(name: bytes, folder_fd: int, info: os.stat_result, folder: Path) -> tuple[Path, str]:
    """
    Copy the file `name`, whose `look` gave `info`, into `folder`; return the durable copy's temporary path and sha256.

    Raises `SourceUnreadable` if it is a link or cannot be read, `SourceChanged` if it differs from `info`, changes or
    is gone, or `OSError` if the copy cannot be written. Nothing is left behind then.
    """
    try:
        fd = os.open(name, _OPEN, dir_fd=folder_fd)
    except FileNotFoundError as error:
        raise SourceChanged("it is not there any more") from error
    except OSError as error:
        message = f"it cannot be opened: {error.strerror}"
        remedy = f"let user {user()} read it: chmod g+r {quote(printable(os.fsdecode(name)))}"
        raise SourceUnreadable(message, remedy) from error
    target = folder / f"{uuid.uuid4().hex}.tmp"
    try:
        sha256 = _stream(fd, info, target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    return target, sha256


def _stream(fd: int, info: os.stat_result, target: Path) -> str:
    _same(fd, info)
    digest = hashlib.sha256()
    left = info.st_size
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        while chunk := _read(fd):
            left -= len(chunk)
            if left < 0:
                break
            digest.update(chunk)
            file.write(chunk)
        _same(fd, info)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, _CHUNK_BYTES)
    except OSError as error:
        message = f"it cannot be read: {error.strerror}"
        raise SourceUnreadable(message, "see whether its file system is in order") from error


def _same(fd: int, info: os.stat_result) -> None:
    now = os.fstat(fd)
    if identity(now) != identity(info) or now.st_mtime_ns != info.st_mtime_ns or not stat.S_ISREG(now.st_mode):
        raise SourceChanged("it changed while it was read", "nothing to do: it is read again once it is quiet")
