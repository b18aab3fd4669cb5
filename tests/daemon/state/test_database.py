import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError
from sqlmodel import select

from daemon.state import database, database_file
from daemon.state.database import (
    migrate,
    newest_revision,
    open_engine,
    open_reader,
    transaction,
)
from daemon.state.database_file import (
    BACKUPS,
    DatabaseUnusable,
    refuse_network,
    verify,
)
from daemon.state.tables import Attempt, Event, Run

#: One more migration than the program has.
NEXT = """
import sqlalchemy as sa
from alembic import op
revision = "0002"
down_revision = "0001"
def upgrade():
    {body}
"""
#: Builds a table anew by hand, though others refer to it; each line is a statement.
REBUILD = """
    op.execute("CREATE TABLE new AS SELECT *, 'seen' AS note FROM run")
    op.drop_table("run")
    op.create_table("run", sa.Column("id", sa.Integer(), primary_key=True), sa.Column("note", sa.String()))
    op.execute("INSERT INTO run SELECT id, note FROM new")
    op.drop_table("new")
    op.create_index("run_notes", "run", ["note"])
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


def steps_with_next(folder: Path, body: str) -> Path:
    """Return a folder of migrations: the program's, and one more."""
    shutil.copytree(database.MIGRATIONS, folder)
    (folder / "versions" / "0002_next.py").write_text(NEXT.format(body=body))
    return folder


def with_next_step(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    """Give the program one more migration."""
    monkeypatch.setattr(database, "MIGRATIONS", steps_with_next(folder, body))


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


def test_migrating_twice_changes_nothing(path: Path) -> None:
    before = schema(path)
    migrate(path)
    assert schema(path) == before


def rows_of(path: Path) -> dict[str, list[dict[str, object]]]:
    """Return every row of every table but Alembic's, by column."""
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = {
        name: [dict(row) for row in connection.execute(f'SELECT * FROM "{name}" ORDER BY 1')]
        for name in tables
        if name != "alembic_version"
    }
    connection.close()
    return found


def test_a_further_migration_is_applied_to_a_database_with_rows(
    path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_run_with_attempt(engine)
    before = rows_of(path)
    # A batch operation builds the table anew, and its children refer to it.
    body = 'with op.batch_alter_table("run") as batch: batch.alter_column("trigger", new_column_name="cause")'
    with_next_step(monkeypatch, path.parent / "steps", body)
    migrate(path)
    assert revision(path) == newest_revision() == "0002"
    (run,) = before["run"]
    run["cause"] = run.pop("trigger")
    assert rows_of(path) == before
    verify(path, at_start=True)


def test_a_damaged_database_is_not_upgraded(path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    add_run_with_attempt(engine)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("DELETE FROM run WHERE id = 1")
    connection.close()
    before = path.read_bytes()
    with_next_step(monkeypatch, path.parent / "steps", REBUILD)
    with pytest.raises(DatabaseUnusable, match="refers to a missing one of run") as refused:
        migrate(path)
    assert "dropforge restore" in refused.value.hint
    assert path.read_bytes() == before


def test_killed_anywhere_a_creation_or_migration_has_done_nothing_or_all_and_is_done_at_the_next_start(
    path: Path, engine: Engine, tmp_path: Path
) -> None:
    add_run_with_attempt(engine)
    engine.dispose()
    command = [sys.executable, __file__, str(path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(int(kills) > 10 for kills in done.stdout.splitlines()[-1].split())


def cut_migration(original: Path | None, scratch: Path) -> int:
    """Migrate again and again, killed before the first statement, then before the second, …; return how often."""
    scratch.mkdir()

    def begin(path: Path) -> Path:
        if original is not None:
            shutil.copy(original, path)
        return path

    old, rows = (schema(original), rows_of(original)) if original is not None else ([], {"run": []})
    whole = begin(scratch / "whole.db")
    migrate(whole)
    wanted = schema(whole)
    for point in count(1):
        (scratch / str(point)).mkdir()
        path = begin(scratch / str(point) / "state.db")
        child = os.fork()
        if child == 0:
            seen = 0

            def die_in_time(*_: object) -> None:
                nonlocal seen
                seen += 1
                if seen == point:  # noqa: B023 - called before the next turn
                    os.kill(os.getpid(), signal.SIGKILL)

            event.listen(Engine, "before_cursor_execute", die_in_time)
            migrate(path)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        after_kill = schema(path)
        assert after_kill in (old, wanted), "nothing in between"
        if after_kill == old and original is not None:
            assert rows_of(path) == rows
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            assert after_kill == wanted
            return point - 1
        migrate(path)
        assert schema(path) == wanted
        assert [row["id"] for row in rows_of(path)["run"]] == [row["id"] for row in rows["run"]]
    raise AssertionError


def test_a_migration_that_leaves_rows_without_their_parents_is_undone(
    path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_run_with_attempt(engine)
    with_next_step(monkeypatch, path.parent / "steps", 'op.execute("DELETE FROM run")')
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


def test_damage_is_found_at_the_start(path: Path, engine: Engine) -> None:
    verify(path, at_start=True)
    with transaction(engine) as session:
        session.add_all([Event(at=number, kind="k" * 900) for number in range(400)])
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size // 4))
    with pytest.raises(DatabaseUnusable) as damaged:
        verify(path, at_start=True)
    assert "backup" in damaged.value.hint


def test_rows_that_break_a_rule_are_found_at_the_start(path: Path, engine: Engine) -> None:
    add_run_with_attempt(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA ignore_check_constraints=ON")
        connection.exec_driver_sql("UPDATE run SET state = 'dreaming'")
    with pytest.raises(DatabaseUnusable, match="CHECK constraint failed in run"):
        verify(path, at_start=True)


def test_rows_that_refer_to_missing_ones_are_found_at_the_start_with_the_way_to_restore(
    path: Path, engine: Engine
) -> None:
    add_run_with_attempt(engine)
    (path.parent / BACKUPS / "dropforge-1").mkdir(parents=True)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("DELETE FROM run")
    connection.close()
    with pytest.raises(DatabaseUnusable, match="a row of attempt refers to a missing one of run") as damaged:
        verify(path, at_start=True)
    assert damaged.value.hint.endswith(f"dropforge restore {path.parent / BACKUPS / 'dropforge-1'}")


def test_a_database_of_another_program_is_not_worked_on(path: Path) -> None:
    verify(path, at_start=True)
    connection = sqlite3.connect(path, isolation_level=None)
    assert connection.execute("PRAGMA application_id").fetchone() == (database_file.APPLICATION_ID,)
    connection.execute("PRAGMA application_id=42")
    connection.close()
    with pytest.raises(DatabaseUnusable, match="another program"):
        verify(path, at_start=True)


MOUNTS = """\
21 1 999:1 / / rw,relatime - ext4 /dev/sda1 rw
22 21 999:2 / {share} rw,relatime shared:7 - {kind} server:/export rw
23 22 999:3 / {share}/local\\040disk rw - xfs /dev/sdb1 rw
"""


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_a_state_folder_on_a_network_file_system_is_refused(tmp_path: Path, kind: str) -> None:
    share = tmp_path / "share"
    (share / "local disk").mkdir(parents=True)
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.format(share=share, kind=kind))
    with pytest.raises(DatabaseUnusable, match=re.escape(f"network file system ({kind})")) as refused:
        refuse_network(share / "not yet" / "there", mounts)
    assert "local disk" in refused.value.hint
    refuse_network(share / "local disk", mounts)
    refuse_network(tmp_path, mounts)


def test_a_transaction_holds_the_write_lock_from_its_first_read(path: Path, engine: Engine) -> None:
    other = sqlite3.connect(path, timeout=0, isolation_level=None)
    with transaction(engine) as session:
        session.exec(select(Run)).all()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")
    other.close()


RUN = "INSERT INTO run (id, track, state, trigger, created_at, not_before, failures, deaths, cancel_requested) VALUES "
DROP = (
    'INSERT INTO "drop" (track, role, state, name_bytes, name, sha256, size_bytes, rows, findings, warnings, '
    "received_at) VALUES "
)
ATTEMPT = "INSERT INTO attempt (run_id, step, number, fence, state, started_at) VALUES "
PROMOTION = "INSERT INTO promotion (track, run_id, generation, model_id, model_path, reason, created_at) VALUES "
ONE_RUN = RUN + "(1, 'a', 'queued', 'drop', 1, 1, 0, 0, 0)"
RULES = {
    "one open run a track": (ONE_RUN, RUN + "(2, 'a', 'queued', 'drop', 2, 2, 0, 0, 0)", "run.track"),
    "one accepted drop a track and content": (
        DROP + "('a', 'train', 'accepted', x'61', 'a', 'h', 1, 1, 0, 0, 1)",
        DROP + "('a', 'train', 'accepted', x'62', 'b', 'h', 1, 1, 0, 0, 2)",
        "drop.track, drop.role, drop.sha256",
    ),
    "one champion a generation": (
        PROMOTION + "('a', NULL, 1, 'm', 'p', 'r', 1)",
        PROMOTION + "('a', NULL, 1, 'n', 'q', 's', 1)",
        "promotion.track, promotion.generation",
    ),
    "one open attempt a run": (
        ONE_RUN + "; " + ATTEMPT + "(1, 'train', 1, 'f', 'submitted', 1)",
        ATTEMPT + "(1, 'merge', 1, 'g', 'submitted', 1)",
        "attempt.run_id",
    ),
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


def test_reading_before_the_first_start_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnusable, match="no database") as missing:
        open_reader(tmp_path / "state.db")
    assert "dropforge run" in missing.value.hint


if __name__ == "__main__":
    created = cut_migration(None, Path(sys.argv[2], "created"))
    database.MIGRATIONS = steps_with_next(Path(sys.argv[2], "steps"), REBUILD)
    print(created, cut_migration(Path(sys.argv[1]), Path(sys.argv[2], "upgraded")))
