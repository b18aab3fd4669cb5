"""Ending the real daemon in a hurry: a second signal, while its step hears nothing."""

import json
import os
import signal
from typing import Any

import pytest

from daemon.dispatch.attempt import process_of
from daemon.state.tables import Attempt
from pipeline import durable


@pytest.mark.timeout(120)
def test_a_second_signal_ends_the_daemon_now_and_the_run_goes_on_uncounted(workspace: Any) -> None:
    workspace.start()
    durable.write_bytes(
        workspace.inbox / "drop.jsonl", b"".join(b'{"instruction": "say %d", "output": "x"}\n' % n for n in range(20))
    )
    attempt = workspace.state / "runs/1/attempts/prepare-1"
    workspace.wait(lambda: process_of(attempt))
    step = process_of(attempt)
    assert step is not None
    # Stopped, it hears neither SIGTERM nor that its worker is gone.
    os.kill(step.pid, signal.SIGSTOP)
    workspace.daemon.send_signal(signal.SIGINT)
    workspace.wait(lambda: b"stop_requested" in workspace.log.read_bytes())
    workspace.daemon.send_signal(signal.SIGINT)
    assert workspace.daemon.wait() == 128 + signal.SIGINT
    assert workspace.processes() == [], "neither worker nor step is left"
    result = durable.read_json(workspace.state / "runs/1/attempts/prepare-1/result.json")
    assert result["status"] == "interrupted"
    for line in workspace.log.read_text().splitlines():
        assert {"event", "level", "timestamp"} <= json.loads(line).keys()
    workspace.start()
    workspace.wait(lambda: len(workspace.rows(Attempt)) == 2)
    (run,) = workspace.runs()
    assert (run.failures, run.deaths) == (0, 0)
    assert next(attempt.state for attempt in workspace.rows(Attempt)) == "interrupted"
    assert workspace.stop() == 0
    assert workspace.processes() == []
