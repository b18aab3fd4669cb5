"""A backup that somebody changed: it is refused before anything is touched, whatever it names, is or holds."""

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from daemon.champions import base_models
from daemon.dispatch.dispatcher import Dispatcher
from daemon.dispatch.spool import LocalExecutor
from daemon.dispatch.step_specs import compose
from daemon.settings.model import Settings
from daemon.state.database import open_engine, transaction
from daemon.state.layout import DATABASE_NAME, LOCK_NAME
from daemon.state.tables import EVERY, Run, Track
from daemon.storage.backup import MANIFEST, make
from daemon.storage.restore import restore
from daemon.system.folders import StateFolder, WorkFolder
from daemon.views.overview import Overview
from pipeline.contract import SPEC_NAME
from pipeline.errors import DropforgeError
from tests.chaos.loop_disk import LoopDisk, needs_root
from tests.daemon.conftest import MODEL_ID, LivedIn, dropforge, lived_in, lived_in_once, new_workspace
from tests.run_owner import spool_of

__all__ = ["dropforge", "lived_in", "lived_in_once", "new_workspace"]

Tamper = Callable[[Path], object]


@pytest.fixture
def kept(lived_in: LivedIn, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a whole backup, with models, in a folder that is nobody else's."""
    (lived_in.settings.state_folder / "models" / MODEL_ID / "model.safetensors").write_bytes(b"weights")
    return make(lived_in.settings, tmp_path_factory.mktemp("elsewhere") / "kept", with_models=True).folder


def everything(folder: Path) -> dict[str, object]:
    """Return what is below a folder, but for the lock that a restore takes first."""

    def found() -> Iterator[tuple[str, object]]:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink():
                yield str(path), path.readlink()
            elif path.name != LOCK_NAME:
                small = path.is_file() and path.stat().st_size < 1 << 20
                yield str(path), path.read_bytes() if small else path.stat().st_mode

    return dict(found())


def change(folder: Path, **fields: Any) -> None:
    value = json.loads((folder / MANIFEST).read_text())
    for name, given in fields.items():
        value[name] = {**value[name], **given} if isinstance(given, dict) else given
    (folder / MANIFEST).write_text(json.dumps(value))


def seen(path: Path) -> list[object]:
    return [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]


def names(name: str) -> Tamper:
    """Let the manifest name a file that is really there, where the name leads to from the backup."""

    def tamper(folder: Path) -> None:
        place = Path(os.path.normpath(folder / name))
        if "\0" not in name and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("# of an attacker\n")
        change(folder, files={name: seen(place) if place.is_file() else [0, hashlib.sha256().hexdigest()]})

    return tamper


def row(statement: str, *values: object) -> Tamper:
    """Change the backup's database, and the manifest with it."""

    def tamper(folder: Path) -> None:
        path = folder / DATABASE_NAME
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("PRAGMA ignore_check_constraints=ON")
            connection.execute(statement, values)
        change(folder, files={DATABASE_NAME: seen(path)})

    return tamper


def instead(name: str, put: Callable[[Path], object]) -> Tamper:
    """Put something else in the place of a file of the backup."""

    def tamper(folder: Path) -> None:
        path = min(folder.glob(name))
        if path.is_dir():
            path.rename(folder.parent / "moved")
        else:
            path.rename(folder.parent / "original")
        put(path)

    return tamper


def write(text: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


def link_to(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(5 << 30)


DEEP = '{"files": ' + "[" * 50_000 + "]" * 50_000 + "}"
TAMPERED: dict[str, tuple[Tamper, str]] = {
    "name ../outside": (names("../outside"), "../outside"),
    "absolute name": (names("/etc/passwd"), "/etc/passwd"),
    "name with NUL": (names("drops/a\0b.jsonl"), "drops/a"),
    "name of the daemon's spool": (names("spool/queue/1-train-1.json"), "spool/queue/1-train-1.json"),
    "drop that no row names": (names(f"drops/{'a' * 64}.jsonl"), f"drops/{'a' * 64}.jsonl"),
    "result of a run that begins again": (names("runs/3/prepare.json"), "runs/3/prepare.json"),
    "checkpoint with a pickle": (names("runs/1/checkpoints/step-1-1/optimizer.pt"), "runs/1/checkpoints"),
    "model that no row names": (names(f"models/{'a' * 64}/model.safetensors"), f"models/{'a' * 64}"),
    "champion ../../elsewhere": (lambda folder: change(folder, champions=["../../elsewhere"]), "../../elsewhere"),
    "drop is a link": (instead("drops/*", link_to("../../original")), "link"),
    "folder is a link": (instead("drops", link_to("../moved")), "link"),
    "verdict is a FIFO": (instead("runs/1/decide.json", os.mkfifo), "FIFO"),
    "manifest is a FIFO": (instead(MANIFEST, os.mkfifo), "FIFO"),
    "manifest is a link": (instead(MANIFEST, link_to("../original")), "link"),
    "manifest of 5 GB": (instead(MANIFEST, make_sparse), MANIFEST),
    "manifest nested 50,000 deep": (instead(MANIFEST, write(DEEP)), MANIFEST),
    "manifest is a list": (instead(MANIFEST, write("[]")), MANIFEST),
    "track.name": (row("UPDATE track SET name = '../../out' WHERE name = 'support'"), "track.name"),
    "track.champion_path": (row("UPDATE track SET champion_path = 'models/../../..'"), "track.champion_path"),
    "track.base_path": (row("UPDATE track SET base_path = '../../out'"), "track.base_path"),
    "promotion.model_path": (row("UPDATE promotion SET model_path = '../..'"), "promotion.model_path"),
    "promotion.previous_path": (row("UPDATE promotion SET previous_path = '/a/../b'"), "promotion.previous_path"),
    "promotion.track": (row("UPDATE promotion SET track = '../x'"), "promotion.track"),
    "drop.sha256": (row("UPDATE \"drop\" SET sha256 = '../../dropforge.toml' WHERE id = 1"), "drop.sha256"),
    "drop.owner": (row("UPDATE \"drop\" SET owner = '/../../x' WHERE id = 1"), "drop.owner"),
    "run.purpose": (row("UPDATE run SET purpose = 'odd' WHERE id = 3"), "purpose_known"),
    "run.purpose, about no drop": (row("UPDATE run SET purpose = 'trial' WHERE id = 3"), "purpose_whole"),
    "run.snapshot": (row("UPDATE run SET snapshot = '[\"../../etc/passwd\"]' WHERE id = 1"), "run.snapshot"),
    "run.snapshot, no drop": (row("UPDATE run SET snapshot = '[1, 999]' WHERE id = 1"), "run.snapshot"),
    "run.snapshot, drops of another track": (row("UPDATE run SET track = 'support' WHERE id = 1"), "run.snapshot"),
    "run.snapshot, deep": (row("UPDATE run SET snapshot = ? WHERE id = 1", "[" * 50_000), "snapshot_typed"),
    "attempt.step": (row("UPDATE attempt SET step = '../../x' WHERE id = 1"), "attempt.step"),
    "attempt.number": (row("UPDATE attempt SET number = '1/../../..' WHERE id = 1"), "number_typed"),
    "trigger": (
        row("CREATE TRIGGER later AFTER UPDATE ON track BEGIN UPDATE promotion SET model_path = '../..'; END"),
        "later",
    ),
    "run.state": (row("UPDATE run SET state = 'odd' WHERE id = 3"), "state_known"),
    "run over by its date": (row("UPDATE run SET ended_at = 1 WHERE id = 3"), "final_has_end"),
    "promotion.kind": (row("UPDATE promotion SET kind = 'odd' WHERE id = 1"), "kind_known"),
    "attempt.started_at": (row(f"UPDATE attempt SET started_at = {-(2**63)} WHERE id = 1"), "started_at_typed"),
    "run.cancel_requested": (row("UPDATE run SET cancel_requested = 7 WHERE id = 1"), "cancel_requested_typed"),
    "drop.rows": (row(f'UPDATE "drop" SET rows = {2**62} WHERE id = 1'), "rows_typed"),
    "drop.new_answers": (row(f'UPDATE "drop" SET new_answers = {2**62} WHERE id = 1'), "new_answers_typed"),
    "drop.answers_accepted": (row('UPDATE "drop" SET answers_accepted = 7 WHERE id = 1'), "answers_accepted_typed"),
    "drop.watch_points": (row("UPDATE \"drop\" SET watch_points = 'x' WHERE id = 1"), "watch_points_typed"),
    "track.watch_since": (row(f"UPDATE track SET watch_since = {2**62}"), "refers to a missing one of run"),
    "no such column": (row("ALTER TABLE event RENAME COLUMN track TO other"), "no such column"),
    "journal beside the database": (
        lambda folder: (folder / f"{DATABASE_NAME}-wal").write_text("rows that would not be put back"),
        "-wal",
    ),
}


def test_a_tampered_backup_is_refused_and_nothing_is_touched(
    lived_in: LivedIn, dropforge: Callable[..., Any], kept: Path
) -> None:
    before = everything(lived_in.folder)
    for number, (case, (tamper, named)) in enumerate(TAMPERED.items()):
        copy = kept.with_name(f"case-{number}") / "kept"
        shutil.copytree(kept, copy)
        tamper(copy)
        outside = everything(copy.parent)
        done = dropforge("restore", copy)
        assert (done.code, done.out) == (1, ""), case
        assert named.encode("unicode_escape").decode() in done.err, case
        assert "hint: " in done.err, case
        assert everything(lived_in.folder) == before, case
        assert everything(copy.parent) == outside, case


def test_a_backup_brings_its_rows_and_nothing_of_its_schema(
    lived_in: LivedIn, dropforge: Callable[..., Any], kept: Path
) -> None:
    for statement in (
        "ALTER TABLE promotion ADD COLUMN later TEXT AS (model_path)",
        "CREATE UNIQUE INDEX evil ON event(kind) WHERE id > 1000",
        "CREATE TABLE more (id INTEGER)",
    ):
        row(statement)(kept)
    with closing(sqlite3.connect(kept / DATABASE_NAME)) as connection, connection:
        connection.execute("PRAGMA writable_schema=ON")
        stricter = "replace(sql, 'PRIMARY KEY (id)', 'PRIMARY KEY (id), CHECK (id < 1000)')"
        connection.execute(f"UPDATE sqlite_master SET sql = {stricter} WHERE name = 'run'")
    change(kept, files={DATABASE_NAME: seen(kept / DATABASE_NAME)}, counts={"more": 0})
    database = lived_in.settings.state_folder / DATABASE_NAME

    def picture() -> list[object]:
        with closing(sqlite3.connect(database)) as connection:
            schema = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
            return [
                schema,
                *(connection.execute(f"SELECT * FROM {name}").fetchall() for name in ("track", "promotion")),
            ]

    before = picture()
    done = dropforge("restore", kept)
    assert (done.code, done.err) == (0, "")
    assert picture() == before


def test_a_restored_run_takes_programs_and_addresses_from_todays_settings(
    lived_in: LivedIn, dropforge: Callable[..., Any], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = {"url": "http://evil/v1", "model": "m", "api_key_env": "PATH"}
    to = "json_set(config, '$.evaluate.vllm', '/tmp/evil', '$.judge', json(?))"
    row(f"UPDATE run SET config = {to} WHERE id = 3", json.dumps(evil))(kept)
    assert dropforge("restore", kept).code == 0
    root = lived_in.settings.state_folder
    engine = open_engine(root / DATABASE_NAME)
    dispatcher = Dispatcher(engine, lived_in.settings, LocalExecutor(spool_of(root)))
    monkeypatch.setattr(dispatcher.upkeep.bases, "problem", lambda _name: None)
    monkeypatch.setattr(base_models, "is_away", lambda _folder: False)
    dispatcher.recover(lived_in.tick())
    dispatcher.tick(lived_in.tick())
    with transaction(engine) as session:
        run = session.get_one(Run, 3)
        assert run.state == "running"
        assert run.config == compose(lived_in.settings, session.get_one(Track, run.track)).model_dump(mode="json")
    (spec,) = [path.read_text() for path in (root / "runs" / "3" / "attempts").glob(f"*/{SPEC_NAME}")]
    assert "evil" not in spec


GARBAGE = ("{", b"\xff\xfe", "[1]")


def garbled(database: Path, table: str, column: str, value: object) -> None:
    with closing(sqlite3.connect(database)) as connection, suppress(sqlite3.IntegrityError), connection:
        connection.execute("PRAGMA ignore_check_constraints=ON")
        connection.execute(f'UPDATE "{table}" SET "{column}" = ?', (value,))


def refusal(settings: Settings, backup: Path) -> str:
    try:
        restore(settings, backup, without_models=True)
    except DropforgeError as error:
        return error.message
    return ""


@pytest.mark.long
def test_garbage_in_any_column_is_refused_or_lets_the_daemon_start(
    lived_in: LivedIn, kept: Path, tmp_path: Path
) -> None:
    settings = lived_in.settings.model_copy(update={"state": str(tmp_path / "state")})
    root, refused, taken, whole = settings.state_folder, 0, [], (kept / DATABASE_NAME).read_bytes()
    columns = [(table.__tablename__, name) for table in EVERY for name in table.model_fields]
    for table, column in columns:
        for value in GARBAGE:
            copy = kept / DATABASE_NAME
            copy.write_bytes(whole)
            garbled(copy, str(table), column, value)
            change(kept, files={DATABASE_NAME: seen(copy)})
            words = refusal(settings, kept)
            if words:
                refused += 1
                assert str(kept) in words
                assert str(table) in words or "its database does not name" in words
                continue
            taken.append(f"{table}.{column} = {value!r}")
            engine = open_engine(root / DATABASE_NAME)
            Dispatcher(engine, settings, LocalExecutor(spool_of(root))).recover(lived_in.tick())
            engine.dispose()
            Overview(StateFolder(root), WorkFolder(root)).runs()
    assert refused > len(columns), taken


def test_a_restore_goes_through_no_link_of_the_state_folder(
    lived_in: LivedIn, dropforge: Callable[..., Any], kept: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root, other = lived_in.settings.state_folder, tmp_path_factory.mktemp("other")
    shutil.rmtree(root / "drops")
    (root / "drops").symlink_to(other)
    done = dropforge("restore", kept)
    assert (done.code, list(other.iterdir())) == (1, [])
    assert f"{root / 'drops'} is a link" in done.err


@needs_root
def test_a_restore_on_a_full_disk_names_the_disk_and_can_be_done_again(
    lived_in: LivedIn, dropforge: Callable[..., Any], kept: Path
) -> None:
    with LoopDisk(lived_in.folder / "loop", 16) as disk:
        state = disk.place / "state"
        state.mkdir()
        with (lived_in.folder / "dropforge.toml").open("r+") as file:
            rest = file.read()
            file.seek(0)
            file.write(f'state = "{state}"\n{rest}')
        disk.fill(leave=32 << 10)
        done = dropforge("restore", kept)
        assert (done.code, done.out) == (1, "")
        assert f"({disk.place}, " in done.err
        assert f"bytes on {disk.place}, then do it again: dropforge restore {kept}" in done.err
        assert not list(state.rglob("*.restore.tmp"))
        disk.free()
        assert dropforge("restore", kept).code == 0
        assert (state / "models" / MODEL_ID / "model.safetensors").read_bytes() == b"weights"
