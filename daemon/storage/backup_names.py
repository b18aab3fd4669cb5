"""
What a backup may name: looked at before any of it is believed, copied or followed.

A backup lies on disks that others write to. Nothing in it may lead out of the state folder: neither a name in the
manifest, nor a file that is none, nor a path in a row that later code writes to, deletes or links.
"""

import json
import os
import sqlite3
import stat
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, create_model
from sqlalchemy import Boolean
from sqlmodel import JSON, SQLModel

from daemon.state.database_file import other_table
from daemon.state.tables import EVERY
from pipeline.errors import DropforgeError

SETTINGS = "settings.json"
#: Largest manifest, verdict or card, in bytes: they are read whole.
_MOST_BYTES = 1 << 28
_HINT = "somebody changed it; use another backup, each is a folder that `dropforge backup` made"
#: The last millisecond of the year 9999: a later time is none, and nothing that is counted comes near it.
_LATEST = 253_402_300_799_999
_HEADLESS = """
SELECT name, champion_generation FROM track WHERE champion_generation IS NOT NULL AND champion_generation NOT IN
    (SELECT generation FROM promotion WHERE promotion.track = track.name AND promotion.state = 'done')
"""
_SIDECARS = ("-journal", "-wal")


def open_regular(path: Path) -> int:
    """
    Open a file of a backup for reading; return its descriptor.

    Raises `DropforgeError` if it is a link, FIFO or device, which are not waited for; `OSError` as `open` does.
    """
    found = path.lstat()
    if stat.S_ISREG(found.st_mode):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
    raise _refusal(f"{path} is {_kind(found.st_mode)}, not a file")


def refuse_other_kinds(folder: Path) -> None:
    """Raise `DropforgeError` for a link, FIFO or device in a backup, or a document too large to be read whole."""
    for directory, folders, files in os.walk(folder):
        for name in (*folders, *files):
            mode = Path(directory, name).lstat().st_mode
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                raise _refusal(f"{Path(directory, name)} is {_kind(mode)}, not a file")
            if name.endswith((".json", ".html")) and Path(directory, name).lstat().st_size > _MOST_BYTES:
                raise _refusal(f"{Path(directory, name)} has more than {_MOST_BYTES:,} bytes")


def refuse_names(folder: Path, names: Iterable[str]) -> None:
    """Raise `DropforgeError` if a manifest names a file outside of the backup."""
    for name in names:
        if not is_below(name.removesuffix("/")):
            raise _refusal(f"{folder} names a file that no backup holds: {name!r}")


def refuse_sidecars(database: Path) -> None:
    """Raise `DropforgeError` if a journal lies beside a database: what is in it would be checked and not restored."""
    for suffix in _SIDECARS:
        path = Path(f"{database}{suffix}")
        if os.path.lexists(path) and path.lstat().st_size:
            message = f"{path} lies beside the database, so {database.name} alone is not all of it"
            hint = f"make one file of them: sqlite3 {database} \"VACUUM INTO 'NEW.db'\", and restore that"
            raise DropforgeError(message, hint)


def refuse_rows(database: Path) -> None:
    """
    Raise `DropforgeError` naming row and column if a value in a database is none that its table's model allows.

    A path leads to a place in the state folder; only a base model may lie elsewhere: nothing is written there.
    """
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            connection.execute("PRAGMA trusted_schema=OFF")
            if (other := other_table(connection)) is not None:
                message = f"{database} is of an unreleased version of dropforge: its table {other} is another one"
                raise DropforgeError(message, f"it cannot be upgraded; drop the files in {database.parent}/drops again")
            for kind, name in connection.execute("SELECT type, name FROM sqlite_master").fetchall():
                if kind not in {"table", "index"}:
                    raise _refusal(f"{database} has a {kind} of its own, {name!r}, which would change rows later")
            for table in EVERY:
                _parse_rows(connection, database, table)
            for track, generation in connection.execute(_HEADLESS).fetchall():
                message = f"track.champion_generation is {generation} for {track}, and no promotion has that"
                raise _refusal(f"{database}: {message}")
    except sqlite3.DatabaseError as error:
        raise _refusal(f"{database} cannot be read: {error}") from error


def _parse_rows(connection: sqlite3.Connection, database: Path, table: type[SQLModel]) -> None:
    columns, name = SQLModel.metadata.tables[str(table.__tablename__)].columns, table.__tablename__
    # Its fields without what SQLAlchemy does at each assignment: 2 us a row instead of 80.
    fields: dict[str, Any] = {key: (field.rebuild_annotation(), None) for key, field in table.model_fields.items()}
    model = create_model(table.__name__, **fields)
    # Closed by name: an error that somebody keeps would keep the cursor, and that the file's lock.
    with closing(connection.execute(f'SELECT rowid, * FROM "{name}"')) as rows:  # noqa: S608 - our own word
        found = [description[0] for description in rows.description][1:]
        for number, *values in rows:
            row = {key: _as_read(columns[key].type, value) for key, value in zip(found, values, strict=True)}
            if (wrong := _wrong(model, row)) is not None:
                key, words = wrong
                raise _refusal(f"{database}, row {number} of {name}: {name}.{key} is {row.get(key)!r:.200}: {words}")


def _wrong(model: type[BaseModel], row: dict[str, object]) -> tuple[str, str] | None:
    """Return the first column of a row with a value that the model does not allow, and what is wrong with it."""
    try:
        model.model_validate(row, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        return str(first["loc"][0]), " ".join(first["msg"].split())
    large = (key for key, value in row.items() if isinstance(value, int) and abs(value) > _LATEST)
    return next(((key, "no number of a time or of rows") for key in large), None)


def _as_read(kind: object, value: object) -> object:
    """Return a value as the program reads it; a text that is no JSON stays one, which its model refuses."""
    if isinstance(kind, JSON) and isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return bool(value) if isinstance(kind, Boolean) and value in {0, 1} else value


def is_below(name: str) -> bool:
    """Return whether a path is relative and has no part `.` or `..`."""
    return name.isprintable() and all(part not in {"", ".", ".."} for part in name.split("/"))


def _kind(mode: int) -> str:
    kinds = {stat.S_IFLNK: "a link", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _refusal(message: str) -> DropforgeError:
    return DropforgeError(message, _HINT)
