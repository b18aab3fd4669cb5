import re
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError
from sqlmodel import select

from daemon.state.database import create, open_engine, open_reader, transaction
from daemon.state.database_file import APPLICATION_ID, BACKUPS, DatabaseUnusable, refuse_network, verify
from daemon.state.tables import Attempt, Event, Run
from pipeline.words import shell_path
from tests.chaos.faults import Death


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place = tmp_path / "a folder, 100% new" / "state.db"
    create(place)
    return place


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    engine = open_engine(path)
    yield engine
    engine.dispose()


def schema(path: Path) -> list[tuple[str, str]]:
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
    connection.close()
    return rows


def start(path: Path) -> None:
    """Do with a database what a daemon does at its start."""
    create(path)
    verify(path, at_start=True)


def by_hand(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


def add_run_with_attempt(engine: Engine) -> None:
    with transaction(engine) as session:
        session.add(Run(track="default", trigger="drop", created_at=1, not_before=1))
        session.flush()
        session.add(Attempt(run_id=1, step="train", number=1, fence="f", started_at=1))


def test_a_creation_that_is_cut_anywhere_has_done_nothing_or_all_and_is_done_at_the_next_start(tmp_path: Path) -> None:
    create(tmp_path / "whole.db")
    wanted = schema(tmp_path / "whole.db")
    for point in count():
        path, left = tmp_path / str(point) / "state.db", iter(range(point))
        died: list[object] = []

        def die_in_time(*_: object, left: Iterator[int] = left, died: list[object] = died) -> None:
            if next(left, None) is None:
                died.append(True)
                raise Death

        event.listen(Engine, "before_cursor_execute", die_in_time)
        with suppress(Death):
            create(path)
        event.remove(Engine, "before_cursor_execute", die_in_time)
        assert schema(path) in ([], wanted), "nothing in between"
        create(path)
        assert schema(path) == wanted
        if not died:
            break
    assert point > 10


@pytest.mark.parametrize(
    ("harm", "words", "hint"),
    [
        ("PRAGMA user_version=999", "has schema 999, and this version of dropforge has", "install the version that"),
        ("PRAGMA application_id=42", "another program", ""),
        (b"this is a letter to my aunt, and not a database at all\n" * 50, "not a database", "backup"),
    ],
)
def test_what_is_no_database_of_this_version_is_refused_and_left_alone(
    path: Path, harm: str | bytes, words: str, hint: str
) -> None:
    verify(path, at_start=True)
    if isinstance(harm, bytes):
        path.write_bytes(harm)
    else:
        by_hand(path, harm)
    before = path.read_bytes()
    with pytest.raises(DatabaseUnusable, match=words) as refused:
        start(path)
    assert hint in refused.value.hint
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


@pytest.mark.parametrize(
    ("statements", "words"),
    [
        (
            ("PRAGMA ignore_check_constraints=ON", "UPDATE run SET state = 'dreaming'"),
            "CHECK constraint failed in run",
        ),
        (("DELETE FROM run",), "a row of attempt refers to a missing one of run"),
    ],
)
def test_rows_that_break_a_rule_are_found_at_the_start_with_the_way_to_restore(
    path: Path, engine: Engine, statements: tuple[str, ...], words: str
) -> None:
    add_run_with_attempt(engine)
    (path.parent / BACKUPS / "dropforge-1").mkdir(parents=True)
    by_hand(path, *statements)
    with pytest.raises(DatabaseUnusable, match=words) as damaged:
        verify(path, at_start=True)
    assert damaged.value.hint.endswith(f"dropforge restore {shell_path(path.parent / BACKUPS / 'dropforge-1')}")


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


def test_every_commit_waits_for_the_disk_foreign_keys_are_on_and_the_file_is_marked_as_ours(engine: Engine) -> None:
    names = ("synchronous", "foreign_keys", "application_id")
    with engine.connect() as connection:
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]
    assert found == [3, 1, APPLICATION_ID]


def test_a_reader_reads_and_cannot_write(path: Path, engine: Engine) -> None:
    with transaction(engine) as session:
        session.add(Event(at=1, kind="seen"))
    reader = open_reader(path)
    with transaction(reader) as session:
        assert [event.kind for event in session.exec(select(Event))] == ["seen"]
    with pytest.raises(OperationalError, match="readonly"), transaction(reader) as session:
        session.add(Event(at=2, kind="forbidden"))
