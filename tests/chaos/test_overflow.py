"""No events at all, as after far more files than the kernel keeps events for: each file is accounted for, once."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.inbox.answers.verdict_notes import VERDICT
from tests.e2e.conftest import Workspace

_SETTINGS = """
trigger = "nightly"
reconcile_seconds = 1
[intake]
settle_seconds = 0.5
max_waiting_drops = 100000
"""
FILES = 300
#: A daemon whose observer watches every folder and never says anything.
DEAF = """
import sys
from watchdog.observers.api import BaseObserver, EventEmitter
import daemon.inbox.watcher
from daemon.cli import main

class Deaf(EventEmitter):
    def queue_events(self, timeout):
        self.stopped_event.wait(timeout)

daemon.inbox.watcher._ArrivalsObserver = lambda: BaseObserver(Deaf)
sys.argv[0] = "dropforge"
sys.exit(main())
"""


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Workspace]:
    made = Workspace(tmp_path, _SETTINGS)
    yield made
    if made.daemon is not None and made.daemon.poll() is None:
        made.stop()


def drop(inbox: Path) -> dict[str, str]:
    """Drop files, each third one by renaming it in; return what must become of each."""
    expected = {}
    for number in range(FILES):
        name, text = f"{number}.jsonl", json.dumps({"instruction": f"say {number}", "output": "x"}) + "\n"
        expected[name] = "accepted"
        if number % 10 == 3:
            text, expected[name] = f'{{"instruction": "{number}"}}\n', "rejected"
        elif number % 10 == 7:
            text, expected[name] = json.dumps({"instruction": f"say {number - 1}", "output": "x"}) + "\n", "duplicate"
        aside = inbox / (f".{name}.part" if number % 3 == 0 else name)
        aside.write_text(text)
        if aside.name != name:
            aside.rename(inbox / name)
    return expected


def left(inbox: Path) -> int:
    return sum(path.is_file() for path in inbox.iterdir() if path.name != "README.txt")


def assert_accounted_for(house: Workspace, expected: dict[str, str]) -> None:
    """Every file has one row, one place, and the answer that belongs to it."""
    rows = house.drops()
    assert Counter(row.name for row in rows) == Counter(expected.keys())
    # Which of two files with the same content came first is told by their change times, to a clock tick.
    states = Counter(row.state for row in rows)
    assert states == Counter(expected.values())
    assert {row.name for row in rows if row.state == "rejected"} == {
        name for name, state in expected.items() if state == "rejected"
    }
    for row in rows:
        folder, ending = ("rejected", "errors") if row.state == "rejected" else ("done", "receipt")
        answer = json.loads((house.inbox / folder / f"{row.name}.{ending}.json").read_text())
        assert (answer["drop"], answer["state"], answer["name"]) == (row.id, row.state, row.name)
    places = {
        folder: {path.name for path in (house.inbox / folder).glob("[!.]*") if not path.name.endswith(VERDICT)}
        for folder in ("done", "rejected")
    }
    assert places["done"] & expected.keys() == {row.name for row in rows if row.state != "rejected"}
    assert places["rejected"] & expected.keys() == {row.name for row in rows if row.state == "rejected"}
    assert sum(map(len, places.values())) == 2 * len(expected), "a file and its answer, nothing else"


@pytest.mark.timeout(180)
def test_without_any_event_the_timer_alone_finds_every_file(house: Workspace) -> None:
    house.program = ["-P", "-c", DEAF]
    house.start()
    expected = drop(house.inbox)
    house.wait(lambda: left(house.inbox) == 0)
    assert house.stop() == 0
    assert_accounted_for(house, expected)
