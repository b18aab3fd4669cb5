"""
Backups and restores. Run as a script it is another process:

    test_backup.py ACTION FOLDER SCRATCH FIRST:STEP    does ACTION again and again, killed later each time
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import col, select

from daemon.queue import states
from daemon.service import Service
from daemon.settings.load import load
from daemon.settings.model import Settings
from daemon.state.database import open_engine, transaction
from daemon.state.database_file import BACKUPS, DatabaseUnusable, verify
from daemon.state.layout import DATABASE_NAME, LOCK_NAME, RESTORING
from daemon.state.tables import Drop, Event, Run
from daemon.storage.backup import MANIFEST, check, make
from daemon.storage.restore import refuse_half_restored, restore
from daemon.system.processes import FileLock, lock_holder
from pipeline import durable
from pipeline.errors import DropforgeError
from tests import run_owner
from tests.daemon.conftest import MODEL_ID, LivedIn, lines
from tests.slurm.cluster import wait_for

MODEL = f"models/{MODEL_ID}"
#: One of so many calls is cut in the usual run of the tests, from a random one on; all with DROPFORGE_CHAOS=whole.
SAMPLE = 6


@pytest.fixture
def served(lived_in: LivedIn) -> LivedIn:
    """Give the workspace with a history, whose champion has weights."""
    (lived_in.settings.state_folder / MODEL / "model.safetensors").write_bytes(b"weights")
    return lived_in


def rows(settings: Settings, table: type[Any]) -> list[Any]:
    with transaction(open_engine(settings.state_folder / DATABASE_NAME)) as session:
        return list(session.exec(select(table).order_by(col(table.id))))


# --- making one


def test_a_backup_holds_the_database_its_drops_and_its_verdicts(served: LivedIn) -> None:
    made = make(served.settings)
    assert made.folder.parent == served.settings.state_folder / BACKUPS
    kept = {drop.sha256 for drop in rows(served.settings, Drop) if drop.state == "accepted"}
    assert {path.stem for path in (made.folder / "drops").iterdir()} == kept
    assert (made.folder / "runs" / "1" / "decide.json").exists()
    assert not (made.folder / "models").exists()
    assert (made.manifest.champions, made.manifest.missing) == ((MODEL,), ())
    assert check(made.folder) == made.manifest
    assert made.manifest.counts["run"] == 3


def test_a_backup_goes_into_a_folder_that_is_there_and_never_over_anything(served: LivedIn, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    assert make(served.settings, tmp_path / "disk").folder.parent == tmp_path / "disk"
    (tmp_path / "file").touch()
    for place, why in ((tmp_path / "file", "is there already"), (tmp_path / "no" / "such", "no folder above it")):
        with pytest.raises(DropforgeError, match=why):
            make(served.settings, place)


def test_a_backup_with_models_has_that_of_a_win_that_waits_for_approval(served: LivedIn, tmp_path: Path) -> None:
    folder = served.settings.state_folder / "models" / ("5" * 64)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"a win")
    (run,) = [row for row in rows(served.settings, Run) if row.state == "running"]
    ending = run_owner.ending("awaiting_approval", candidate_model_id=folder.name)
    run_owner.finish(served.engine, states.Claim(run.id, run.token), ending, served.tick())
    made = make(served.settings, tmp_path / "kept", with_models=True)
    assert (made.folder / "models" / folder.name / "model.safetensors").read_bytes() == b"a win"
    assert made.manifest.champions == (MODEL,), "nobody needs it to serve"
    assert make(served.settings, tmp_path / "slim").manifest.missing == ()
    shutil.rmtree(folder)
    assert make(served.settings, tmp_path / "late", with_models=True).manifest.missing == (f"models/{folder.name}/",)


def test_a_backup_says_which_drops_are_gone_or_changed(served: LivedIn) -> None:
    first, second = sorted((served.settings.state_folder / "drops").iterdir())[:2]
    first.unlink()
    second.write_bytes(b"something else")
    made = make(served.settings)
    assert set(made.manifest.missing) == {f"drops/{first.name}", f"drops/{second.name}"}


@pytest.mark.parametrize("text", ["", "[1]"])
def test_a_damaged_verdict_stops_neither_backup_nor_restore_and_is_named(
    served: LivedIn, dropforge: Callable[..., Any], tmp_path: Path, text: str
) -> None:
    root, name = served.settings.state_folder, "runs/1/decide.json"
    (root / name).write_text(text)
    with transaction(served.engine) as session:
        session.get_one(Run, 1).outcome = "awaiting_approval"  # its model is looked for, too
    made = dropforge("backup", tmp_path / "kept", "--models")
    assert (made.code, f"missing or changed: {name}\n" in made.out) == (1, True)
    assert check(tmp_path / "kept").missing == (name,)
    assert (tmp_path / "kept" / name).read_text() == text, "what is left of it is kept"
    served.take("late.jsonl", lines("late"))
    done = dropforge("restore", tmp_path / "kept")
    assert (done.code, done.err) == (0, "")
    for words in ("what was there before is in", "default/late.jsonl", f"missing or damaged: {name}\n"):
        assert words in done.out


@pytest.mark.parametrize("place", ["/etc", "runs/../..", "a\0b"])
def test_a_verdict_that_names_places_elsewhere_leads_a_backup_nowhere(
    served: LivedIn, tmp_path: Path, place: object
) -> None:
    (served.folder / "report.json").write_text("{}")
    with transaction(served.engine) as session:
        run = session.get_one(Run, 1)
        run.outcome, run.verdict = "awaiting_approval", {"candidate_model_id": place}
    verdict = {"outcome": "promoted", "report": place, "candidate_model_id": place}
    durable.write_json(served.settings.state_folder / "runs/1/decide.json", verdict)
    manifest = make(served.settings, tmp_path / "kept", with_models=True).manifest
    assert (manifest.missing, [name for name in manifest.files if ".." in name]) == (("runs/1/decide.json",), [])
    assert sorted(path.name for path in (tmp_path / "kept" / "models").iterdir()) == [MODEL_ID]


def test_a_backup_while_the_daemon_commits_all_the_time_ends_and_has_all_that_was_there_when_it_began(
    served: LivedIn,
) -> None:
    with transaction(served.engine) as session:
        session.add(Event(at=1, kind="large", detail={"text": "x" * 30_000_000}))
    ended, written = threading.Event(), [0]

    def commit() -> None:
        until = time.monotonic() + 60
        while not ended.is_set() and time.monotonic() < until:
            with transaction(served.engine) as session:
                session.add(Event(at=1, kind="meanwhile"))
            written[0] += 1

    writer = threading.Thread(target=commit)
    writer.start()
    try:
        wait_for(lambda: written[0])
        acknowledged, made = written[0], make(served.settings)
        assert writer.is_alive()
    finally:
        ended.set()
        writer.join()
    with closing(sqlite3.connect(made.folder / DATABASE_NAME)) as connection:
        (found,) = connection.execute("SELECT count(*) FROM event WHERE kind = 'meanwhile'").fetchone()
    assert found >= acknowledged
    assert verify(made.folder / DATABASE_NAME) == made.manifest.counts


def test_a_second_backup_at_the_same_time_is_refused(served: LivedIn) -> None:
    lock = FileLock(served.settings.state_folder / "backup.lock")
    assert lock.acquire()
    with pytest.raises(DropforgeError, match="another backup"):
        make(served.settings)
    lock.release()


def test_a_damaged_database_gives_no_backup_and_no_leftover(served: LivedIn) -> None:
    path = served.settings.state_folder / DATABASE_NAME
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 20_000)
    with pytest.raises(DatabaseUnusable):
        make(served.settings)
    assert list((served.settings.state_folder / BACKUPS).iterdir()) == []


def test_a_backup_that_changed_is_refused_file_by_file(served: LivedIn, tmp_path: Path) -> None:
    made = make(served.settings, tmp_path / "kept")
    for name in made.manifest.files:
        copy = tmp_path / "copy"
        shutil.copytree(made.folder, copy)
        (copy / name).write_bytes((copy / name).read_bytes()[:-1] + b"?")
        with pytest.raises(DropforgeError, match="damaged"):
            check(copy)
        shutil.rmtree(copy)
    (made.folder / MANIFEST).unlink()
    with pytest.raises(DropforgeError, match="no readable manifest"):
        check(made.folder)


# --- putting it back


def test_a_restore_brings_back_rows_files_and_the_links_to_the_champions(served: LivedIn, dropforge: Any) -> None:
    made = make(served.settings, served.folder / "kept", with_models=True)
    before = [row.model_dump() for table in (Drop, Run, Event) for row in rows(served.settings, table)]
    begun = {"state": "waiting", "token": None, "config": None}
    root = served.settings.state_folder
    shutil.rmtree(root)
    assert dropforge("restore", made.folder).code == 0
    after = [row.model_dump() for table in (Drop, Run, Event) for row in rows(served.settings, table)]
    assert after.pop()["kind"] == "run_interrupted"
    assert after == [{**row, **begun} if row.get("state") == "running" else row for row in before]
    assert (root / MODEL / "model.safetensors").read_bytes() == b"weights"
    links = root / "tracks" / "default"
    assert (links / "champion").resolve() == root / MODEL
    assert (links / "previous").resolve() == (served.folder / "base").resolve()


def test_an_installation_moves_into_a_shared_folder_by_a_backup(served: LivedIn, dropforge: Any) -> None:
    made = make(served.settings, served.folder / "kept", with_models=True)
    with (served.folder / "dropforge.toml").open("a") as file:
        file.write('[executor]\nkind = "slurm"\nshared = "share"\n')
    assert dropforge("restore", made.folder).code == 0
    share = served.folder / "share"
    assert (share / "tracks" / "default" / "champion").resolve() == share / MODEL
    assert (share / MODEL / "model.safetensors").read_bytes() == b"weights"
    kept = {drop.sha256 for drop in rows(served.settings, Drop) if drop.state == "accepted"}
    assert {path.stem for path in (share / "drops").iterdir()} == kept


def test_what_came_after_the_backup_is_put_aside_and_named(served: LivedIn, tmp_path: Path) -> None:
    made = make(served.settings, tmp_path / "kept")
    root = served.settings.state_folder
    served.take("late.jsonl", lines("late"))
    (root / "runs" / "4").mkdir()
    (root / "runs" / "4" / "decide.json").write_text("{}")
    done = restore(served.settings, made.folder)
    assert done.lost == ("default/late.jsonl",)
    assert not (root / "runs" / "4").exists(), "run 4 of the future must not find a verdict under its number"
    assert (done.replaced / "runs" / "4" / "decide.json").exists()
    assert verify(done.replaced / DATABASE_NAME)["drop"] == made.manifest.counts["drop"] + 1
    assert (root / "runs" / "1" / "decide.json").exists(), "what succeeded before the backup stays"
    assert (rows(served.settings, Run)[2].state, rows(served.settings, Run)[2].config) == ("waiting", None)
    served.engine = open_engine(root / DATABASE_NAME)
    assert served.claim().run_id == 3, "it was running and goes on"


def test_a_damaged_database_is_kept_aside_as_it_is_and_replaced(served: LivedIn, tmp_path: Path) -> None:
    made = make(served.settings, tmp_path / "kept")
    path = served.settings.state_folder / DATABASE_NAME
    path.write_bytes(b"no database at all\n" * 500)
    done = restore(served.settings, made.folder)
    assert (done.replaced / DATABASE_NAME).read_bytes().startswith(b"no database")
    counts = made.manifest.counts
    assert verify(path) == {**counts, "event": counts["event"] + 1}, "a run was interrupted"


@pytest.mark.parametrize("name", [LOCK_NAME, "spool/worker.lock"])
def test_no_restore_while_a_daemon_or_a_worker_is_there(served: LivedIn, tmp_path: Path, name: str) -> None:
    made = make(served.settings, tmp_path / "kept")
    place = served.settings.state_folder / name
    place.parent.mkdir(exist_ok=True)
    lock = FileLock(place)
    assert lock.acquire()
    with pytest.raises(DropforgeError, match="works on"):
        restore(served.settings, made.folder)
    lock.release()
    assert not (served.settings.state_folder / BACKUPS).exists(), "nothing was put aside"
    assert lock_holder(served.settings.state_folder / LOCK_NAME) is None, "a daemon can start again"


def test_a_backup_of_a_newer_program_or_without_its_champion_changes_nothing(served: LivedIn, tmp_path: Path) -> None:
    made = make(served.settings, tmp_path / "kept")
    root = served.settings.state_folder
    before = (root / DATABASE_NAME).read_bytes()
    shutil.rmtree(root / MODEL)
    with pytest.raises(DropforgeError, match="neither in the backup nor in"):
        restore(served.settings, made.folder)
    value = json.loads((made.folder / MANIFEST).read_text())
    (made.folder / MANIFEST).write_text(json.dumps({**value, "schema_version": 999}))
    with pytest.raises(DropforgeError, match="another version's schema: 999"):
        restore(served.settings, made.folder, without_models=True)
    assert (root / DATABASE_NAME).read_bytes() == before
    (made.folder / MANIFEST).write_text(json.dumps(value))
    assert restore(served.settings, made.folder, without_models=True).missing == (MODEL,)


def test_no_daemon_starts_on_a_half_restored_folder(served: LivedIn) -> None:
    (served.settings.state_folder / RESTORING).write_text('{"backup": "/kept"}')
    with pytest.raises(DropforgeError) as refused:
        Service(served.settings)
    assert refused.value.hint == "do it again: dropforge restore /kept"


# --- killed anywhere


@pytest.mark.parametrize("action", ["backup", "backup elsewhere", "restore"])
def test_killed_anywhere_it_leaves_all_or_nothing_and_can_be_done_again(
    served: LivedIn, tmp_path_factory: pytest.TempPathFactory, action: str
) -> None:
    if action == "restore":
        make(served.settings, served.folder / "kept", with_models=True)
        served.take("late.jsonl", lines("late"))
    seed = random.randrange(SAMPLE)
    sample = "1:1" if os.environ.get("DROPFORGE_CHAOS") == "whole" else f"{seed + 1}:{SAMPLE}"
    print(f"first cut and step: {sample}; each of them with DROPFORGE_CHAOS=whole")
    argv = [sys.executable, __file__, action, str(served.folder), str(tmp_path_factory.mktemp("cut")), sample]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert int(done.stdout.split()[0]) > 20 / SAMPLE


def cut(action: str, folder: Path, scratch: Path, sample: str) -> int:
    """Do `action` in copies of `folder`, killed at one of its calls that change a file each time; return how often."""
    point, step = (int(part) for part in sample.split(":"))
    cuts = 0
    while True:
        place = scratch / str(point)
        shutil.copytree(folder, place, symlinks=True)
        settings = load(place / "dropforge.toml", {})
        child = os.fork()
        if child == 0:
            kill_at(point)
            act(action, settings)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return cuts
        look_after(action, settings)
        shutil.rmtree(place)
        cuts, point = cuts + 1, point + step


def act(action: str, settings: Settings) -> None:
    if action.startswith("backup"):
        make(settings, elsewhere(action, settings), with_models=True)
    else:
        restore(settings, settings.inbox_folder.parent / "kept")


def elsewhere(action: str, settings: Settings) -> Path | None:
    """Return the folder that backups are put into; `None` for their place in the state folder."""
    if action != "backup elsewhere":
        return None
    folder = settings.inbox_folder.parent / "disk"
    folder.mkdir(exist_ok=True)
    return folder


def look_after(action: str, settings: Settings) -> None:
    """See what a kill left, then do the same again."""
    root = settings.state_folder
    if action.startswith("backup"):
        target = elsewhere(action, settings)
        place = target or root / BACKUPS
        for path in place.glob("[!.]*"):
            check(path)
            shutil.rmtree(path)
        check(make(settings, target).folder)
        assert not list(place.glob(".*")), "leftovers go with the next backup"
        return
    if not (root / RESTORING).exists():
        drops, untouched = verify(root / DATABASE_NAME)["drop"], (root / "runs" / "3").exists()
        assert (drops, untouched) in {(7, True), (6, False)}, "without a mark nothing has begun, or all is done"
    restore(settings, settings.inbox_folder.parent / "kept")
    refuse_half_restored(root)
    assert verify(root / DATABASE_NAME)["drop"] == 6
    assert (root / MODEL / "model.safetensors").read_bytes() == b"weights"
    copies = (root / BACKUPS).glob(f"replaced-*/{DATABASE_NAME}")
    assert 7 in {verify(path)["drop"] for path in copies}, "the database that was replaced is kept"


def kill_at(point: int) -> None:
    """Let this process be killed before its `point`th call that changes a file."""
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count()
            return function(*args, **kwargs)

        return call

    for module, name in (
        (os, "fsync"),
        (os, "rename"),
        (os, "unlink"),
        (os, "mkdir"),
        (os, "rmdir"),
        (os, "pwrite"),
        (shutil, "copyfile"),
        (sqlite3, "connect"),
    ):
        setattr(module, name, before(getattr(module, name)))


if __name__ == "__main__":
    print(cut(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]), "kills")
