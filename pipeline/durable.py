"""
Write files that survive a power cut, and read untrusted files without blocking.

Functions raise `OSError` if a file cannot be read or written, unless they say what they return then.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import stat
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

#: Largest document that is read whole, in bytes.
MOST_BYTES = 1 << 28
_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


def fsync_folder(folder: Path) -> None:
    """Fsync `folder`, so that its entries survive a power cut."""
    fsync_file(folder)


def fsync_file(path: Path) -> None:
    """Fsync the file `path`, so that its contents survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(folder: Path) -> None:
    """Fsync every regular file and folder below `folder`, then `folder` itself; symbolic links are skipped."""
    for directory, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink():
                # A temporary file may be renamed meanwhile; its writer makes it durable.
                with contextlib.suppress(FileNotFoundError):
                    fsync_file(path)
        fsync_folder(Path(directory))


def write_bytes(path: Path, data: bytes, *, first: bool = False, folder: Path | None = None) -> None:
    """
    Create or replace the file `path` atomically and durably: a crash leaves the old file or the new one.

    With `first`, a file that is there stays. Its folder must exist. Its permissions become 0644 less the umask; a
    symbolic link is replaced, not followed. It is written in `folder`, by default its own, and then moved.
    """
    aside = (folder or path.parent) / f".{path.name}.{uuid.uuid4().hex}.tmp"
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if first:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
            aside.unlink()
        else:
            aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_json(path: Path, value: Any, *, first: bool = False) -> None:
    """Write `json_bytes(value)` as `write_bytes` does. Raises `ValueError` if it has NaN or infinity."""
    write_bytes(path, json_bytes(value), first=first)


def json_bytes(value: Any) -> bytes:
    """Return `value` as indented UTF-8 JSON with a final newline. Raises `ValueError` if it has NaN or infinity."""
    return (json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode()


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """Write `values` as `write_bytes` does, one JSON text per line. Raises `ValueError` if one has NaN or infinity."""
    lines = (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values)
    write_bytes(path, "".join(lines).encode())


def sha256_json(value: Any) -> str:
    """Return a JSON value's hexadecimal sha256 for any order of keys. Raises `ValueError` for NaN or infinity."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_hint(path: Path, value: Any) -> None:
    """Write or replace `path` with `value` as JSON, atomically but not durably: for progress, which may be lost."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(value), encoding="utf-8")
    aside.rename(path)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """
    Remove the temporary files that interrupted writers of `folder`/`name` left; `name` is a glob pattern.

    Nothing happens if the folder is missing. Only for the single writer of these files: a running writer's file would
    be removed, too.
    """
    for path in folder.glob(f".{name}.*.tmp"):
        path.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """
    Return the JSON value in `path`; `None` if there is no such file.

    Raises `ValueError` if it is not JSON, `OSError` if it is no regular file, cannot be read or is too large.
    """
    try:
        return json.loads(read_regular(path).decode())
    except FileNotFoundError:
        return None
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error


def publish_folder(source: Path, target: Path) -> None:
    """
    Move the finished folder `source` to `target`, which is named after its content, durably.

    If a `target` that is not empty exists, it is taken to hold the same content: nothing is moved, and `source` stays.
    """
    fsync_tree(source)
    try:
        source.rename(target)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
    fsync_folder(target.parent)
    fsync_folder(source.parent)


def sha256_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's bytes. Raises `OSError` if it is missing or no regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the value of each line that is not blank, split at newline bytes only. Raises `ValueError` if not JSON."""
    with open_regular(path) as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} if the file cannot be read or holds no JSON object."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def open_regular(path: Path) -> io.BufferedReader:
    """
    Open the regular file `path` for reading, following links, without ever waiting for a pipe.

    Raises `OSError` if there is no such file or it is not a regular one.
    """
    fd = os.open(path, _OPEN)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(fd, "rb")


def signature(path: Path) -> tuple[str, int, int, int]:
    """Return a file's path, size, mtime in ns and inode, to detect changes; numbers are 0 if `stat` fails."""
    try:
        info = path.stat()
    except OSError:
        return str(path), 0, 0, 0
    return str(path), info.st_size, info.st_mtime_ns, info.st_ino


def read_regular(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return the bytes of a regular file. Raises `OSError` if it cannot be read or has more than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
        return file.read(size)
