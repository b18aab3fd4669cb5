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


@pytest.mark.timeout(180)
def test_a_change_of_the_settings_is_said_and_taken_over_by_a_reload_that_loses_no_step(workspace: Any) -> None:
    settings = workspace.folder / "dropforge.toml"
    before = settings.read_text()
    workspace.start()
    rows = b"".join(b'{"instruction": "say %d", "output": "x"}\n' % n for n in range(20))
    durable.write_bytes(workspace.inbox / "drop.jsonl", rows)
    attempt = workspace.state / "runs/1/attempts/prepare-1"
    workspace.wait(lambda: process_of(attempt))

    def trouble() -> str:
        note: dict[str, str] = durable.read_object(workspace.state / "troubles.json")
        return note.get("the settings", "")

    settings.write_text("retry.limit = 0\n" + before)
    workspace.wait(lambda: "the former settings stay in force" in trouble())
    workspace.daemon.send_signal(signal.SIGHUP)
    workspace.wait(lambda: b"reload_refused" in workspace.log.read_bytes())
    settings.write_text("retry.limit = 7\n" + before)
    workspace.wait(lambda: "retry.limit in" in trouble())
    command = f"kill -HUP {workspace.daemon.pid}"
    assert f"is not in force until: {command}" in trouble()
    for words in (("status",), ("config",), ("doctor",)):
        assert command in " ".join(workspace.cli(*words, code=None).split()), words
    assert workspace.log.read_bytes().count(b"daemon_ready") == 1
    workspace.daemon.send_signal(signal.SIGHUP)
    workspace.wait(lambda: workspace.log.read_bytes().count(b"daemon_ready") == 2)
    workspace.wait(lambda: not trouble())
    assert workspace.daemon.poll() is None
    workspace.wait(lambda: any(one.step == "prepare" and one.state == "published" for one in workspace.rows(Attempt)))
    (run,) = workspace.runs()
    assert (run.failures, run.deaths) == (0, 0)
    assert workspace.stop() == 0
    assert workspace.processes() == []
