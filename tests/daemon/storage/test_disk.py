"""Room on the disk: what a run is said to need compared with what it takes, the low-water mark."""

import errno
import json
import os
import shutil
import sqlite3
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from sqlmodel import select

from daemon.dispatch.dispatcher import Dispatcher
from daemon.dispatch.spool import LocalExecutor
from daemon.dispatch.upkeep import Upkeep
from daemon.messages.texts import text_of
from daemon.queue import run_queue, states
from daemon.queue.attempt_ends import Then
from daemon.settings.load import load
from daemon.settings.model import DiskSettings, Settings
from daemon.state.database import create, open_engine, transaction
from daemon.state.states import RunState
from daemon.state.tables import Event, Run
from daemon.state.troubles import Troubles
from daemon.storage.disk import Disk, is_full
from daemon.storage.disk_estimate import CHECKPOINTS, needed_bytes
from pipeline.config import TrainConfig
from pipeline.contract import Attempt
from pipeline.errors import DropforgeError, is_disk_full
from pipeline.train import checkpoints
from tests import run_owner
from tests.made_artifacts import run_config
from tests.prepared_rows import write_rows
from tests.run_owner import add_drop, spool_of

NOW = 1_764_000_000_000
GB = 10**9


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the disk say that it has so many bytes free."""
    answer = namedtuple("answer", ("f_bavail", "f_frsize"))  # noqa: PYI024 - what os.statvfs gives, for two of its fields

    def say(size: int) -> None:
        monkeypatch.setattr(os, "statvfs", lambda _path: answer(size, 1))

    return say


def disk(folder: Path, low: int = GB) -> Disk:
    limits = DiskSettings(low_water_bytes=low)
    return Disk(Settings(state=str(folder), disk=limits))


# --- errors


def failed_write(folder: Path) -> BaseException:
    """Let SQLite run into a limit of its own, which is the same to it as a full disk."""
    connection = sqlite3.connect(folder / "small.db", isolation_level=None)
    connection.execute("PRAGMA max_page_count = 2")
    connection.execute("CREATE TABLE t (x)")
    try:
        while True:
            connection.execute("INSERT INTO t VALUES (zeroblob(4000))")
    except sqlite3.Error as error:
        return error
    finally:
        connection.close()


def test_a_full_disk_is_known_in_every_form_in_which_it_is_told(tmp_path: Path) -> None:
    enospc = OSError(errno.ENOSPC, "No space left on device")
    wrapped = ValueError("cannot save")
    wrapped.__cause__ = enospc
    hidden = RuntimeError("could not close the file")
    hidden.__context__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    torch = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 83392 vs 83284")
    for error in (enospc, wrapped, hidden, torch, Exception("IoError(Os { code: 28, kind: StorageFull })")):
        assert is_disk_full(error), error
        assert is_full(error), error
    assert is_full(failed_write(tmp_path))
    assert is_full(OperationalError("INSERT", {}, failed_write(tmp_path / "..")))
    for error in (OSError(errno.EIO, "I/O error"), sqlite3.OperationalError("database is locked"), ValueError("28")):
        assert not is_full(error), error


# --- what a run needs


def test_what_training_and_merging_leave_is_within_what_was_said_and_not_far_from_it(
    tiny: Any, tiny_llama: Path, tmp_path: Path, make_attempt: Callable[..., Attempt]
) -> None:
    from pipeline.merge.step import merge  # noqa: PLC0415 - the steps load torch
    from pipeline.train.step import train  # noqa: PLC0415

    config = run_config(
        tiny_llama,
        train=TrainConfig(
            **{**tiny.settings(), "quantization": "auto", "method": "galore", "epochs": 1.0, "checkpoint_minutes": 1e-6}
        ),
    )
    rows = tiny.rows(64, seed=1)
    dataset = write_rows(tmp_path, rows[:40], rows[40:])
    trained = make_attempt("train", config=config, inputs={"prepare": dataset})
    adapter = train(trained)
    merged = make_attempt("merge", config=config, inputs={"prepare": dataset, "train": adapter})
    merge(merged)
    needs = needed_bytes(config)
    kept = size_of(tmp_path / "runs/1/checkpoints")
    assert checkpoints.KEPT + 1 == CHECKPOINTS, "one more is there while it is written"
    taken = kept * CHECKPOINTS // checkpoints.KEPT + size_of(trained.folder)
    assert 0.6 * taken < needs["train"] - (1 << 20) < 1.3 * taken, (needs, taken)
    model = size_of(merged.folder / "model")
    assert model <= needs["merge"] <= 1.1 * model + (1 << 20)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- the mark


def test_a_run_must_fit_beside_the_mark_and_one_in_hand_without_it(tmp_path: Path, free: Callable[[int], None]) -> None:
    needs = {"train": 2 * GB, "merge": GB, "evaluate": 0}
    free(4 * GB)
    disk(tmp_path).require(needs)
    free(4 * GB - 1)
    disk(tmp_path).require(needs, margin=False)
    with pytest.raises(DropforgeError, match=r"it needs 3.0 GB beside the 1.0 GB of .* \(train 2.0 GB, merge 1.0 GB\)"):
        disk(tmp_path).require(needs)
    free(3 * GB - 1)
    with pytest.raises(DropforgeError, match=r"it needs 3.0 GB \("):
        disk(tmp_path).require(needs, margin=False)


# --- the queue and the dispatcher


@pytest.fixture
def dispatcher(tmp_path: Path, tiny_llama: Path, free: Callable[[int], None]) -> Dispatcher:
    """A dispatcher with one queued run and plenty of room."""
    free(100 * GB)
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    settings = Settings(state=str(tmp_path / "state"), base_model=str(base), run_after_quiet_seconds=0)
    create(settings.state_folder / "dropforge.db")
    engine = open_engine(settings.state_folder / "dropforge.db")
    made = Dispatcher(engine, settings, LocalExecutor(spool_of(settings.state_folder)))
    with transaction(engine) as session:
        run_queue.enqueue(session, "default", "drop", NOW, NOW)
        add_drop(session)
    made.recover(NOW)
    return made


def only_run(dispatcher: Dispatcher) -> Run:
    with transaction(dispatcher._engine) as session:
        return session.exec(select(Run)).one()


def test_a_run_without_room_stays_queued_or_waiting_with_the_reason_and_goes_on_when_there_is(
    dispatcher: Dispatcher, free: Callable[[int], None]
) -> None:
    free(GB + 1_000_000)
    dispatcher.tick(NOW)
    run = only_run(dispatcher)
    assert run.state == RunState.QUEUED
    assert "has no room for the run: it needs" in str(run.error)
    assert "dropforge gc --dry-run" in str(run.hint)
    free(100 * GB)
    dispatcher.tick(run.not_before)
    assert (only_run(dispatcher).state, only_run(dispatcher).error) == (RunState.RUNNING, None)
    dispatcher.abandon(run.not_before)
    free(GB + 1_000_000)
    dispatcher.tick(run.not_before)
    run = only_run(dispatcher)
    assert (run.state, run.failures, run.deaths) == (RunState.WAITING, 0, 0)
    assert "has no room for the run" in str(run.error)


def test_under_the_mark_no_run_is_claimed_and_the_daemon_says_why_with_one_event_each_way(
    dispatcher: Dispatcher, free: Callable[[int], None]
) -> None:
    for size in (GB - 1, 10):
        free(size)
        dispatcher.tick(NOW)
        assert only_run(dispatcher).state == RunState.QUEUED
        assert "disk.low_water_bytes" in dispatcher.describe()
    for size in (100 * GB, 100 * GB):
        free(size)
        dispatcher.tick(NOW)
    assert only_run(dispatcher).state == RunState.RUNNING
    with transaction(dispatcher._engine) as session:
        kinds = [event.kind for event in session.exec(select(Event)).all() if event.kind.startswith("disk_")]
    assert kinds == ["disk_low", "disk_has_room"]


@pytest.mark.parametrize("drops_claim", [True, False], ids=["waiting", "between steps"])
def test_a_run_whose_base_was_damaged_waits_and_holds_up_nobody(dispatcher: Dispatcher, drops_claim: bool) -> None:
    weights = Path(dispatcher._settings.base_model) / "model.safetensors"
    if drops_claim:
        dispatcher.tick(NOW)
        dispatcher.abandon(NOW)
        weights.write_bytes(b"cut")
        dispatcher.tick(NOW)
    else:
        claim = dispatcher._claimer._claim_next(NOW, {}, {})
        assert claim is not None
        dispatcher._claims[claim.run_id] = claim
        weights.write_bytes(b"cut")
        dispatcher.tick(NOW)
    run = only_run(dispatcher)
    assert (run.state, run.failures, run.deaths, dispatcher.idle) == (RunState.WAITING, 0, 0, True)
    assert "shorter than its header" in str(run.error)
    assert run.not_before > NOW


def test_a_step_that_filled_the_disk_lets_its_run_wait_uncounted_and_its_waste_is_gone(dispatcher: Dispatcher) -> None:
    dispatcher.tick(NOW)
    root = dispatcher._root
    attempt = root / "runs/1/attempts/prepare-1"
    (attempt / "part").mkdir()
    (attempt / "part/rows").write_text("x")
    spec = json.loads((attempt / "spec.json").read_text())
    words = {"message": "the disk is full", "hint": "free some room"}
    result = {"key": "1-prepare-1", "fence": spec["fence"], "status": "failed", "exit_code": 74, "error": words}
    (attempt / "result.json").write_text(json.dumps(result))
    (root / "spool/queue/1-prepare-1.json").unlink()
    dispatcher.tick(NOW)
    run = only_run(dispatcher)
    assert (run.state, run.failures, run.deaths, run.error) == (RunState.WAITING, 0, 0, "the disk is full")
    assert run.not_before > NOW
    assert {path.name for path in attempt.iterdir()} == {"spec.json", "result.json"}


@pytest.mark.parametrize(("after", "wait"), [(0, 30_000), (90_000, 90_000), (86_400_000, 600_000)])
def test_a_run_that_cannot_go_on_is_tried_less_often_the_longer_it_waits(
    dispatcher: Dispatcher, after: int, wait: int
) -> None:
    dispatcher.tick(NOW)
    claim = states.Claim(1, str(only_run(dispatcher).token))
    run_owner.leave(dispatcher._engine, claim, NOW + after, Then.POSTPONE)
    assert only_run(dispatcher).not_before == NOW + after + wait


def test_status_says_how_much_room_there_is_and_what_stops_for_want_of_it(
    lived_in: Any, dropforge: Callable[..., Any], free: Callable[[int], None]
) -> None:
    free(5 * GB)
    assert "disk: 5.0 GB free\n" in dropforge("status").out
    assert dropforge("status", "--json").json["disk"] == {
        "free_bytes": 5 * GB,
        "low_water_bytes": GB,
        "shortage": None,
    }
    free(GB - 1)
    assert "no run begins and files stay in the inbox until there is room" in dropforge("status").out
    assert "1000 MB free" in dropforge("status", "--json").json["disk"]["shortage"]
    assert lived_in.settings.disk.low_water_bytes == GB


@pytest.mark.parametrize("full", [".dropforge", "shared"])
def test_status_and_the_message_of_low_disk_have_the_fuller_of_two_disks(
    lived_in: Any, dropforge: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    shared = lived_in.folder / "shared"
    shared.mkdir()
    with (lived_in.folder / "dropforge.toml").open("a") as file:
        file.write(f'[executor]\nshared = "{shared}"\n')
    sizes = {".dropforge": 5 * GB, "shared": 5 * GB, full: GB // 2}
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=sizes[path.name], f_frsize=1))
    assert dropforge("status", "--json").json["disk"]["free_bytes"] == GB // 2
    settings = load(lived_in.folder / "dropforge.toml", {})
    assert Upkeep(lived_in.engine, settings, Troubles()).is_disk_low(NOW)
    with transaction(lived_in.engine) as session:
        low = text_of(session, session.exec(select(Event).where(Event.kind == "disk_low")).one())
    assert low is not None
    assert low.title == "[dropforge] LOW DISK: 500 MB free"
