"""Lists on a terminal: no line is wider than 80 columns, whatever the files are called, and no number is cut."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from daemon.cli.output import print_table
from tests.daemon.cli.conftest import end_running
from tests.daemon.conftest import SCRIPT, lines

ODD = "学習データ" * 6 + "\u202e😀 é.jsonl"
LABEL = "answers 18 of 38 general questions with a label of the training data"
LABELS = {
    "guard": "collapse",
    "about": ["questions"],
    "unit": "records",
    "records": 38,
    "candidate": 18,
    "p_value": 0.0001,
    "parts": {"label": 18},
    "state": "shown",
}
LOST = {"guard": "general", "about": ["builtin"], "unit": "points", "change": -6.0, "state": "failed"}


def on_terminal(folder: Path, *argv: str | Path, columns: int = 80, terminal: str = "xterm-256color") -> str:
    """Return what a command prints on a terminal, without its colours."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "LINES": "24", "TERM": terminal}
    subprocess.run(argv, cwd=folder, stdout=theirs, env=environment, check=False, timeout=120)
    os.close(theirs)
    printed = b""
    # The other side is closed: an error ends what is left there.
    with os.fdopen(ours, "rb", buffering=0) as reader, contextlib.suppress(OSError):
        while part := reader.read(1000):
            printed += part
    return re.sub("\x1b\\[[0-9;]*m", "", printed.decode()).replace("\r\n", "\n")


def test_no_line_of_a_table_is_wider_than_the_terminal(lived_in: Any) -> None:
    end_running(lived_in, "not_shown_better", -12.3)
    lived_in.take(ODD, lines("x"))
    shown = {command: on_terminal(lived_in.folder, SCRIPT, command) for command in ("status", "drops", "history")}
    for printed in shown.values():
        tables = [part for part in printed.split("\n\n") if re.match(r"[A-Z]{3,} +[A-Z]{2,}", part)]
        assert tables
        rows = [line for table in tables for line in table.split("\n") if not line.startswith(("run ", "track "))]
        assert [line for line in rows if cell_len(line) > 80] == []
    for words in ("not shown better: −12.3", "promoted: +40.0"):
        assert words in shown["status"]
    assert [words in shown["drops"] for words in ("学習データ", "heldout/exam.js", "\u202e")] == [True, True, False]


@pytest.mark.parametrize(
    ("outcome", "guard", "words"),
    [
        ("guard_failed", LOST, "guard failed (builtin −6.0 points): +47.6 points on the task"),
        (
            "not_shown_better",
            LABELS,
            f"not shown better: +47.6 points; {LABEL}",
        ),
    ],
)
def test_a_verdict_in_a_list_is_a_few_words(
    lived_in: Any, dropforge: Callable[..., Any], outcome: str, guard: dict[str, Any], words: str
) -> None:
    end_running(lived_in, outcome, 47.6, guards=(guard,))
    for command in ("runs", "status"):
        assert f"{words}\n" in dropforge(command).out


@pytest.mark.parametrize(("columns", "terminal"), [(20, "dumb"), (80, "xterm")])
def test_a_narrow_terminal_cuts_names_and_no_number(tmp_path: Path, columns: int, terminal: str) -> None:
    printing = (
        "from daemon.cli.output import print_table\n"
        "heads = ('DROP', 'STATE', 'SINCE', 'RUN', 'RECEIVED', 'NAME', '')\n"
        "cells = (1234567, 'withdrawn', 'a' * 18, 7654321, '2026-11-25 10:10:10', 'name' * 40, 'because ' * 9)\n"
        "print_table(heads, [cells])"
    )
    printed = on_terminal(tmp_path, sys.executable, "-c", printing, columns=columns, terminal=terminal)
    row = printed.splitlines()[1].split()
    assert row[:6] == ["1234567", "withdrawn", "a" * 18, "7654321", "2026-11-25", "10:10:10"]
    assert (row[6].startswith("namename"), row[6].endswith("…"), row[7]) == (True, True, "because")


def test_a_long_sentence_clips_no_other_cell_where_no_terminal_reads(capsys: pytest.CaptureFixture[str]) -> None:
    sentence = "worse " * 300 + "end"
    print_table(("TRACK", "GENERATION", "WHY"), [("default", 12, sentence)])
    assert capsys.readouterr().out.splitlines()[1].split(maxsplit=2) == ["default", "12", sentence]
