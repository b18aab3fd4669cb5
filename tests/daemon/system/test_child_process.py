"""When the daemon starts its worker and its page again."""

import os
import resource
import sys
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from daemon.system.child_process import ChildProcess


@pytest.fixture
def web() -> Iterator[ChildProcess]:
    made = ChildProcess("web", ["web"], most_seconds=60.0)
    made._argv = [sys.executable, "-c", "raise SystemExit(1)"]
    yield made
    made.stop()
    if made._process is not None:
        made._process.wait()


def wait(web: ChildProcess) -> None:
    assert web._process is not None
    assert web._process.stdin is not None
    web._process.wait()
    web._process.stdin.close()


def test_one_that_cannot_be_started_is_tried_again(web: ChildProcess) -> None:
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, most))  # none is left for the pipe to it
    try:
        with capture_logs() as logged:
            web.keep_alive(100.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (least, most))
    assert (web.alive, logged[0]["error"], logged[0]["again_in"]) == (False, "[Errno 24] Too many open files", 2.0)
    web.keep_alive(101.0)
    assert web._process is None
    web.keep_alive(102.0)
    wait(web)


def test_after_each_early_end_it_waits_twice_as_long(web: ChildProcess) -> None:
    now = 100.0
    waits: list[int] = []
    web.keep_alive(now)
    for _ in range(9):
        wait(web)
        pause = 0
        web.keep_alive(now)
        while not web._process:
            pause += 1
            web.keep_alive(now + pause)
        waits.append(pause)
        now += pause
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_it_ends_when_its_standard_input_closes_and_is_killed_while_that_is_open(web: ChildProcess) -> None:
    web._argv = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    web.keep_alive(0.0)
    assert web._process is not None
    web.stop()
    assert web._process.wait(60) == 0
    web._process = None
    web.keep_alive(9.0)
    assert web.alive
    web.kill()
    assert not web.alive
    assert web._process is not None
    assert web._process.stdin is not None
    web._process.stdin.close()
