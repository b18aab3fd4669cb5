"""A base model that goes away, as with its disk: its runs wait, none fails, and they go on when it is back."""

import shutil
from pathlib import Path

import pytest

from daemon.state.states import RunState
from pipeline.contract import StepResult, StepSpec
from tests.daemon.dispatch.test_dispatcher import NOW, Box, ended

HOUR = 3_600_000


class Disk:
    """The disk of a box's base model."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._aside = folder, folder.with_name("aside")

    def umount(self, place: str) -> None:
        """Take it away; in its place is an `empty` folder, or nothing."""
        self._folder.rename(self._aside)
        if place == "empty":
            self._folder.mkdir()

    def mount(self) -> None:
        """Bring it back."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._aside.rename(self._folder)


@pytest.fixture
def disk(box: Box) -> Disk:
    return Disk(Path(box.settings.base_model))


@pytest.mark.parametrize("place", ["empty", "missing"])
@pytest.mark.parametrize("code", [None, 1, 65, 137])
@pytest.mark.parametrize("step", ["prepare", "train", "evaluate"])
def test_its_runs_wait_and_say_why(box: Box, disk: Disk, step: str, code: int | None, place: str) -> None:
    def leave(spec: StepSpec) -> StepResult:
        disk.umount(place)
        return box.executor.good(spec) if code is None else ended("failed", code)(spec)

    box.executor.script[step] = [leave]
    box.drop("a")
    box.ticks()
    run = box.run()
    assert (run.state, run.failures, run.deaths) == (RunState.WAITING, 0, 0)
    assert run.error == f"the base model {box.settings.base_model} is away: it has no config.json"
    assert run.hint is not None
    assert run.hint.endswith("dropforge cancel 1")
    assert box.executor.steps[-1] == step
    box.ticks(now=NOW + HOUR)
    assert (box.run().state, box.executor.steps[-1]) == (RunState.WAITING, step)
    box.drop("b")
    box.ticks(now=NOW + 2 * HOUR)
    assert "base model of track default" in box.dispatcher.upkeep._troubles.words
    assert (box.run(2).state, box.run(2).failures) == (RunState.QUEUED, 0)
    disk.mount()
    box.ticks(now=NOW + 3 * HOUR)
    assert (box.run().outcome, box.run().failures, box.run().deaths) == ("promoted", 0, 0)
