"""
What a backup may name: looked at before any of it is believed, copied or followed.

A backup lies on disks that others write to. Nothing in it may lead out of the state folder: neither a name in the
manifest, nor a file that is none, nor a path in a row that later code writes to, deletes or links.
"""

import json
import os
import re
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

from daemon.state.database_file import other_table
from daemon.state.layout import DATABASE_NAME
from pipeline.errors import DropforgeError

SETTINGS = "settings.json"
#: Largest manifest, verdict or card, in bytes: they are read whole.
_MOST_BYTES = 1 << 28
_HINT = "somebody changed it; use another backup, each is a folder that `dropforge backup` made"
_HASH = r"[0-9a-f]+"
_CARD = r"attempts/[a-z]+-[1-9]\d*/report/report\.(?:json|html)"
_NAMES = re.compile(rf"drops/{_HASH}\.jsonl|runs/[1-9]\d*/(?:[a-z][^/]*\.json|{_CARD})|models/{_HASH}/.+", re.ASCII)
_TRACK = re.compile(r"[\w-]+").fullmatch
_MODEL = re.compile(rf"models/{_HASH}").fullmatch
_DROP = re.compile(rf"drops/{_HASH}\.jsonl").fullmatch
_STEP = re.compile(r"[a-z]+").fullmatch
_SIDECARS = ("-journal", "-wal")


class BackupUnusable(DropforgeError):
    """A folder is no whole backup, or a backup cannot be made there."""


def open_regular(path: Path) -> int:
    """
    Open a file of a backup for reading; return its descriptor.

    Raises `BackupUnusable` if it is a link, FIFO or device, which are not waited for; `OSError` as `open` does.
    """
    found = path.lstat()
    if stat.S_ISREG(found.st_mode):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
    raise _refusal(f"{path} is {_kind(found.st_mode)}, not a file")


def refuse_other_kinds(folder: Path) -> None:
    """Raise `BackupUnusable` for a link, FIFO or device in a backup, or a document too large to be read whole."""
    for directory, folders, files in os.walk(folder):
        for name in (*folders, *files):
            mode = Path(directory, name).lstat().st_mode
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                raise _refusal(f"{Path(directory, name)} is {_kind(mode)}, not a file")
            if name.endswith((".json", ".html")) and Path(directory, name).lstat().st_size > _MOST_BYTES:
                raise _refusal(f"{Path(directory, name)} has more than {_MOST_BYTES:,} bytes")


def refuse_names(folder: Path, files: Iterable[str], models: Iterable[str], missing: Iterable[str]) -> None:
    """Raise `BackupUnusable` if a manifest names what no backup has: files, champions, what is missing."""
    for name in files:
        if name not in {DATABASE_NAME, SETTINGS} and not _is_ours(name):
            raise _refusal(f"{folder} names a file that no backup holds: {name!r}")
    for name in models:
        if not _MODEL(name):
            raise _refusal(f"{folder} names a champion that is none: {name!r}")
    for name in missing:
        if not _is_ours(name.removesuffix("/")) and not _MODEL(name.removesuffix("/")):
            raise _refusal(f"{folder} names a missing file that no backup holds: {name!r}")


def refuse_sidecars(database: Path) -> None:
    """Raise `BackupUnusable` if a journal lies beside a database: what is in it would be checked and not restored."""
    for suffix in _SIDECARS:
        path = Path(f"{database}{suffix}")
        if os.path.lexists(path) and path.lstat().st_size:
            message = f"{path} lies beside the database, so {database.name} alone is not all of it"
            hint = f"make one file of them: sqlite3 {database} \"VACUUM INTO 'NEW.db'\", and restore that"
            raise BackupUnusable(message, hint)


def refuse_rows(database: Path) -> None:
    """
    Raise `BackupUnusable` naming row and column if a path or name in a database leads out of the state folder.

    Only a base model may lie elsewhere: nothing is written there.
    """
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            connection.execute("PRAGMA trusted_schema=OFF")
            if (other := other_table(connection)) is not None:
                message = f"{database} is of an unreleased version of dropforge: its table {other} is another one"
                raise BackupUnusable(message, f"it cannot be upgraded; drop the files in {database.parent}/drops again")
            for kind, name in connection.execute("SELECT type, name FROM sqlite_master"):
                if kind not in {"table", "index"}:
                    raise _refusal(f"{database} has a {kind} of its own, {name!r}, which would change rows later")
            for table, column, value in _wrong(connection):
                raise _refusal(f"{database} leads elsewhere: {table}.{column} is {value!r:.200}")
    except sqlite3.DatabaseError as error:
        raise _refusal(f"{database} cannot be read: {error}") from error


def _wrong(connection: sqlite3.Connection) -> Iterator[tuple[str, str, object]]:
    for table, column, is_right in _COLUMNS:
        values = (row[0] for row in connection.execute(f'SELECT DISTINCT "{column}" FROM "{table}"'))  # noqa: S608 - our own words
        yield from ((table, column, value) for value in values if not is_right(value))


def _text(is_right: Callable[[str], object]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and bool(is_right(value))


def _number(value: object) -> bool:
    return isinstance(value, int)


def _base(value: object) -> bool:
    """Say whether a value is none, or a path that says where it leads from the root on."""
    return value is None or (isinstance(value, str) and value.startswith("/") and os.path.abspath(value) == value)  # noqa: PTH100 - no look at the disk


def _place(value: object) -> bool:
    """Say whether a value is the folder of a model of ours, or of a base."""
    return _base(value) or (isinstance(value, str) and _MODEL(value) is not None)


def _snapshot(value: object) -> bool:
    """Say whether a value is none, or a snapshot whose drops lie among the drops."""
    try:
        paths = [drop.get("path") for drop in json.loads(str(value))] if value is not None else []
        return all(path is None or _text(_DROP)(path) for path in paths)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return False


#: Every column that a path is made of, and what it may hold.
_COLUMNS: tuple[tuple[str, str, Callable[[object], bool]], ...] = (
    *((table, "track", _text(_TRACK)) for table in ("drop", "run", "promotion")),
    ("track", "name", _text(_TRACK)),
    ("track", "base_path", _base),
    ("track", "champion_path", _place),
    ("promotion", "model_path", _place),
    ("promotion", "previous_path", _place),
    ("drop", "sha256", _text(re.compile(rf"(?:{_HASH})?").fullmatch)),  # what was not read has none
    ("run", "id", _number),
    ("run", "snapshot", _snapshot),
    ("attempt", "run_id", _number),
    ("attempt", "step", _text(_STEP)),
    ("attempt", "number", _number),
)


def _is_ours(name: str) -> bool:
    """Say whether a name is one that a backup writes: relative, without detours, in a folder that it knows."""
    parts = name.split("/")
    plain = name.isprintable() and all(part not in {"", ".", ".."} for part in parts)
    return plain and _NAMES.fullmatch(name) is not None


def _kind(mode: int) -> str:
    kinds = {stat.S_IFLNK: "a link", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _refusal(message: str) -> BackupUnusable:
    return BackupUnusable(message, _HINT)
