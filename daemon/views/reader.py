"""
Read-only access to a workspace: to its work folder, and to its database through the standard library's sqlite3.

SQLAlchemy and the table classes take longer to import than all the rest of `dropforge status`.
"""

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from itertools import chain
from pathlib import Path
from sqlite3 import Connection
from types import SimpleNamespace
from typing import Annotated, Any, Self, TypeVar

from pydantic import BeforeValidator

from daemon.settings.model import HookSettings, Settings
from daemon.state.database_file import DatabaseUnusable, in_words, open_file
from daemon.state.layout import DATABASE_NAME
from daemon.system import clock
from daemon.system.folders import StateFolder, WorkFolder
from pipeline.errors import DropforgeError

T = TypeVar("T")

sqlite3.register_converter("JSON", json.loads)


class NotThere(DropforgeError):
    """The requested run, drop, track, log, report, entry or page does not exist; 404 on the web page."""


def utc(milliseconds: int | None) -> datetime | None:
    """Convert milliseconds since the epoch to a UTC datetime; `None` stays `None`."""
    return None if milliseconds is None else clock.utc(milliseconds)


#: A datetime field that is validated from the database's milliseconds since the epoch.
Time = Annotated[datetime, BeforeValidator(utc)]


class Reader:
    """
    Reads one workspace; neither its folders nor the database need exist.

    Without them methods return empty results. They raise `DatabaseUnusable` if the database cannot be read.
    """

    def __init__(
        self, state_folder: StateFolder, work_folder: WorkFolder, hooks: Mapping[str, HookSettings] | None = None
    ) -> None:
        """Use the database in `state_folder`, the runs in `work_folder`, and `hooks` by track; open nothing yet."""
        self.state, self.folder, self._hooks = state_folder, work_folder, hooks or {}

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return a reader of the folders of `settings`."""
        hooks = {name: settings.track(name).hooks for name in settings.track_names}
        return cls(settings.state_folder, settings.work_folder, hooks)

    def read(self, question: Callable[[Connection], list[T]]) -> list[T]:
        """
        Return `question(connection)`, called with a read-only connection in one transaction.

        Its rows have their columns as attributes, JSON parsed, times in ms since the epoch. Returns `[]` if there is no
        database or no table yet. Raises `DatabaseUnusable` on any other error of SQLite.
        """
        path = self.state / DATABASE_NAME
        if not path.exists():
            return []
        try:
            with reading(path) as reader:
                return question(reader)
        except sqlite3.DatabaseError as error:
            if "no such table" in str(error):
                return []  # the first daemon is about to make them
            raise in_words(error, path) or DatabaseUnusable(
                f"the state database cannot be read: {error}",
                "see whether this user may read it; the daemon's log says more",
            ) from error

    def rows(self, question: str, *values: object, **named: object) -> list[Any]:
        """
        Return the rows of an SQL query, as `read` gives them; empty or raises as `read`.

        Parameters are either positional or named.
        """
        return self.read(lambda reader: reader.execute(question, named or values).fetchall())

    def each(self, make: Callable[[Connection, Any], T], question: str, values: Sequence[object] = ()) -> list[T]:
        """Return `make(connection, row)` for each row of a query, in one transaction; empty or raises as `read`."""
        return self.read(lambda reader: [make(reader, row) for row in reader.execute(question, values).fetchall()])


@contextmanager
def reading(path: Path) -> Iterator[Connection]:
    """Yield a read-only connection in one transaction; its rows have columns as attributes. Raises `sqlite3.Error`."""
    with closing(open_file(path, detect_types=sqlite3.PARSE_DECLTYPES)) as connection:
        connection.row_factory = _row
        connection.execute("BEGIN")
        yield connection


def newest_rows(
    wanted: dict[str, str | list[str] | None], most: int | None, before: int | None = None
) -> tuple[str, list[object]]:
    """
    Return the end (WHERE to LIMIT) of an SQL query for rows with the `wanted` values, newest first, and its parameters.

    `wanted` maps column names to a value, a list of allowed values, or `None` for any value. The query selects at most
    `most` rows (`None`: all), and only ids below `before` if that is given.
    """
    given = {name: [value] if isinstance(value, str) else value for name, value in wanted.items() if value is not None}
    terms = [f"{name} IN ({', '.join('?' * len(values))})" for name, values in given.items()]
    terms += [] if before is None else ["id < ?"]
    where = f"WHERE {' AND '.join(terms)} " if terms else ""
    end = f"{where}ORDER BY id DESC{'' if most is None else ' LIMIT ?'}"
    return end, [*chain.from_iterable(given.values()), *(value for value in (before, most) if value is not None)]


def _row(cursor: sqlite3.Cursor, values: Sequence[Any]) -> SimpleNamespace:
    return SimpleNamespace(**{column[0]: value for column, value in zip(cursor.description, values, strict=True)})
