"""
Refuse a backup that would lead a restore out of the state folder, before anything in it is copied or followed.

A backup lies on disks that others write to. Every name in it is relative and stays below the root, no file in it is a
link or a device, and every row of its database has what its table's model allows, paths above all.
"""

import json
import os
import sqlite3
import stat
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import ValidationError, create_model
from sqlmodel import JSON, SQLModel

from daemon.state.tables import EVERY
from pipeline.errors import DropforgeError

SETTINGS = "settings.json"
#: SQLite's files beside a database that it is writing.
SIDECARS = ("-journal", "-wal", "-shm")
#: Largest manifest, verdict or card, in bytes: they are read whole.
_MOST_BYTES = 1 << 28
_HINT = "somebody changed it; use another backup, each is a folder that `dropforge backup` made"

_HEADLESS = """
SELECT name FROM track WHERE champion_generation IS NOT NULL AND champion_generation NOT IN
    (SELECT generation FROM promotion WHERE promotion.track = track.name AND promotion.state = 'done')
"""


def open_regular(path: Path) -> int:
    """Open a file of a backup for reading. Raises `DropforgeError` if it is no regular file; `OSError` as `open`."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _refusal(f"{path} is not a regular file")
    return fd


def refuse_other_kinds(folder: Path) -> None:
    """Raise `DropforgeError` for a link, FIFO or device in a backup, or a document too large to be read whole."""
    for directory, folders, files in os.walk(folder):
        for path in (Path(directory, name) for name in (*folders, *files)):
            info = path.lstat()
            if not stat.S_ISDIR(info.st_mode) and not stat.S_ISREG(info.st_mode):
                raise _refusal(f"{path} is a link, FIFO or device, not a file")
            if path.suffix in {".json", ".html"} and info.st_size > _MOST_BYTES:
                raise _refusal(f"{path} has more than {_MOST_BYTES:,} bytes")


def refuse_names(folder: Path, names: Iterable[str]) -> None:
    """Raise `DropforgeError` if a manifest names a file outside of the backup."""
    for name in names:
        if not is_below(name):
            raise _refusal(f"{folder} names a file that no backup holds: {name!r}")


def refuse_sidecars(database: Path) -> None:
    """Raise `DropforgeError` if a journal lies beside a database: what is in it would be checked and not restored."""
    for path in (Path(f"{database}{suffix}") for suffix in SIDECARS[:2]):
        if os.path.lexists(path) and path.lstat().st_size:
            message = f"{path} lies beside the database, so {database.name} alone is not all of it"
            hint = f"make one file of them: sqlite3 {database} \"VACUUM INTO 'NEW.db'\", and restore that"
            raise DropforgeError(message, hint)


def refuse_rows(database: Path) -> None:
    """
    Raise `DropforgeError` if a row of a database is none that its table's model allows, or if it has a trigger or view.

    A path leads to a place in the state folder; only a base model may lie elsewhere: nothing is written there.
    """
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            connection.execute("PRAGMA trusted_schema=OFF")
            for kind, name in connection.execute("SELECT type, name FROM sqlite_master").fetchall():
                if kind not in {"table", "index"}:
                    raise _refusal(f"{database} has a {kind} of its own, {name!r}, which would change rows later")
            for table in EVERY:
                _parse_rows(connection, database, table)
            for (track,) in connection.execute(_HEADLESS).fetchall():
                raise _refusal(f"track.champion_generation of {track} in {database} is that of no promotion")
    except sqlite3.DatabaseError as error:
        raise _refusal(f"{database} cannot be read: {error}") from error


def _parse_rows(connection: sqlite3.Connection, database: Path, table: type[SQLModel]) -> None:
    columns, name = SQLModel.metadata.tables[str(table.__tablename__)].columns, table.__tablename__
    as_json = {column.name for column in columns if isinstance(column.type, JSON)}
    # Its fields without what SQLAlchemy does at each assignment: 2 us a row instead of 80.
    fields: dict[str, Any] = {key: (field.rebuild_annotation(), None) for key, field in table.model_fields.items()}
    model = create_model(table.__name__, **fields)
    if any(hidden for *_, hidden in connection.execute(f'PRAGMA table_xinfo("{name}")')):
        raise _refusal(f"table {name} of {database} has a generated column, whose values would change later")
    # Closed by name: an error that somebody keeps would keep the cursor, and that the file's lock.
    with closing(connection.execute(f'SELECT rowid, * FROM "{name}"')) as rows:  # noqa: S608 - our own word
        keys = [description[0] for description in rows.description][1:]
        for number, *values in rows:
            row = dict(zip(keys, values, strict=True))
            try:
                model.model_validate(
                    {key: json.loads(row[key]) if key in as_json and row[key] else row[key] for key in row}
                )
            except (ValueError, TypeError, RecursionError) as error:
                column = f".{error.errors()[0]['loc'][0]}" if isinstance(error, ValidationError) else ""
                message = f"{name}{column} in row {number} of {database} has a value that is not allowed there"
                raise _refusal(message) from error


def is_below(name: str) -> bool:
    """Return whether a path is relative and has no part `.` or `..`."""
    return name.isprintable() and all(part not in {"", ".", ".."} for part in name.split("/"))


def _refusal(message: str) -> DropforgeError:
    return DropforgeError(message, _HINT)
