"""The notification protocol, against a real datagram socket."""

import socket
from pathlib import Path

import pytest

from daemon.system.sd_notify import notify, showing_life


@pytest.mark.parametrize("abstract", [False, True])
def test_assignments_arrive_in_one_datagram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, abstract: bool) -> None:
    name = "@dropforge-test-notify" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify("READY=1", "STATUS=run 1 train 3/9")
        assert manager.recv(4096) == b"READY=1\nSTATUS=run 1 train 3/9"


def test_without_a_service_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify("READY=1")


def test_long_work_shows_that_the_service_lives_and_gives_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.system.sd_notify._SIGN_SECONDS", 0.01)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        # The work lasts until the sign of life has come: without one the test's time limit ends it.
        assert showing_life(manager.recv, 4096).startswith(b"WATCHDOG=1\nEXTEND_TIMEOUT_USEC=")
