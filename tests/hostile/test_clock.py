"""The wall clock of a real daemon is set while it runs, or its machine is suspended: nights go on."""

import time
from datetime import UTC, datetime

import pytest
from sqlalchemy.exc import OperationalError
from sqlmodel import Session, select

from daemon.state.database import open_reader
from daemon.state.tables import Slot, Track
from tests.hostile.people import Box, NewBox

#: The daemon, whose wall clock goes by what a file says it is ahead, in nanoseconds.
PROGRAM = """
import sys, time
from daemon import cli
from daemon.queue import nightly
nightly._LOOK_SECONDS = 0.5
real = time.time_ns
def ahead():
    with open("ahead") as file:
        return int(file.read() or 0)
time.time_ns = lambda: real() + ahead()
sys.exit(cli.main())
"""
SETTINGS = {
    "DROPFORGE_WORKER": "separate",
    "DROPFORGE_TRIGGER": "nightly",
    "DROPFORGE_SCHEDULE": "0 2 * * *",
    "DROPFORGE_TIMEZONE": "UTC",
}


class Clock:
    """What the daemon takes for the time."""

    def __init__(self, box: Box) -> None:
        self._path = box.folder / "ahead"

    def set(self, text: str) -> None:
        then = datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
        aside = self._path.with_name("ahead.new")
        aside.write_text(str(int(then * 1_000_000_000) - time.time_ns()))
        aside.rename(self._path)


def nights(box: Box) -> list[str]:
    """Return the slots that were taken."""
    engine = open_reader(box.state / "dropforge.db")
    try:
        with Session(engine) as session:
            due = [slot.due_at / 1000 for slot in session.exec(select(Slot)) if slot.track == "default"]
    finally:
        engine.dispose()
    return [f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M}" for at in due]


def looked_at(box: Box) -> str:
    """Return on which day the schedule was looked at last."""
    engine = open_reader(box.state / "dropforge.db")
    try:
        with Session(engine) as session:
            track = session.get(Track, "default")
            at = (track.nightly or {}).get("looked_at") if track is not None else None
    except OperationalError:
        return ""
    finally:
        engine.dispose()
    return f"{datetime.fromtimestamp(at / 1000, UTC):%Y-%m-%d}" if isinstance(at, int) else ""


#: What the clock is set to in turn, and the night that is taken then.
STEPS = (
    ("2027-05-10 12:00", None),  # at boot a year ahead
    ("2026-05-10 12:00", None),
    ("2026-05-11 01:59:58", "2026-05-11 02:00"),
    ("2026-05-14 09:00", "2026-05-14 02:00"),  # as after a sleep over three nights
    ("2026-05-12 12:00", None),
    ("2026-05-13 01:59:58", "2026-05-13 02:00"),
)


@pytest.mark.timeout(180)
def test_the_next_night_is_taken_whatever_the_clock_does(new_box: NewBox) -> None:
    box = new_box()
    clock, taken = Clock(box), list[str]()
    clock.set(STEPS[0][0])
    box.start(extra=SETTINGS, code=("-c", PROGRAM))
    for time_of_day, night in STEPS:
        clock.set(time_of_day)
        # It looks every five minutes, here twice a second, though no fire time has come by its old plan.
        box.until(lambda day=time_of_day[:10]: looked_at(box) == day, 30)  # type: ignore[misc]
        taken.extend(filter(None, [night]))
        box.until(lambda: nights(box) == taken, 30)
    assert box.stop() == 0
