"""
The state database for those who only read: the standard library's driver, opened read-only.

SQLAlchemy and the classes of the tables take longer to load than all that `dropforge status` does.
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
    """Return a time of the database as people and JSON have it."""
    return None if milliseconds is None else clock.utc(milliseconds)


#: A field of a view that is given as the database has it.
Time = Annotated[datetime, BeforeValidator(utc)]


class Row(SimpleNamespace):
    """A row: each column is an attribute, as in the class of its table."""

    def __getattr__(self, name: str) -> Any:
        """Refuse a column that the database does not have, in the words in which SQLite would."""
        raise sqlite3.OperationalError(f"no such column: {name}")


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Give a connection that cannot write; all that it is asked is answered from one state of the database."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    converting = sqlite3.PARSE_DECLTYPES
    opened = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, detect_types=converting)
    with closing(opened) as base:
        base.row_factory = _row
        base.execute("BEGIN")
        yield base


def champions_of(base: sqlite3.Connection, track: str) -> list[Any]:
    """Return the promotions by which a track's champions came, the base model's first and today's last."""
    return base.execute(CHAMPIONS, {"track": track}).fetchall()


def newest_rows(
    wanted: dict[str, str | list[str] | None], most: int | None, before: int | None = None
) -> tuple[str, list[object]]:
    """
    Return the end of a question for the newest rows whose columns have the `wanted` values, and its values.

    At most `most` rows, and with `before` those of lower numbers.
    """
    given = {name: [value] if isinstance(value, str) else value for name, value in wanted.items() if value is not None}
    terms = [f"{name} IN ({', '.join('?' * len(values))})" for name, values in given.items()]
    terms += [] if before is None else ["id < ?"]
    where = f"WHERE {' AND '.join(terms)} " if terms else ""
    end = f"{where}ORDER BY id DESC{'' if most is None else ' LIMIT ?'}"
    return end, [*chain.from_iterable(given.values()), *(value for value in (before, most) if value is not None)]


def count_rows(base: sqlite3.Connection, table: str, wanted: dict[str, str | list[str] | None], before: int) -> int:
    """Return how many rows with a lower number than `before` have the `wanted` values in their columns."""
    end, values = newest_rows(wanted, None, before)
    return int(base.execute(f'SELECT count(*) AS number FROM "{table}" {end}', values).fetchone().number)  # noqa: S608


def _row(cursor: sqlite3.Cursor, values: Sequence[Any]) -> Row:
    return Row(**{column[0]: value for column, value in zip(cursor.description, values, strict=True)})
