"""No events at all, as after far more files than the kernel keeps events for: the timer alone finds every file."""

from pathlib import Path

import pytest
from watchdog.observers.api import BaseObserver, EventEmitter

from daemon.inbox import watcher
from daemon.inbox.loop import IntakeLoop
from daemon.state.ownership import OwnFolder
from daemon.state.tables import Drop
from tests.daemon.inbox.test_intake import Box
from tests.slurm.cluster import wait_for

FILES = 30


class Deaf(EventEmitter):
    """Watches a folder and never says anything."""

    def queue_events(self, timeout: float) -> None:
        self.stopped_event.wait(timeout)


def test_without_any_event_the_timer_alone_finds_every_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "_ArrivalsObserver", lambda: BaseObserver(Deaf))
    box = Box(tmp_path, intake={"settle_seconds": 0.5}, reconcile_seconds=0.1)
    loop = IntakeLoop(box.engine, box.settings, OwnFolder(box.settings.state_folder, "run"), lambda: None)
    loop.start()
    wait_for((box.inbox / "README.txt").exists)  # it has looked before a file is there
    try:
        for number in range(FILES):
            box.put(f"{number}.jsonl", [{"instruction": f"say {number}", "output": "x"}])
        wait_for(lambda: not list(box.inbox.glob("*.jsonl")))
    finally:
        loop.finish()
    assert sorted(drop.name for drop in box.rows(Drop)) == sorted(f"{number}.jsonl" for number in range(FILES))
    assert {drop.state for drop in box.rows(Drop)} == {"accepted"}
