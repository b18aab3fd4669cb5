import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import CheckConstraint, Engine, inspect
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.schema import CreateIndex
from sqlmodel import SQLModel, select

from daemon import database
from daemon.database import DatabaseUnusable, check, journal_mode, migrate, open_engine, open_reader, transaction
from daemon.tables import Attempt, Drop, Event, Run

THIRD = """
import sqlalchemy as sa
from alembic import op
revision = "0003"
down_revision = "0002"
def upgrade():
    {body}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place = tmp_path / "a folder, 100% new" / "state.db"
    migrate(place)
    return place


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    engine = open_engine(path)
    yield engine
    engine.dispose()


def with_third_step(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    """Give the program one more migration."""
    shutil.copytree(database.MIGRATIONS, folder)
    (folder / "versions" / "0003_third.py").write_text(THIRD.format(body=body))
    monkeypatch.setattr(database, "MIGRATIONS", folder)


def schema(path: Path) -> list[tuple[str, str]]:
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
    connection.close()
    return rows


def revision(path: Path) -> str:
    connection = sqlite3.connect(path)
    (found,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    connection.close()
    return str(found)


def add_run_with_attempt(engine: Engine) -> None:
    with transaction(engine) as session:
        session.add(Run(track="default", trigger="drop", created_at=1, not_before=1))
        session.flush()
        session.add(Attempt(run_id=1, step="train", number=1, fence="f", started_at=1))


def test_the_migrated_schema_is_what_the_tables_say(engine: Engine) -> None:
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), SQLModel.metadata) == []


def test_every_check_and_every_index_is_in_the_migrated_schema(engine: Engine, path: Path) -> None:
    migrated = dict(schema(path))
    found = inspect(engine)
    for table in SQLModel.metadata.sorted_tables:
        checks = {str(rule.sqltext) for rule in table.constraints if isinstance(rule, CheckConstraint)}
        assert {rule["sqltext"] for rule in found.get_check_constraints(table.name)} == checks
        for index in table.indexes:
            assert migrated[str(index.name)] == str(CreateIndex(index).compile(dialect=sqlite.dialect()))


def test_migrating_twice_changes_nothing(path: Path) -> None:
    before = schema(path)
    migrate(path)
    assert schema(path) == before


def test_a_further_migration_is_applied_to_a_database_with_rows(
    path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_run_with_attempt(engine)
    # A batch operation builds the table anew, and its children refer to it.
    body = 'with op.batch_alter_table("run") as batch: batch.alter_column("trigger", new_column_name="cause")'
    with_third_step(monkeypatch, path.parent / "steps", body)
    migrate(path)
    assert revision(path) == "0003"
    with open_engine(path).connect() as connection:
        assert connection.exec_driver_sql("SELECT cause FROM run").scalars().all() == ["drop"]
        assert connection.exec_driver_sql("SELECT run_id FROM attempt").scalars().all() == [1]


def test_a_database_of_the_first_schema_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.db"
    first = tmp_path / "steps"
    shutil.copytree(database.MIGRATIONS, first)
    (first / "versions" / "0002_quarantine.py").unlink()
    with monkeypatch.context() as older:
        older.setattr(database, "MIGRATIONS", first)
        migrate(path)
    connection = sqlite3.connect(path)
    connection.execute(
        "INSERT INTO run (track, state, trigger, created_at, not_before, failures, deaths, cancel_requested, config) "
        "VALUES ('default', 'waiting', 'drop', 1, 1, 2, 1, 0, '{\"a\": 1}')"
    )
    connection.execute(
        "INSERT INTO attempt (run_id, step, number, fence, state, started_at) VALUES (1, 'train', 1, 'f', 'lost', 1)"
    )
    connection.execute(
        'INSERT INTO "drop" (track, role, state, name_bytes, name, sha256, size_bytes, rows, findings, warnings, '
        "received_at, first_run) VALUES ('default', 'train', 'accepted', x'ff', 'a', 'h', 1, 1, 0, 0, 1, 1)"
    )
    connection.commit()
    connection.close()
    migrate(path)
    assert revision(path) == "0002"
    with transaction(open_engine(path)) as session:
        run, attempt, drop = session.get_one(Run, 1), session.get_one(Attempt, 1), session.get_one(Drop, 1)
    assert (run.state, run.failures, run.config, attempt.run_id) == ("waiting", 2, {"a": 1}, 1)
    assert (drop.first_run, drop.name_bytes, drop.quarantined) == (1, b"\xff", 0)


def test_a_migration_that_fails_in_the_middle_leaves_the_database_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = schema(path)
    body = 'op.create_table("half", sa.Column("id", sa.Integer())); raise ArithmeticError("boom")'
    with_third_step(monkeypatch, path.parent / "steps", body)
    with pytest.raises(ArithmeticError, match="boom"):
        migrate(path)
    assert schema(path) == before
    assert revision(path) == "0002"


def test_a_first_migration_that_fails_leaves_an_empty_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_third_step(monkeypatch, tmp_path / "steps", 'raise ArithmeticError("boom")')
    with pytest.raises(ArithmeticError, match="boom"):
        migrate(tmp_path / "state.db")
    assert schema(tmp_path / "state.db") == []


def test_a_migration_that_leaves_rows_without_their_parents_is_undone(
    path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_run_with_attempt(engine)
    with_third_step(monkeypatch, path.parent / "steps", 'op.execute("DELETE FROM run")')
    with pytest.raises(DatabaseUnusable, match="refer to missing ones"):
        migrate(path)
    with transaction(engine) as session:
        assert len(session.exec(select(Run)).all()) == 1


def test_a_database_of_a_newer_program_is_refused_and_left_alone(path: Path, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0999'")
    with pytest.raises(DatabaseUnusable, match="newer dropforge") as refused:
        migrate(path)
    assert "install that version" in refused.value.hint
    assert revision(path) == "0999"


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"this is a letter to my aunt, and not a database at all\n" * 50)
    before = path.read_bytes()
    with pytest.raises(DatabaseUnusable, match="not a database") as refused:
        migrate(path)
    assert "backup" in refused.value.hint
    assert path.read_bytes() == before


def test_a_place_where_no_database_can_be_made_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "state.db").mkdir()
    with pytest.raises(DatabaseUnusable, match="unable to open") as refused:
        migrate(tmp_path / "state.db")
    assert "may write there" in refused.value.hint


def test_damage_is_found_at_the_start(path: Path, engine: Engine) -> None:
    check(engine)
    with transaction(engine) as session:
        session.add_all([Event(at=number, kind="k" * 900) for number in range(400)])
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size // 4))
    with pytest.raises(DatabaseUnusable) as damaged:
        check(engine)
    assert "backup" in damaged.value.hint


def test_rows_that_break_a_rule_are_found_at_the_start(engine: Engine) -> None:
    add_run_with_attempt(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA ignore_check_constraints=ON")
        connection.exec_driver_sql("UPDATE run SET state = 'dreaming'")
    with pytest.raises(DatabaseUnusable, match="CHECK constraint failed in run"):
        check(engine)


def test_a_transaction_holds_the_write_lock_from_its_first_read(path: Path, engine: Engine) -> None:
    other = sqlite3.connect(path, timeout=0, isolation_level=None)
    with transaction(engine) as session:
        session.exec(select(Run)).all()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")
    other.close()


def test_an_exception_takes_the_whole_transaction_back(engine: Engine) -> None:
    def half_done() -> None:
        with transaction(engine) as session:
            session.add(Event(at=1, kind="half_done"))
            session.flush()
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        half_done()
    with transaction(engine) as session:
        assert session.exec(select(Event)).all() == []


def test_rows_can_be_read_after_their_transaction(engine: Engine) -> None:
    with transaction(engine) as session:
        event = Event(at=1, kind="kept")
        session.add(event)
    assert event.kind == "kept"


def test_a_row_cannot_refer_to_a_missing_one(engine: Engine) -> None:
    with pytest.raises(IntegrityError, match="FOREIGN KEY"), transaction(engine) as session:
        session.add(Attempt(run_id=7, step="train", number=1, fence="f", started_at=1))


@pytest.mark.parametrize(
    ("statement", "rule"),
    [
        ("UPDATE run SET state = 'dreaming'", "state_known"),
        ("UPDATE run SET token = 't'", "running_has_token"),
        ("UPDATE run SET ended_at = 5", "final_has_end"),
    ],
)
def test_the_database_itself_refuses_a_run_in_an_impossible_state(engine: Engine, statement: str, rule: str) -> None:
    add_run_with_attempt(engine)
    with pytest.raises(IntegrityError, match=rule), engine.begin() as connection:
        connection.exec_driver_sql(statement)


RUN = "INSERT INTO run (id, track, state, trigger, created_at, not_before, failures, deaths, cancel_requested) VALUES "
ENDED = (
    "INSERT INTO run (id, track, state, trigger, created_at, not_before, ended_at, failures, deaths, cancel_requested) "
    "VALUES "
)
DROP = (
    'INSERT INTO "drop" (track, role, state, name_bytes, name, sha256, size_bytes, rows, findings, warnings, '
    "received_at) VALUES "
)
ATTEMPT = "INSERT INTO attempt (run_id, step, number, fence, state, started_at) VALUES "
PROMOTION = "INSERT INTO promotion (track, run_id, state, generation, model_id, model_path, reason, created_at) VALUES "
SLOT = "INSERT INTO slot (track, due_at, taken_at, outcome) VALUES "
ONE_RUN = RUN + "(1, 'a', 'queued', 'drop', 1, 1, 0, 0, 0)"
RULES = {
    "one open run a track": (ONE_RUN, RUN + "(2, 'a', 'queued', 'drop', 2, 2, 0, 0, 0)", "run.track"),
    "one accepted drop a track and content": (
        DROP + "('a', 'train', 'accepted', x'61', 'a', 'h', 1, 1, 0, 0, 1)",
        DROP + "('a', 'train', 'accepted', x'62', 'b', 'h', 1, 1, 0, 0, 2)",
        "drop.track, drop.role, drop.sha256",
    ),
    "one slot a night": (
        SLOT + "('a', 5, 6, 'queued')",
        SLOT + "('a', 5, 7, 'no_new_data')",
        "slot.track, slot.due_at",
    ),
    "one promotion a run": (
        ENDED
        + "(1, 'a', 'succeeded', 'drop', 1, 1, 2, 0, 0, 0); "
        + PROMOTION
        + "('a', 1, 'done', 1, 'm', 'p', 'r', 1)",
        PROMOTION + "('a', 1, 'done', 2, 'm', 'p', 'r', 1)",
        "promotion.run_id",
    ),
    "one champion a generation": (
        PROMOTION + "('a', NULL, 'done', 1, 'm', 'p', 'r', 1)",
        PROMOTION + "('a', NULL, 'done', 1, 'n', 'q', 's', 1)",
        "promotion.track, promotion.generation",
    ),
    "one open attempt a run": (
        ONE_RUN + "; " + ATTEMPT + "(1, 'train', 1, 'f', 'submitted', 1)",
        ATTEMPT + "(1, 'merge', 1, 'g', 'submitted', 1)",
        "attempt.run_id",
    ),
    "one number an attempt": (
        ONE_RUN + "; " + ATTEMPT + "(1, 'train', 1, 'f', 'lost', 1)",
        ATTEMPT + "(1, 'train', 1, 'g', 'lost', 1)",
        "attempt.run_id, attempt.step, attempt.number",
    ),
    "known states of a drop": ("", DROP + "('a', 'train', 'lost', x'61', 'a', 'h', 1, 1, 0, 0, 1)", "state_known"),
    "known roles of a drop": ("", DROP + "('a', 'exam', 'accepted', x'61', 'a', 'h', 1, 1, 0, 0, 1)", "role_known"),
    "known states of an attempt": (ONE_RUN, ATTEMPT + "(1, 'train', 1, 'f', 'asleep', 1)", "state_known"),
    "known states of a promotion": ("", PROMOTION + "('a', NULL, 'maybe', 1, 'm', 'p', 'r', 1)", "state_known"),
    "no end before the end": ("", ENDED + "(1, 'a', 'queued', 'drop', 1, 1, 9, 0, 0, 0)", "final_has_end"),
    "no run without a token": ("", RUN + "(1, 'a', 'running', 'drop', 1, 1, 0, 0, 0)", "running_has_token"),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_database_itself_keeps_its_rules_against_plain_sql(path: Path, rule: str) -> None:
    before, breach, named = RULES[rule]
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(before)
    with pytest.raises(sqlite3.IntegrityError, match=re.escape(named)):
        connection.execute(breach)
    connection.close()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # The next run opens while one runs, and what was rejected or withdrawn may come again.
        (RUN + "(1, 'a', 'waiting', 'drop', 1, 1, 0, 0, 0)", RUN + "(2, 'a', 'queued', 'drop', 2, 2, 0, 0, 0)"),
        (ONE_RUN, RUN + "(2, 'b', 'queued', 'drop', 2, 2, 0, 0, 0)"),
        (
            DROP + "('a', 'train', 'rejected', x'61', 'a', 'h', 1, 1, 0, 0, 1)",
            DROP + "('a', 'train', 'accepted', x'62', 'b', 'h', 1, 1, 0, 0, 2)",
        ),
        (SLOT + "('a', 5, 6, 'queued')", SLOT + "('b', 5, 6, 'queued')"),
    ],
)
def test_the_rules_forbid_nothing_that_is_right(path: Path, first: str, second: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(first)
    connection.execute(second)
    connection.close()


def test_every_commit_waits_for_the_disk_and_foreign_keys_are_on(engine: Engine) -> None:
    with engine.connect() as connection:
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("synchronous", "foreign_keys")]
    assert found == [3, 1]


def test_a_reader_reads_and_cannot_write(path: Path, engine: Engine) -> None:
    with transaction(engine) as session:
        session.add(Event(at=1, kind="seen"))
    reader = open_reader(path)
    with transaction(reader) as session:
        assert [event.kind for event in session.exec(select(Event))] == ["seen"]
    with pytest.raises(OperationalError, match="readonly"), transaction(reader) as session:
        session.add(Event(at=2, kind="forbidden"))


def test_a_reader_does_not_wait_for_a_writer_that_has_not_committed(path: Path, engine: Engine) -> None:
    reader = open_reader(path)
    with transaction(engine) as session:
        session.add(Event(at=1, kind="unfinished"))
        session.flush()
        with transaction(reader) as reading:
            assert reading.exec(select(Event)).all() == []


def test_reading_before_the_first_start_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnusable, match="no database") as missing:
        open_reader(tmp_path / "state.db")
    assert "dropforge run" in missing.value.hint


@pytest.mark.parametrize(
    ("version", "mode"),
    [
        ((3, 44, 5), "delete"),
        ((3, 44, 6), "wal"),
        ((3, 45, 9), "delete"),
        ((3, 46, 1), "delete"),
        ((3, 50, 6), "delete"),
        ((3, 50, 7), "wal"),
        ((3, 51, 2), "delete"),
        ((3, 51, 3), "wal"),
        ((3, 53, 4), "wal"),
    ],
)
def test_a_write_ahead_log_is_used_only_where_the_library_cannot_corrupt_it(
    version: tuple[int, int, int], mode: str
) -> None:
    assert journal_mode(version) == mode


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_the_journal_mode_is_set_when_the_database_is_migrated(
    path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(database, "journal_mode", lambda _version: mode)
    migrate(path)
    with open_engine(path).connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == mode
