"""What somebody has against them is told once, and the pauses grow."""

from pathlib import Path

import structlog

from daemon.state.troubles import RunsApart, Troubles
from pipeline.errors import DropforgeError


def test_a_trouble_is_told_once_its_pause_grows_to_ten_minutes_and_a_good_turn_ends_both() -> None:
    now = [100.0]
    troubles = Troubles(lambda: now[0])
    gone = FileNotFoundError(2, "No such file or directory", "/a/file")
    with structlog.testing.capture_logs() as told:
        pauses = [troubles.note("track a", gone) for _ in range(7)]
    assert pauses == [30, 60, 120, 240, 480, 600, 600]
    assert [(line["whose"], line["error"]) for line in told] == [("track a", "/a/file: No such file or directory")]
    assert (troubles.is_pausing("track a"), troubles.is_pausing("track b")) == (True, False)
    now[0] += 600
    assert not troubles.is_pausing("track a")
    assert troubles.words == {"track a": "/a/file: No such file or directory"}
    troubles.clear("track a")
    assert troubles.words == {}
    assert troubles.note("track a", DropforgeError("it has no base")) == 30
    assert troubles.words == {"track a": "it has no base"}


def test_each_run_has_pauses_of_its_own(tmp_path: Path) -> None:
    apart = RunsApart(tmp_path)
    error = PermissionError(13, "Permission denied", "runs/1/prepare.json")
    assert [apart.words(run, error).pause_ms for run in (1, 1, 2, 1)] == [30_000, 60_000, 30_000, 120_000]
    apart.clear(1)
    assert apart.words(1, error).pause_ms == 30_000
