"""`watch`: the text of `status` on a terminal, a line per change elsewhere."""

import os
import signal
import subprocess
import sys
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import pytest

from daemon.cli.status import print_status
from daemon.cli.wait import print_changes
from daemon.state import run_files
from daemon.state.database import transaction
from daemon.state.layout import TROUBLES_NOTE
from daemon.state.tables import Run
from daemon.system.processes import FileLock
from daemon.views.overview import Overview
from pipeline import durable
from pipeline.contract import JOB_STATE_NAME, PROGRESS_NAME
from tests.daemon.cli.conftest import running

#: Whoever starts the tests in the background has them ignore SIGINT, and so would what they start.
WATCH = ["env", "--default-signal=INT", str(Path(sys.executable).parent / "dropforge"), "watch"]


def test_a_line_is_printed_once_for_what_changes(busy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    overview, said = Overview.of(busy.settings), dict[object, str]()

    def told() -> str:
        print_changes(overview, said)
        return capsys.readouterr().out

    first = told()
    for words in (
        "run 1 of track default: promoted: +40.0 points (+28.5 to +51.5)",
        "run 2 of track default: failed: out of memory",
        "run 3: train 12/30, loss 0.500, dev loss 0.600",
        "run 5 of track support is queued: track support is paused by ada",
    ):
        assert words in first
    assert told() == ""
    for done, words in ((13, ""), (14, "run 3: train 14/30"), (14, ""), (16, "run 3: train 16/30")):
        busy.progress(busy.settings.state_folder / "runs/3/attempts/train-1", done)
        assert told().partition(" ")[2].partition(",")[0] == words, "a line each 5 %"
    busy.attempt_ended()
    assert "run 3: train took" in told()
    merging = busy.attempt(running(busy), "merge", None)
    (merging / PROGRESS_NAME).unlink()
    assert told().partition(" ")[2] == "run 3: merge\n", "it has begun, and has counted nothing yet"
    durable.write_json(merging / PROGRESS_NAME, {"step": "merge"})
    assert told() == "", "the same words are printed once"


def test_the_run_that_has_just_ended_is_told_though_many_later_ones_ended_before(
    busy: Any, dropforge: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    overview, said = Overview.of(busy.settings), dict[object, str]()
    ended: dict[str, Any] = {
        "track": "support",
        "state": "succeeded",
        "trigger": "drop",
        "created_at": 1,
        "not_before": 1,
    }
    with transaction(busy.engine) as session:
        session.add_all([Run(**ended, id=100 + number, ended_at=busy.now) for number in range(10)])
    print_changes(overview, said)
    capsys.readouterr()
    busy.fail(running(busy))
    print_changes(overview, said)
    assert "run 3 of track default: failed: out of memory" in capsys.readouterr().out
    assert dropforge("status", "--json").json["latest"][0]["id"] == 3


def test_it_says_where_the_job_of_a_step_runs_and_why_it_waits(
    busy: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noon(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Noon":
            return cls(2026, 11, 27, 12, tzinfo=tz)

    monkeypatch.setattr(run_files, "datetime", Noon)
    overview, said = Overview.of(busy.settings), dict[object, str]()
    folder = busy.settings.state_folder / "runs/3/attempts/train-1"
    (folder / PROGRESS_NAME).unlink()

    def told(state: str, reason: str, nodes: str, hour: int, day: int = 27) -> tuple[str, str]:
        since = round(Noon.now().replace(day=day, hour=hour, minute=2).timestamp() * 1000)
        job = {"job": 4711, "state": state, "reason": reason, "nodes": nodes, "since": since}
        durable.write_hint(folder / JOB_STATE_NAME, job)
        print_changes(overview, said)
        line = capsys.readouterr().out.splitlines()[-1].partition(" ")[2]
        print_status(busy.settings, overview)
        return line, next(line for line in capsys.readouterr().out.splitlines() if line.startswith("3 "))

    print_changes(overview, said)
    for state, words in (
        (("PENDING", "None", "", 9), "train waits in Slurm, job 4711, since 09:02"),
        (("PENDING", "Priority", "", 9), "train waits in Slurm (Priority), job 4711, since 09:02"),
        (("PENDING", "Priority", "", 14, 26), "train waits in Slurm (Priority), job 4711, since 2026-11-26 14:02"),
        (("SUSPENDED", "None", "n2", 9), "train on n2 (suspended)"),
        (("RUNNING", "None", "n2", 9), "train on n2"),
    ):
        line, row = told(*state)
        assert (line, words in row) == (f"run 3: {words}", True), row
    busy.progress(folder, 12)
    with transaction(busy.engine) as session:
        session.get_one(Run, 3).error = "Slurm ended job 4710"
    line, row = told("RUNNING", "None", "n2", 9)
    assert line.startswith("run 3: train 12/30 on n2, loss 0.500")
    assert row.endswith("; before that: Slurm ended job 4710")


def test_what_comes_back_is_told_again(busy: Any, daemon_lock: FileLock, capsys: pytest.CaptureFixture[str]) -> None:
    overview, said = Overview.of(busy.settings), dict[object, str]()
    troubles = busy.settings.state_folder / TROUBLES_NOTE

    def told() -> list[str]:
        print_changes(overview, said)
        return [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()]

    (runs, *_) = told()
    for _ in range(2):
        daemon_lock.release()
        assert told() == ["the daemon is not running"]
        assert daemon_lock.acquire()
        assert told() == [runs]
        durable.write_json(troubles, {"disk": "it is full"})
        assert told() == ["trouble: disk: it is full"]
        troubles.unlink()
        assert told() == []


def test_on_a_terminal_it_is_the_text_of_status_and_ctrl_c_ends_it(busy: Any) -> None:
    ours, theirs = os.openpty()
    with subprocess.Popen(WATCH, cwd=busy.folder, stdout=theirs, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(theirs)
        shown = b""
        while shown.count(b"\x1b[2J") < 2:
            shown += os.read(ours, 10_000)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    os.close(ours)
    for words in ("daemon: running, process ", "train 12/30", "promoted: +40.0"):
        assert words in shown.decode()


def test_as_a_pipe_it_prints_lines_and_ctrl_c_ends_it(busy: Any) -> None:
    with subprocess.Popen(WATCH, cwd=busy.folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen: list[str] = []
        while "run 5" not in (seen or [""])[-1]:
            seen.append(process.stdout.readline())
        assert not any("\x1b" in line for line in seen)
        busy.attempt_ended()
        while "train took" not in seen[-1]:
            seen.append(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
