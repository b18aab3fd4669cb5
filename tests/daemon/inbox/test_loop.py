"""The intake's thread takes first what needs no approval, and writes its texts when no file waits."""

import os
from pathlib import Path

import pytest

from daemon.inbox.loop import IntakeLoop
from daemon.state.tables import Drop
from tests.daemon.inbox.test_intake import GOOD, Box


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path, intake={"settle_seconds": 0}, gate={"on": "pinned"})


@pytest.fixture
def loop(box: Box) -> IntakeLoop:
    return IntakeLoop(box.engine, box.settings, lambda: None)


@pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="only root gives files away")
def test_what_needs_no_approval_is_taken_first(box: Box, loop: IntakeLoop) -> None:
    for number, name in enumerate(("theirs-1", "theirs-2")):
        os.chown(box.put(f"{name}.jsonl", GOOD[number : number + 1], "heldout"), 12345, 12345)
    box.put("own.jsonl", GOOD[2:], "heldout")
    box.put("train.jsonl", GOOD)
    loop._turn()
    assert [drop.name for drop in box.rows(Drop)] == ["own.jsonl", "train.jsonl", "theirs-1.jsonl", "theirs-2.jsonl"]


def test_texts_follow_when_no_file_has_come_in(box: Box, loop: IntakeLoop) -> None:
    loop._turn()
    note = box.inbox / "done" / "a.jsonl.verdict.txt"
    box.put("a.jsonl", GOOD)
    loop._turn()
    assert box.files("done") == ["a.jsonl", "a.jsonl.receipt.json"], "the next file need not wait for a note"
    loop._turn()
    assert note.exists()
