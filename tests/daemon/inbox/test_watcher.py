"""A file is taken when it has stopped changing, found with and without events, and never twice or in part."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from structlog.testing import capture_logs

from daemon.inbox.folders import InboxUnusable
from daemon.inbox.watcher import Settled, Watcher, make_inbox
from daemon.settings.model import Settings
from daemon.system.processes import has_writer

SETTLE = 5.0


def watcher(folder: Path, **values: Any) -> Watcher:
    """Return a watcher whose events are off: it finds everything by scanning."""
    settings = Settings.model_validate(
        {"inbox": str(folder / "inbox"), "state": str(folder / "state"), "tracks": {"support": {}}, **values}
    )
    make_inbox(settings)
    return Watcher(settings, threading.Event())


def names(settled: list[Settled]) -> list[str]:
    return [os.fsdecode(file.name) for file in settled]


def test_a_file_is_settled_once_it_has_been_quiet_for_the_settle_time(tmp_path: Path) -> None:
    watch = watcher(tmp_path)
    (tmp_path / "inbox" / "a.jsonl").write_text("x")
    assert watch.scan(100.0) == []
    assert watch.next_due(100.0) == SETTLE
    assert watch.scan(104.9) == []
    assert watch.next_due(104.0) == pytest.approx(1.0)
    settled = watch.scan(105.0)
    assert settled == [Settled("default", "train", b"a.jsonl")]
    assert watch.next_due(105.0) is None
    assert watch.scan(106.0) == settled


def test_track_and_role_follow_from_the_folder(tmp_path: Path) -> None:
    watch = watcher(tmp_path, intake={"settle_seconds": 0})
    for folder in ("", "heldout", "support", "support/heldout", "done", "rejected", "unknown"):
        (tmp_path / "inbox" / folder).mkdir(exist_ok=True)
        (tmp_path / "inbox" / folder / "a.jsonl").write_text("x")
    found = {(file.track, file.role) for file in watch.scan(0.0)}
    assert found == {("default", "train"), ("default", "heldout"), ("support", "train"), ("support", "heldout")}
    assert len(watch.scan(0.0)) == 4


def test_files_come_in_the_order_in_which_they_arrived(tmp_path: Path) -> None:
    watch = watcher(tmp_path, intake={"settle_seconds": 0})
    for name in ("c", "a", "b"):
        path = tmp_path / "inbox" / f"{name}.jsonl"
        path.write_text("x")
        times = [path.stat().st_ctime_ns]
        while path.stat().st_ctime_ns == times[0]:
            path.chmod(0o600 if path.stat().st_mode & 0o040 else 0o644)
    arrived = sorted("cab", key=lambda name: (tmp_path / "inbox" / f"{name}.jsonl").stat().st_ctime_ns)
    assert names(watch.scan(0.0)) == [f"{name}.jsonl" for name in arrived]


def test_a_slow_writer_is_waited_for_and_a_file_that_vanished_forgotten(tmp_path: Path) -> None:
    watch = watcher(tmp_path)
    path = tmp_path / "inbox" / "slow.jsonl"
    for second in range(12):
        # As `cat >>` does it: the file is closed between the parts.
        with path.open("a", encoding="utf-8") as file:
            file.write(f"part {second}\n")
        assert watch.scan(float(second)) == []
    assert watch.scan(15.9) == []
    assert names(watch.scan(16.0)) == ["slow.jsonl"]
    path.write_text("x")
    assert watch.scan(17.0) == []
    path.unlink()
    assert (watch.scan(18.0), watch.next_due(18.0)) == ([], None)
    path.write_text("x")
    assert watch.scan(26.0) == []


@pytest.mark.parametrize(
    "name", [".hidden.jsonl", "a.jsonl.filepart", "a.jsonl~", "~$a.jsonl", "Thumbs.db", "a.JSONL.PART"]
)
def test_names_of_files_in_progress_are_ignored(tmp_path: Path, name: str) -> None:
    watch = watcher(tmp_path, intake={"settle_seconds": 0})
    (tmp_path / "inbox" / name).write_text("x")
    assert watch.scan(0.0) == []
    (tmp_path / "inbox" / "b.csv").write_text("x")
    assert names(watch.scan(0.0)) == ["b.csv"]


def test_a_file_that_is_open_for_writing_is_waited_for_and_named(tmp_path: Path) -> None:
    watch = watcher(tmp_path)
    path = tmp_path / "inbox" / "support" / "a\n.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.write("x")
        file.flush()
        assert watch.scan(0.0) == []
        assert watch.waiting() == []
        assert watch.scan(60.0) == []
        assert watch.waiting() == ["support/a\\n.jsonl"]
        assert watch.next_due(60.0) == 1.0
    assert names(watch.scan(61.0)) == ["a\n.jsonl"]
    assert watch.waiting() == []


def test_on_a_network_file_system_the_settle_time_alone_decides(tmp_path: Path) -> None:
    watch = watcher(tmp_path, observer="polling")
    with (tmp_path / "inbox" / "a.jsonl").open("w", encoding="utf-8"):
        assert watch.scan(0.0) == []
        assert names(watch.scan(5.0)) == ["a.jsonl"]


def test_pipes_links_and_sockets_are_returned_without_being_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[bytes] = []
    monkeypatch.setattr("daemon.inbox.watcher.has_writer", lambda name, _folder: opened.append(name))
    watch = watcher(tmp_path)
    inbox = tmp_path / "inbox"
    os.mkfifo(inbox / "fifo")
    (inbox / "link").symlink_to("/etc/hostname")
    (inbox / "dangling").symlink_to("/nowhere")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(inbox / "socket"))
        watch.scan(0.0)
        assert sorted(names(watch.scan(5.0))) == ["dangling", "fifo", "link", "socket"]
    assert opened == []


def test_a_folder_of_no_declared_track_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    watch = watcher(tmp_path)
    for name in ("suport", "zzz", ".git"):
        (tmp_path / "inbox" / name).mkdir()
    assert watch.unknown_folders() == [
        {"name": "suport", "nearest": "support"},
        {"name": "zzz", "nearest": None},
    ]


def test_a_file_in_the_place_of_a_folder_is_a_clear_error(tmp_path: Path) -> None:
    watch = watcher(tmp_path)
    (tmp_path / "inbox" / "done").rmdir()
    (tmp_path / "inbox" / "done").write_text("x")
    with pytest.raises(InboxUnusable, match="a file is in the way"):
        watch.scan(0.0)


def test_a_folder_is_logged_as_replaced_only_if_it_was(tmp_path: Path) -> None:
    watch = watcher(tmp_path)
    watch.scan(0.0)
    support = tmp_path / "inbox" / "support"
    with capture_logs() as logged:
        support.rename(tmp_path / "moved")
        watch.scan(0.0)
        shutil.rmtree(support)
        support.write_text("x")
        watch.scan(0.0)
        support.unlink()
        watch.scan(0.0)
    events = [entry["event"] for entry in logged if entry["folder"] == str(support)]
    assert events == ["inbox_folder_replaced", "inbox_folder_unusable"]


@contextmanager
def listening(folder: Path, **values: Any) -> Iterator[tuple[Watcher, threading.Event]]:
    wake = threading.Event()
    settings = Settings.model_validate({"inbox": str(folder / "inbox"), "state": str(folder / "state"), **values})
    watch = Watcher(settings, wake)
    watch.start()
    try:
        yield watch, wake
    finally:
        watch.stop()


@pytest.mark.parametrize("observer", ["native", "polling"])
def test_an_event_wakes_the_scan(tmp_path: Path, observer: str) -> None:
    with listening(tmp_path, observer=observer) as (watch, wake):
        assert watch.scan(0.0) == []
        (tmp_path / "inbox" / "heldout" / "a.jsonl").write_text("x")
        assert wake.wait(30)
        watch.scan(0.0)
        assert names(watch.scan(5.0)) == ["a.jsonl"]


@pytest.mark.parametrize("source", ["outside", "inbox/.a.jsonl.tmp"])
def test_a_file_that_was_renamed_into_place_is_complete_at_once(tmp_path: Path, source: str) -> None:
    with listening(tmp_path) as (watch, wake):
        (tmp_path / source).write_text("x")
        target = tmp_path / "inbox" / "a.jsonl"
        (tmp_path / source).rename(target)
        settled: list[Settled] = []
        while not settled and wake.wait(30):
            wake.clear()
            settled = watch.scan(0.0)
        assert names(settled) == ["a.jsonl"]
        # Written to again, it has to settle like any other.
        wake.clear()
        target.write_text("y")
        while watch.scan(0.0) and wake.wait(30):
            wake.clear()
        assert watch.scan(0.0) == []
        assert names(watch.scan(5.0)) == ["a.jsonl"]


def test_a_renamed_file_with_a_writer_is_not_complete(tmp_path: Path) -> None:
    with listening(tmp_path) as (watch, wake), (tmp_path / "outside").open("w", encoding="utf-8") as file:
        (tmp_path / "outside").rename(tmp_path / "inbox" / "a.jsonl")
        assert wake.wait(30)
        assert watch.scan(0.0) == []
        file.write("x")


def test_an_inbox_that_was_deleted_and_came_back_is_watched_again(tmp_path: Path) -> None:
    with listening(tmp_path) as (watch, wake):
        inbox = tmp_path / "inbox"
        for name in ("done", "rejected", "heldout"):
            (inbox / name).rmdir()
        inbox.rmdir()
        assert watch.scan(0.0) == []
        assert inbox.is_dir()
        wake.clear()
        (inbox / "heldout" / "a.jsonl").write_text("x")
        assert wake.wait(30)
        wake.clear()
        (inbox / "b.jsonl").write_text("x")
        assert wake.wait(30)
        watch.scan(0.0)
        assert sorted(names(watch.scan(5.0))) == ["a.jsonl", "b.jsonl"]


def test_whether_there_is_a_writer_has_no_answer_for_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    folder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    assert [has_writer(name, folder) for name in (b"fifo", b"missing")] == [None, None]
    os.close(folder)


LEASE_BROKEN = """
import os, sys
from daemon.system.processes import take_read_lease
fd = os.open(sys.argv[1], os.O_RDONLY)
assert take_read_lease(fd)
child = os.fork()
if child == 0:
    try:
        os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK)
    except BlockingIOError:
        os._exit(7)
    os._exit(1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_writer_that_comes_during_the_lease_does_not_end_the_daemon(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("x")
    done = subprocess.run(
        [sys.executable, "-c", LEASE_BROKEN, str(path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != -signal.SIGIO
    assert (done.returncode, done.stdout.strip()) == (0, "7"), done.stderr


def test_a_file_that_could_not_be_taken_is_given_again_after_a_growing_pause(tmp_path: Path) -> None:
    watch = watcher(tmp_path, intake={"settle_seconds": 0})
    path = tmp_path / "inbox" / "a.jsonl"
    path.write_text("x")
    now, pauses = 0.0, []
    for _ in range(10):
        (settled,) = watch.scan(now)
        watch.postpone(settled, "no room", now)
        assert watch.left() == [{"name": "a.jsonl", "why": "no room"}]
        pause = watch.next_due(now) or 0.0
        assert watch.scan(now + pause - 0.01) == []
        pauses.append(pause)
        now += pause
    assert pauses == [5, 10, 20, 40, 80, 160, 320, 600, 600, 600]
    # Changed, or put right, it is another file.
    path.chmod(0o600)
    assert names(watch.scan(now)) == ["a.jsonl"]
    assert watch.left() == []


def test_a_folder_that_cannot_be_used_stops_no_other(tmp_path: Path) -> None:
    watch = watcher(tmp_path, intake={"settle_seconds": 0})
    inbox = tmp_path / "inbox"
    (inbox / "support" / "heldout").rmdir()
    (inbox / "support" / "heldout").symlink_to(tmp_path)
    for name in ("a.jsonl", "support/b.jsonl"):
        (inbox / name).write_text("x")
    # The link itself is given as a file that is none: once it is rejected, the daemon makes the folder again.
    assert sorted(names(watch.scan(0.0))) == ["a.jsonl", "b.jsonl", "heldout"]
    assert [one["name"] for one in watch.left()] == ["support/heldout/"]
    (inbox / "support" / "heldout").unlink()
    watch.scan(1.0)
    assert watch.left() == []


@pytest.mark.parametrize(("inbox", "drops", "answers"), [(0o2770, 0o3770, 0o2750), (0o1777, 0o1777, 0o755)])
def test_folders_have_the_inboxs_rights_and_nobody_moves_what_is_anothers(
    tmp_path: Path, inbox: int, drops: int, answers: int
) -> None:
    (tmp_path / "inbox").mkdir()
    (tmp_path / "inbox").chmod(inbox)
    watcher(tmp_path)
    assert (tmp_path / "inbox").stat().st_mode & 0o7777 == drops, "it is made sticky where others may write"
    rights = {path.name: path.stat().st_mode & 0o7777 for path in (tmp_path / "inbox").iterdir()}
    assert rights == {"support": drops, "heldout": drops, "done": answers, "rejected": answers}
    # As a hand may have left them.
    for name in rights:
        (tmp_path / "inbox" / name).chmod(0o2775)
    watcher(tmp_path)
    rights = {path.name: path.stat().st_mode & 0o7777 for path in (tmp_path / "inbox").iterdir()}
    assert rights == {"support": 0o3775, "heldout": 0o3775, "done": 0o2755, "rejected": 0o2755}


def test_a_name_that_refuses_every_question_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watcher(tmp_path, intake={"settle_seconds": 0})
    (tmp_path / "inbox" / "a.jsonl").write_text("x")
    (tmp_path / "inbox" / "mounted").write_text("x")
    scandir = os.scandir

    def refusing(entry: os.DirEntry[str]) -> Mock:
        """Let an entry be a mount that another user has made: its server answers nobody else."""
        made = Mock(wraps=entry)
        made.name = entry.name
        if entry.name == "mounted":
            made.stat.side_effect = PermissionError(13, "Permission denied")
        return made

    @contextmanager
    def listed(fd: int) -> Iterator[Iterator[Mock]]:
        with scandir(fd) as entries:
            yield map(refusing, entries)

    monkeypatch.setattr("daemon.inbox.watcher.os.scandir", listed)
    assert names(watch.scan(0.0)) == ["a.jsonl"]
