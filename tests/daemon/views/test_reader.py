"""What a reader sees of the database: the writers' rows, from one state of it, and nothing that it could change."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

import daemon
from daemon.state.database import transaction
from daemon.state.tables import Event
from daemon.views.reader import reading


@pytest.fixture
def path(lived_in: Any) -> Path:
    found: Path = lived_in.settings.state_folder / "dropforge.db"
    return found


def test_nothing_can_be_written(path: Path) -> None:
    with reading(path) as base, pytest.raises(sqlite3.OperationalError, match="readonly"):
        base.execute("DELETE FROM event")


def test_all_answers_are_from_one_state_of_the_database(lived_in: Any, path: Path) -> None:
    count = "SELECT count(*) AS number FROM event"
    with reading(path) as base:
        (before,) = base.execute(count)
        with transaction(lived_in.engine) as session:
            session.add(Event(at=1, kind="meanwhile"))
        assert base.execute(count).fetchall() == [before]
    with reading(path) as base:
        assert base.execute(count).fetchone().number == before.number + 1


def test_no_statement_needs_a_newer_sqlite_than_a_supported_python_may_have() -> None:
    folder = Path(daemon.__file__).parent
    # An operator since 3.38; the systems that Python 3.11 is on go back to 3.34. Each would show at its use alone.
    assert [path.name for path in folder.rglob("*.py") if "->>" in path.read_text(encoding="utf-8")] == []
