"""What one run, track or hook has against it, before the real daemon of an unprivileged user: that one's alone."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from sqlmodel import Session, col, select

from daemon.state.database import open_reader
from daemon.state.tables import Run
from tests.hostile.people import DAEMON, Box, rows

#: Plays the worker: each step is done by a script, in a process of the daemon's user.
WORK = """
import sys, threading
from pathlib import Path
from tests.chaos.house import work
while True:
    try:
        work(Path(sys.argv[1]), "promoted")
    except (OSError, ValueError):
        pass
    threading.Event().wait(0.05)
"""
QUICK = {"DROPFORGE_WORKER": "separate", "DROPFORGE_RUN_AFTER_QUIET_SECONDS": "0"}


@pytest.fixture
def worker() -> Iterator[Callable[[Box], None]]:
    """Start a process that does the steps of a box."""
    begun: list[subprocess.Popen[bytes]] = []

    def start(box: Box) -> None:
        argv = box.namespace.argv(DAEMON, [sys.executable, "-c", WORK, str(box.state)], box.folder, 0o007)
        with box.log.open("ab") as log:
            begun.append(subprocess.Popen(argv, stdout=log, stderr=log, env=box.environment))

    yield start
    for process in begun:
        process.kill()
        process.wait()


def found(box: Box, table: type[Any]) -> list[Any]:
    try:
        engine = open_reader(box.state / "dropforge.db")
        with Session(engine) as session:
            return list(session.exec(select(table).order_by(col(table.id))))
    except (OperationalError, sqlite3.OperationalError):
        return []  # a reader may not roll back what a killed daemon left; the next one does


def run_of(box: Box, track: str) -> Run | None:
    return next((run for run in found(box, Run) if run.track == track), None)


def state_of(box: Box, track: str) -> str:
    run = run_of(box, track)
    return "none" if run is None else run.state


def take_away(place: Path) -> None:
    """Let something be root's, as after a start as root."""
    os.chown(place, 0, 0)
    place.chmod(0o700)


def bad_lines(box: Box) -> int:
    return sum("dispatch_trouble" in line or "Traceback" in line for line in box.said().splitlines())


@pytest.mark.timeout(180)
@pytest.mark.parametrize("when", ["under way", "at the start"])
def test_a_run_whose_files_are_roots_waits_alone_is_shown_and_can_be_cancelled(
    new_box: Callable[..., Box], worker: Callable[[Box], None], when: str
) -> None:
    box = new_box()
    box.start(extra=QUICK)
    box.drop(DAEMON, "a.jsonl", rows("a"))
    box.until((box.state / "runs/1/attempts/prepare-1/spec.json").exists)
    if when == "at the start":
        assert box.process is not None
        box.process.kill()
        box.process.wait()
    take_away(box.state / "runs/1")
    if when == "at the start":
        box.start(extra=QUICK)
    box.drop(DAEMON, "b.jsonl", rows("b"), "support")
    worker(box)
    box.until(lambda: state_of(box, "default") == "waiting" and state_of(box, "support") == "succeeded")
    box.until(lambda: run_of(box, "default") is not None)
    run = run_of(box, "default")
    assert run is not None
    said = {words: box.cli(DAEMON, *words.split()).stdout for words in ("status", "show 1")}
    shown = all("the files of run 1 cannot be used" in text and "Permission denied" in text for text in said.values())
    cancelled = box.cli(DAEMON, "cancel", "1")
    happened = (
        f"other track: succeeded, counted: {run.failures + run.deaths}, shown: {shown}, "
        f"cancel: {state_of(box, 'default')}, bad lines: {bad_lines(box)}, end: {box.stop()}"
    )
    expected = "other track: succeeded, counted: 0, shown: True, cancel: cancelled, bad lines: 0, end: 0"
    assert happened == expected, (cancelled, said)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("damage", ["tracks/default is root's", "a folder in the place of its link"])
def test_a_track_whose_folder_is_damaged_is_shown_and_holds_no_other_up(
    new_box: Callable[..., Box], worker: Callable[[Box], None], damage: str
) -> None:
    box = new_box()
    box.start(extra=QUICK)
    assert box.stop() == 0
    place = box.state / "tracks/default"
    if damage == "tracks/default is root's":
        take_away(place)
    else:
        (place / "champion").unlink()
        (place / "champion/kept").mkdir(parents=True)
    box.log.unlink()
    box.start(extra=QUICK)
    box.drop(DAEMON, "b.jsonl", rows("b"), "support")
    worker(box)
    box.until(lambda: state_of(box, "support") == "succeeded" and bool(box.status()["troubles"]))
    # That no worker had begun yet is told until the next look.
    box.until(lambda: "the worker" not in box.status()["troubles"])
    troubles = box.status()["troubles"]
    others = [whose for whose in troubles if not whose.endswith("track default")]
    printed = all(f"trouble: {whose}: " in box.cli(DAEMON, "status").stdout for whose in troubles)
    happened = f"other track: succeeded, shown: {printed}, others: {others}, bad lines: {bad_lines(box)}"
    expected = "other track: succeeded, shown: True, others: [], bad lines: 0"
    assert happened == expected, troubles
