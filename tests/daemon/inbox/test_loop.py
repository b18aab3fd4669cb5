"""The intake's thread takes first what needs no approval, and writes its texts when no file waits."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from daemon.inbox.loop import IntakeLoop
from daemon.state.database import transaction
from daemon.state.ownership import OwnFolder
from daemon.state.tables import Drop
from tests.daemon.inbox.test_intake import GOOD, Box


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path, intake={"settle_seconds": 0}, gate={"on": "pinned"})


@pytest.fixture
def loop(box: Box) -> IntakeLoop:
    return IntakeLoop(box.engine, box.settings, OwnFolder(box.settings.state_folder, "run"), lambda: None)


@pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="only root gives files away")
def test_what_needs_no_approval_is_taken_first(box: Box, loop: IntakeLoop) -> None:
    for number, name in enumerate(("theirs-1", "theirs-2")):
        os.chown(box.put(f"{name}.jsonl", GOOD[number : number + 1], "heldout"), 12345, 12345)
    box.put("own.jsonl", GOOD[2:], "heldout")
    box.put("train.jsonl", GOOD)
    loop._turn()
    assert [drop.name for drop in box.rows(Drop)] == ["own.jsonl", "train.jsonl", "theirs-1.jsonl", "theirs-2.jsonl"]


def begin_the_first(box: Box, _loop: IntakeLoop) -> None:
    with transaction(box.engine) as session:
        session.get_one(Drop, 1).first_run = 1


def make_room(_box: Box, loop: IntakeLoop) -> None:
    for disk in (loop._disk, loop._intake._disk):
        disk.low_water_bytes = 0


@pytest.mark.parametrize(
    ("limit", "why", "mend"),
    [
        ({"intake": {"max_waiting_drops": 1}}, "max_waiting_drops", begin_the_first),
        ({"disk": {"low_water_bytes": 10**15}}, "low_water", make_room),
    ],
)
def test_whatever_keeps_a_file_in_the_inbox_is_said_beside_it_until_it_can_be_taken(
    tmp_path: Path, limit: dict[str, dict[str, int]], why: str, mend: Callable[[Box, IntakeLoop], None]
) -> None:
    box = Box(tmp_path, **{**limit, "intake": {"settle_seconds": 0, **limit.get("intake", {})}})
    loop = IntakeLoop(box.engine, box.settings, OwnFolder(box.settings.state_folder, "run"), lambda: None)
    for number, name in enumerate(("a", "b")):
        box.put(f"{name}.jsonl", GOOD[number : number + 1])
    loop._turn()
    note = box.inbox / "b.jsonl.waits.txt"
    assert why in note.read_text()
    mend(box, loop)
    for _ in range(3):  # the limit is counted again, the file is taken, its note goes
        loop._turn()
    assert "b.jsonl" in box.files("done"), "it is tried at each scan"
    assert not note.exists()


def test_texts_follow_when_no_file_has_come_in(box: Box, loop: IntakeLoop) -> None:
    loop._turn()
    note = box.inbox / "done" / "a.jsonl.verdict.txt"
    box.put("a.jsonl", GOOD)
    loop._turn()
    assert box.files("done") == ["a.jsonl", "a.jsonl.receipt.json"], "the next file need not wait for a note"
    loop._turn()
    assert note.exists()


def test_a_state_folder_that_was_taken_away_is_no_trouble_of_the_intake(box: Box) -> None:
    poked: list[bool] = []
    state = box.settings.state_folder
    loop = IntakeLoop(box.engine, box.settings, OwnFolder(state, "run"), lambda: poked.append(True))
    state.rename(state.with_name("elsewhere"))
    box.put("a.jsonl", GOOD)
    with structlog.testing.capture_logs() as logged:
        loop._turn()
    assert (logged, poked) == ([], [True]), "the main loop ends the daemon, with one line"
