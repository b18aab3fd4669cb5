"""Several runs at once: of each track one, at most as many as executor.parallel says."""

import os
from types import SimpleNamespace

import pytest
from sqlalchemy import Engine

from daemon.dispatch.spool import JobState
from daemon.settings.model import DiskSettings, Settings
from daemon.settings.sections import ExecutorSettings
from daemon.state.states import RunState
from daemon.storage.disk_estimate import needed_bytes
from pipeline.contract import StepSpec
from tests.daemon.dispatch.test_dispatcher import NOW, Box, ScriptedExecutor


class HeldExecutor(ScriptedExecutor):
    """Does the steps of a run only once the run is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.gone: set[int] = set()

    def poll(self, spec: StepSpec) -> JobState:
        return super().poll(spec) if spec.run in self.gone else JobState.RUNNING


class ParallelBox(Box):
    """A workspace of three tracks and two runs at once, whose runs are let go one by one."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        tracks = {"tracks": {"a": {}, "b": {}}, "executor": ExecutorSettings(parallel=2)}
        self.held = HeldExecutor()
        super().__init__(engine, settings.model_copy(update=tracks), self.held)

    def states(self, *runs: int) -> list[str]:
        return [self.run(number).state for number in runs]

    def let_go(self, run: int) -> None:
        self.held.gone.add(run)
        self.ticks()


@pytest.fixture
def box(engine: Engine, settings: Settings) -> ParallelBox:
    return ParallelBox(engine, settings)


def test_two_tracks_run_at_once_and_the_third_and_a_tracks_next_run_wait(box: ParallelBox) -> None:
    box.drop("one")
    box.drop("two", "a")
    box.drop("three", "b")
    box.ticks(1)
    assert box.states(1, 2, 3) == [RunState.RUNNING, RunState.RUNNING, RunState.QUEUED]
    assert box.dispatcher.describe() == "run 1 prepare; run 2 prepare"
    box.drop("four")
    box.let_go(2)
    assert box.states(1, 2, 3, 4) == [RunState.RUNNING, RunState.SUCCEEDED, RunState.RUNNING, RunState.QUEUED]
    box.let_go(3)
    assert box.states(1, 4) == [RunState.RUNNING, RunState.QUEUED], "of a track one run at a time"
    box.let_go(1)
    assert box.states(1, 4) == [RunState.SUCCEEDED, RunState.RUNNING]
    box.let_go(4)
    assert sorted(row.track for row in box.promotions()) == ["a", "b", "default", "default"]


def test_all_running_runs_go_on_after_a_restart_and_wait_after_a_shutdown(box: ParallelBox) -> None:
    box.drop("one")
    box.drop("two", "a")
    box.ticks()
    again = box.new_dispatcher()
    assert again.claimed == {1, 2}
    again.abandon(NOW)
    assert box.states(1, 2) == [RunState.WAITING, RunState.WAITING]
    assert again.idle
    assert sorted(box.held.cancelled) == ["1-prepare-1", "2-prepare-1"]


def test_a_run_begins_only_with_room_for_what_the_running_ones_still_need(
    box: ParallelBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.settings = box.settings.model_copy(update={"disk": DiskSettings(low_water_bytes=0)})
    need = sum(needed_bytes(box.settings.track("a")).values())
    monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_bavail=2 * need - 1, f_frsize=1))
    box.drop("one")
    box.drop("two", "a")
    box.ticks()
    assert box.states(1, 2) == [RunState.RUNNING, RunState.QUEUED]
    assert "run 1 " in str(box.run(2).error)
    monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_bavail=2 * need, f_frsize=1))
    box.ticks(now=NOW + 60_000)
    assert box.states(1, 2) == [RunState.RUNNING, RunState.RUNNING]
