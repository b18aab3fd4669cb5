"""A workspace in which much goes on: the history of `lived_in`, a queue, a paused track, a living daemon."""

from collections.abc import Iterator
from typing import Any

import pytest

from daemon.queue import order, run_queue
from daemon.queue.states import Claim
from daemon.state.events import Word
from daemon.system.processes import FileLock
from tests import run_owner
from tests.daemon.conftest import LivedIn, lines


def running(lived_in: LivedIn) -> Claim:
    """Return the claim on the run that `lived_in` left running."""
    return run_queue.rescue(lived_in.engine, lived_in.tick())[0]


def end_running(lived_in: LivedIn, outcome: str, gain: float, **more: Any) -> None:
    """End that run with a verdict."""
    run_owner.finish(lived_in.engine, running(lived_in), run_owner.ending(outcome, gain, **more), lived_in.tick())


@pytest.fixture
def daemon_lock(lived_in: Any) -> Iterator[FileLock]:
    """What tells that the daemon of `lived_in` lives; it may be released to let it die."""
    lock = FileLock(lived_in.settings.state_folder / "daemon.lock")
    assert lock.acquire()
    yield lock
    lock.release()


@pytest.fixture
def alive(lived_in: Any, daemon_lock: FileLock) -> Any:
    """The workspace `lived_in`, whose daemon lives."""
    assert daemon_lock.path.exists()
    return lived_in


@pytest.fixture
def busy(alive: Any) -> Any:
    """`alive` with a queued run behind the one that trains, and a paused track with another."""
    alive.take("fourth.jsonl", lines("e"))
    alive.take("case.jsonl", lines("f"), track="support")
    order.pause(alive.engine, "support", Word("the card is lent out", alive.tick(), "ada"))
    return alive
