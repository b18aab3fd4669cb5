"""Lists on a terminal of 80 columns: no line is wider, whatever the files are called, and no number is cut."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from daemon.queue import run_queue
from tests import run_owner
from tests.daemon.conftest import lines

SCRIPT = Path(sys.executable).parent / "dropforge"
ODD = "学習データ" * 6 + "\u202e😀 é.jsonl"


def on_terminal(folder: Path, *arguments: str) -> list[str]:
    """Return what the command prints on a terminal of 80 columns, without its colours."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color"}
    subprocess.run([SCRIPT, *arguments], cwd=folder, stdout=theirs, env=environment, check=False, timeout=120)
    os.close(theirs)
    printed = b""
    with os.fdopen(ours, "rb", buffering=0) as reader, contextlib.suppress(OSError):
        while part := reader.read(1000):
            printed += part
    return re.sub("\x1b\\[[0-9;]*m", "", printed.decode()).splitlines()


@pytest.fixture
def odd(lived_in: Any) -> Any:
    """The workspace `lived_in` with drops and runs in high numbers, and a file of an odd name."""
    claim = run_queue.rescue(lived_in.engine, lived_in.tick())[0]
    ending = run_queue.Ending("not_shown_better", "a sentence that is longer than any line of a list " * 3, gain=-12.3)
    run_owner.finish(lived_in.engine, claim, ending, lived_in.tick())
    lived_in.take(ODD, lines("x"))
    return lived_in


@pytest.mark.parametrize("arguments", [("runs",), ("drops",), ("history",), ("status",), ("show", "1")])
def test_no_line_of_a_table_is_wider_than_the_terminal(odd: Any, arguments: tuple[str, ...]) -> None:
    printed = "\n".join(on_terminal(odd.folder, *arguments))
    tables = [part for part in printed.split("\n\n") if re.match(r"[A-Z]{3,} +[A-Z]{2,}", part)]
    assert tables
    rows = [line for table in tables for line in table.split("\n") if not line.startswith(("run ", "track "))]
    assert [line for line in rows if cell_len(line) > 80] == []


def test_a_verdict_in_a_list_is_a_word_and_a_number(odd: Any) -> None:
    for command in ("runs", "status"):
        text = "\n".join(on_terminal(odd.folder, command))
        assert "not better −12.3" in text
        assert "promoted +40.0" in text
        assert "longer than any line" not in text
    assert "+40.0 points" in "\n".join(on_terminal(odd.folder, "history"))


def test_a_gain_beside_a_failed_guard_is_said_to_be_the_tasks(lived_in: Any) -> None:
    claim = run_queue.rescue(lived_in.engine, lived_in.tick())[0]
    sentence = "guard failed (builtin −6.0 points): +47.6 points on the task"
    run_owner.finish(lived_in.engine, claim, run_queue.Ending("guard_failed", sentence, gain=47.6), lived_in.tick())
    for command in ("runs", "status"):
        (line,) = (line for line in on_terminal(lived_in.folder, command) if "guard failed" in line)
        assert line.endswith("guard failed, task +47.6")
        assert cell_len(line) <= 80


def test_a_list_of_runs_says_that_a_model_answers_questions_with_labels(lived_in: Any) -> None:
    claim = run_queue.rescue(lived_in.engine, lived_in.tick())[0]
    labels = "; answers 18 of 38 general questions with a label of the training data"
    ending = run_queue.Ending("not_shown_better", f"not shown better: +4.7 points{labels}", gain=4.7)
    run_owner.finish(lived_in.engine, claim, ending, lived_in.tick())
    for command in ("runs", "status"):
        text = " ".join(" ".join(line.split()) for line in on_terminal(lived_in.folder, command))
        assert f"not better +4.7{labels}" in text


def test_an_odd_name_is_shown_in_its_column_and_escaped(odd: Any) -> None:
    text = "\n".join(on_terminal(odd.folder, "drops"))
    assert "学習データ" in text
    assert "\u202e" not in text
    assert "heldout/exam.jsonl" in text
