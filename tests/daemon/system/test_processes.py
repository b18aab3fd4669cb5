"""Who is taken for alive: a process with its number, its start and the boot, and the holder of a lock."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.system.processes import FileLock, identify, lock_holder


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert identify(child.pid) is None
    child.send_signal(signal.SIGKILL)
    child.wait()


def test_a_lock_is_given_back_by_death_and_by_nothing_else(tmp_path: Path) -> None:
    code = "import sys, signal; from daemon.system.processes import FileLock; from pathlib import Path\n"
    code += "lock = FileLock(Path(sys.argv[1])); print(lock.acquire(), flush=True); signal.pause()"
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"True\n"
        os.kill(holder.pid, signal.SIGSTOP)
        assert lock_holder(path) == holder.pid
        assert not FileLock(path).acquire(), "a frozen process is not a dead one"
        path.write_text("")
        assert not FileLock(path).acquire(), "what the file says does not matter"
        holder.kill()
    assert lock_holder(path) is None
    assert FileLock(path).acquire()


def test_somebody_who_only_looks_does_not_keep_the_daemon_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    path.touch()
    looking = os.open(path, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr("daemon.system.processes.time.sleep", lambda _seconds: fcntl.flock(looking, fcntl.LOCK_UN))
    lock = FileLock(path)
    assert lock.acquire()
    lock.release()
    os.close(looking)
