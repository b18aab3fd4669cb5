"""The daemon's own order of things, on a real state folder; whole daemons run in tests/e2e."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from structlog.testing import capture_logs

from daemon import service
from daemon.champions.hooks.commands import Command
from daemon.inbox.watcher import make_inbox
from daemon.queue.states import Claim
from daemon.service import Service
from daemon.settings.load import load
from daemon.settings.model import Settings
from daemon.settings.sections import ExecutorSettings
from daemon.state.database import transaction
from daemon.state.database_file import DatabaseUnusable
from daemon.state.layout import LEASE_NAME, WORKER_LOCK
from daemon.state.ownership import ShareGone
from daemon.state.tables import Track
from daemon.system.processes import FileLock
from daemon.views.attention import attention
from daemon.views.overview import Overview
from pipeline.errors import DropforgeError
from tests.chaos.house import START, Daemon, build, records
from tests.daemon.champions.test_approval import House


@pytest.fixture
def plain(tmp_path: Path) -> Settings:
    (tmp_path / "inbox").mkdir()
    return Settings(inbox=str(tmp_path / "inbox"), state=str(tmp_path / "state"))


@pytest.fixture
def daemon(plain: Settings) -> Iterator[Service]:
    made = Service(plain)
    yield made
    made._lock.release()


@pytest.fixture
def shared(plain: Settings, tmp_path: Path) -> Settings:
    """Settings with a shared folder."""
    return plain.model_copy(update={"executor": ExecutorSettings(shared=str(tmp_path / "share"))})


def test_a_stop_asks_the_trainer_for_its_checkpoint_before_it_waits_for_a_file_that_is_read(
    daemon: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    monkeypatch.setattr(daemon._worker, "stop", lambda: order.append("worker"))
    monkeypatch.setattr(daemon._hooks, "stop", lambda: order.append("hooks"))
    monkeypatch.setattr(daemon._intake, "finish", lambda: order.append("intake"))
    daemon._end()
    assert order[:3] == ["worker", "hooks", "intake"]


def test_the_schedule_is_looked_at_in_every_turn(plain: Settings) -> None:
    daemon = Service(plain.model_copy(update={"trigger": "nightly"}))
    assert daemon._tick()
    with transaction(daemon._engine) as session:
        assert "looked_at" in (session.get_one(Track, "default").nightly or {})


@pytest.mark.parametrize(
    ("changed", "left"),
    [
        ({"kind": "local"}, "share/runs/12/attempts/train-1/job.json"),
        ({"kind": "slurm"}, "state/spool/queue/12-train-1.json"),
        ({"kind": "slurm", "slurm": {"local": ["merge"]}}, "share/runs/12/attempts/merge-1/job.json"),
    ],
)
def test_another_executor_does_not_take_over_an_attempt_that_goes_on(
    plain: Settings, tmp_path: Path, changed: dict[str, Any], left: str
) -> None:
    """Two processes would work in its folder."""
    (tmp_path / left).parent.mkdir(parents=True)
    (tmp_path / left).write_text("{}")
    executor = ExecutorSettings(shared=str(tmp_path / "share"), **changed)
    with pytest.raises(DropforgeError, match=f"{tmp_path / left} has no result") as refused:
        Service(plain.model_copy(update={"executor": executor}))
    assert refused.value.hint.endswith("dropforge cancel 12 ends it")


def test_a_shared_folder_that_is_not_mounted_is_refused_and_not_begun_anew(shared: Settings, tmp_path: Path) -> None:
    for _ in range(2):
        Service(shared)._lock.release()
    (tmp_path / "share").rename(tmp_path / "aside")
    with pytest.raises(ShareGone, match=r"the shared folder is not mounted: .*/share/instance: No such file"):
        Service(shared)
    assert list((tmp_path / "share").iterdir()) == []
    (tmp_path / "share" / "instance").write_text("another")
    with pytest.raises(ShareGone, match=r"the shared folder is not mounted: .*/share is another installation's"):
        Service(shared)
    assert [path.name for path in (tmp_path / "share").iterdir()] == ["instance"]


def test_a_new_host_is_told_to_copy_the_id_of_the_shared_folder(shared: Settings, tmp_path: Path) -> None:
    Service(shared.model_copy(update={"state": str(tmp_path / "lost")}))._lock.release()
    os.utime(tmp_path / "share" / LEASE_NAME, (0, 0))  # its lease is over
    with pytest.raises(DropforgeError, match=f"{tmp_path}/state/instance is missing") as refused:
        Service(shared)
    assert f"copy {tmp_path}/share/instance" in refused.value.hint
    shutil.copy(tmp_path / "share" / "instance", tmp_path / "state" / "instance")
    Service(shared)._lock.release()


def test_what_a_killed_daemon_was_writing_goes_at_the_next_start_from_both_folders(
    shared: Settings, tmp_path: Path
) -> None:
    names = (".watcher.json.5.tmp", ".gpu-lent.json.5.tmp", "spool/queue/.x.json.5.tmp")
    on_share = (
        ".daemon.json.5.tmp",
        "incoming/5.tmp",
        "tracks/default/.base.json.5.tmp",
        "tracks/default/.smoke.5.tmp",
    )
    left = [*(tmp_path / "state" / name for name in names), *(tmp_path / "share" / name for name in on_share)]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{")
    service = Service(shared)
    service.stop.set()
    service.run()
    assert [path.name for path in left if path.exists()] == []


def test_a_stop_says_what_is_left_for_the_next_start(tmp_path: Path) -> None:
    build(tmp_path)
    house = Daemon(tmp_path, START)
    (tmp_path / "inbox" / "a.jsonl").write_bytes(records("a"))
    house.take_in(START)
    ends = Service(load(tmp_path / "dropforge.toml", {}))
    ends.stop.set()
    with capture_logs() as logged:
        ends.run()
    assert (logged[-1]["event"], logged[-1]["open_runs"]) == ("daemon_stopped", ["run 1, queued"])


def test_a_stop_ends_well_though_its_last_line_cannot_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Overview, "open_runs", Mock(side_effect=DatabaseUnusable("x", "y")))
    build(tmp_path)
    ends = Service(load(tmp_path / "dropforge.toml", {}))
    ends.stop.set()
    with capture_logs() as logged:
        ends.run()
    assert (logged[-1]["event"], logged[-1]["open_runs"]) == ("daemon_stopped", [])


def test_trouble_with_the_disk_is_no_reason_for_systemd_to_end_the_training(
    daemon: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(service, "notify", lambda *words: said.extend(words))
    monkeypatch.setattr(daemon._worker, "keep_alive", lambda _now: None)
    monkeypatch.setattr(daemon._dispatcher, "tick", Mock(side_effect=OSError(5, "Input/output error")))
    daemon.stop.set()
    daemon._beat()
    assert "WATCHDOG=1" in said


def test_at_the_end_of_a_run_the_notes_beside_the_receipts_are_written_at_once(
    daemon: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon._dispatcher, "tick", lambda _now: daemon._dispatcher._claims.clear())
    assert daemon._tick()
    assert not daemon._intake.wake.is_set(), "no run was in hand"
    daemon._dispatcher._claims[1] = Claim(1, "held")
    assert daemon._tick()
    assert daemon._intake.wake.is_set(), "else they lag by as long as the inbox is not looked at"


def test_a_run_that_no_worker_serves_says_so_until_one_does(tmp_path: Path, dropforge: Callable[..., Any]) -> None:
    build(tmp_path)
    settings = tmp_path / "dropforge.toml"
    settings.write_text(f'worker = "separate"\n{settings.read_text()}')
    house = Daemon(tmp_path, START)
    (tmp_path / "inbox" / "a.jsonl").write_bytes(records("a"))
    house.take_in(START)
    daemon = Service(house.settings)

    def told() -> tuple[bool, bool, bool]:
        daemon._described_at = -math.inf
        assert daemon._tick()
        shown = attention(house.settings, Overview.of(house.settings))
        status, doctor = dropforge("status").out, dropforge("doctor", "--json").json["findings"]
        return (
            "trouble: the worker: no worker runs, so runs wait" in status,
            any(one["name"] == "worker" and one["level"] == "warn" for one in doctor),
            any(one.title == "Trouble with the worker" for one in shown),
        )

    told()  # the run begins
    assert told() == (True, True, True)
    worker = FileLock(house.root / WORKER_LOCK)
    assert worker.acquire()
    assert told() == (False, False, False)
    worker.release()
    daemon._lock.release()


def test_a_hook_that_waits_for_the_daemon_is_run_by_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "word")
    hook = f'[hooks]\nafter_promotion = ["cat", "{tmp_path}/word"]\ntimeout_seconds = 20\n'
    house = House(tmp_path, hook)
    house.run()
    daemon = Service(house.daemon.settings)
    assert daemon._tick()
    ((_, _, running),) = daemon._hooks._running.values()
    assert isinstance(running, Command)
    assert running.ended() is None, "the daemon does not wait for it"
    (tmp_path / "word").write_text("told")
    running.wait()
    assert daemon._tick()
    latest = Overview.of(house.daemon.settings).history("default")[0]
    assert (latest.generation, latest.hook and latest.hook.state) == (1, "ok")
    daemon._lock.release()


def test_a_shared_folder_that_goes_away_is_said_and_files_stay_in_the_inbox_until_it_is_back(
    shared: Settings, tmp_path: Path
) -> None:
    daemon = Service(shared)
    make_inbox(shared)
    (tmp_path / "share").rename(tmp_path / "aside")
    (tmp_path / "share").mkdir()
    (tmp_path / "inbox" / "a.jsonl").write_bytes(records("a"))

    def troubles() -> str:
        daemon._tick()
        return Overview.of(shared).troubles().get("shared folder", "")

    assert troubles().startswith("the shared folder is not mounted")
    daemon._intake._turn()
    assert list((tmp_path / "share").iterdir()) == []
    assert (tmp_path / "inbox" / "a.jsonl").exists()
    (tmp_path / "share").rmdir()
    (tmp_path / "aside").rename(tmp_path / "share")
    assert troubles() == ""
    daemon._lock.release()


def test_a_daemon_with_a_copied_state_folder_is_refused_while_the_first_one_lives(
    shared: Settings, tmp_path: Path
) -> None:
    first = Service(shared)
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    copied = shared.model_copy(update={"state": str(tmp_path / "copy")})
    with pytest.raises(
        DropforgeError, match=f"another daemon works in {tmp_path / 'share'}: on .*{tmp_path / 'state'}"
    ):
        Service(copied)
    # It hangs, or its host is lost.
    os.utime(tmp_path / "share" / LEASE_NAME, (0, 0))
    second = Service(copied)
    assert not first._tick()
    assert "another daemon works in" in Overview.of(shared).troubles()["shared folder"]
    first._lock.release()
    second._lock.release()
