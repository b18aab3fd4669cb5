"""The current errors: each is told once, and what failed is tried again after a minute."""

import structlog

from daemon.state.troubles import Troubles
from pipeline.errors import DropforgeError


def test_a_trouble_is_told_once_and_pauses_for_a_minute() -> None:
    now = [100.0]
    troubles = Troubles(lambda: now[0])
    gone = FileNotFoundError(2, "No such file or directory", "/a/file")
    with structlog.testing.capture_logs() as told:
        for _ in range(3):
            troubles.note("track a", gone)
    assert [(line["whose"], line["error"]) for line in told] == [("track a", "/a/file: No such file or directory")]
    assert (troubles.is_pausing("track a"), troubles.is_pausing("track b")) == (True, False)
    now[0] += 60
    assert not troubles.is_pausing("track a")
    troubles.note("track a", DropforgeError("it has no base"))
    assert troubles.words == {"track a": "it has no base"}
    troubles.clear("track a")
    assert (troubles.words, troubles.is_pausing("track a")) == ({}, False)
