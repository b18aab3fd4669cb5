"""A workspace in which much goes on: the history of `lived_in`, a curve, a queue, a paused track, a living daemon."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from daemon.queue import order
from daemon.state.events import Word
from daemon.system.processes import FileLock
from pipeline import durable
from pipeline.artifacts import CurvePoint
from pipeline.contract import CURVE_NAME, Curve
from tests.daemon.conftest import lines


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
    """`alive` with the curve of the run that trains, a queued run behind it, and a paused track with another."""
    curve = Curve(
        loss=tuple(CurvePoint(step=step, loss=2.0 / step) for step in range(1, 13)),
        dev=tuple(CurvePoint(step=step, loss=2.2 / step) for step in (3, 6, 9, 12)),
    )
    root = alive.settings.state_folder
    durable.write_json(root / "runs/3/prepare.json", {})
    durable.write_hint(root / "runs/3/attempts/train-1" / CURVE_NAME, curve.model_dump())
    alive.take("fourth.jsonl", lines("e"))
    alive.take("case.jsonl", lines("f"), track="support")
    order.pause(alive.engine, "support", Word("the card is lent out", alive.tick(), "ada"))
    return alive


def pytest_report_header() -> str:
    """Say that screens are not looked at in a real terminal, for want of one."""
    return "" if shutil.which("tmux") else "left out, no tmux: tests/daemon/cli in a terminal"
