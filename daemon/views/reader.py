"""
Read-only access to the state database through the standard library's sqlite3.

SQLAlchemy and the table classes take longer to import than all the rest of `dropforge status`.
"""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

from pydantic import BeforeValidator

from daemon.state.questions import CHAMPIONS
from daemon.system import clock

_BUSY_SECONDS = 30.0

sqlite3.register_converter("JSON", json.loads)


def utc(milliseconds: int | None) -> datetime | None:
    """Convert milliseconds since the epoch to a UTC datetime; `None` stays `None`."""
    return None if milliseconds is None else clock.utc(milliseconds)


#: A datetime field that is validated from the database's milliseconds since the epoch.
Time = Annotated[datetime, BeforeValidator(utc)]


class Row(SimpleNamespace):
    """A database row whose columns are attributes."""

    def __getattr__(self, name: str) -> Any:
        """Raise `sqlite3.OperationalError` for a missing column, with SQLite's own message."""
        raise sqlite3.OperationalError(f"no such column: {name}")


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Open an existing database for reading; queries see one snapshot and return `Row` objects; close it on exit."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    converting = sqlite3.PARSE_DECLTYPES
    opened = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, detect_types=converting)
    with closing(opened) as connection:
        connection.row_factory = _row
        connection.execute("BEGIN")
        yield connection


def champions_of(connection: sqlite3.Connection, track: str) -> list[Any]:
    """Return the promotion rows of a track's champions, oldest first; the last is the present one. Empty if none."""
    return connection.execute(CHAMPIONS, {"track": track}).fetchall()


def newest_rows(
    wanted: dict[str, str | list[str] | None], most: int | None, before: int | None = None
) -> tuple[str, list[object]]:
    """
    Return the end (WHERE to LIMIT) of an SQL query for rows with the `wanted` values, newest first, and its parameters.

    `wanted` maps column names to a value, a list of which any will do, or `None` for any value. The query selects at
    most `most` rows (`None`: all), and only ids below `before` if that is given.
    """
    given = {name: [value] if isinstance(value, str) else value for name, value in wanted.items() if value is not None}
    terms = [f"{name} IN ({', '.join('?' * len(values))})" for name, values in given.items()]
    terms += [] if before is None else ["id < ?"]
    where = f"WHERE {' AND '.join(terms)} " if terms else ""
    end = f"{where}ORDER BY id DESC{'' if most is None else ' LIMIT ?'}"
    return end, [*chain.from_iterable(given.values()), *(value for value in (before, most) if value is not None)]


def _row(cursor: sqlite3.Cursor, values: Sequence[Any]) -> Row:
    return Row(**{column[0]: value for column, value in zip(cursor.description, values, strict=True)})
