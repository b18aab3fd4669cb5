"""When the daemon starts its page again."""

import sys
from collections.abc import Iterator

import pytest

from daemon.web.process import WebProcess


@pytest.fixture
def web() -> Iterator[WebProcess]:
    made = WebProcess(None)
    made._argv = [sys.executable, "-c", "raise SystemExit(1)"]
    yield made
    made.stop()
    if made._process is not None:
        made._process.wait()


def wait(web: WebProcess) -> None:
    assert web._process is not None
    assert web._process.stdin is not None
    web._process.wait()
    web._process.stdin.close()


def test_after_each_early_end_it_waits_twice_as_long(web: WebProcess) -> None:
    now = 100.0
    waits: list[int] = []
    web.keep_alive(now)
    for _ in range(9):
        wait(web)
        pause = 0
        web.keep_alive(now)
        while web.pid is None:
            pause += 1
            web.keep_alive(now + pause)
        waits.append(pause)
        now += pause
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_one_that_lived_for_long_is_back_at_once(web: WebProcess) -> None:
    web.keep_alive(0.0)
    wait(web)
    web.keep_alive(1000.0)
    assert web.pid is None
    web.keep_alive(1001.0)
    assert web.pid is not None


def test_it_ends_when_its_standard_input_closes(web: WebProcess) -> None:
    web._argv = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    web.keep_alive(0.0)
    assert web._process is not None
    web.stop()
    assert web._process.wait(60) == 0
