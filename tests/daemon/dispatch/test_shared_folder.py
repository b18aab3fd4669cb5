"""A shared folder that goes away changes nothing, and no run fails for it, whatever lies in its place."""

import shutil
from pathlib import Path

import pytest
from sqlmodel import select

from daemon.state import run_files
from daemon.state.database import transaction
from daemon.state.ownership import ShareGone, installation_id
from daemon.state.states import RunState
from daemon.state.tables import Event
from daemon.system.clock import now_ms
from daemon.views.doctor import examine
from pipeline.contract import StepResult, StepSpec
from tests.daemon.dispatch.test_dispatcher import NOW, Box, ended


class Share:
    """The shared folder of a box, which can be taken away."""

    def __init__(self, box: Box, folder: Path) -> None:
        self.box, self.folder, self._aside = box, folder, folder.with_name("aside")
        folder.mkdir()

    def umount(self, place: str = "empty") -> None:
        """Take it away; in its place is a folder that the daemon may write to, `another` installation's, or nothing."""
        self.folder.rename(self._aside)
        if place != "missing":
            self.folder.mkdir()
        if place == "another":
            (self.folder / "instance").write_text("another")

    def mount(self) -> None:
        """Bring it back."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._aside.rename(self.folder)

    def left_there(self) -> list[Path]:
        """Return what lies in its place."""
        return [path for path in self.folder.rglob("*") if path.name != "instance"]


@pytest.fixture
def share(box: Box, tmp_path: Path) -> Share:
    """Give a box whose runs lie in a shared folder."""
    told = box.settings.executor.model_copy(update={"shared": str(tmp_path / "share")})
    box.settings = box.settings.model_copy(update={"executor": told})
    made = Share(box, tmp_path / "share")
    installation_id(box.settings)
    return made


def events(box: Box) -> int:
    with transaction(box.engine) as session:
        return len(session.exec(select(Event)).all())


@pytest.mark.parametrize("place", ["empty", "another", "missing"])
@pytest.mark.parametrize("step", ["prepare", "train", "merge", "evaluate", "decide"])
def test_nothing_is_changed_until_it_is_back(share: Share, step: str, place: str) -> None:
    box = share.box
    box.drop("a")
    while box.executor.steps[-1:] != [step]:
        box.ticks(1)
    share.umount(place)
    box.drop("b", "other")
    before, known = box.executor.steps, events(box)
    for turn in range(3):
        with pytest.raises(ShareGone, match="the shared folder is not mounted"):
            box.dispatcher.tick(NOW + turn)
    assert (box.run().state, box.executor.steps, events(box)) == (RunState.RUNNING, before, known)
    assert share.left_there() == []
    (found, *_) = examine(box.settings)
    assert (found.level, found.name) == ("bad", "shared folder")
    assert "withdraw" not in f"{found.text} {found.remedy}"
    share.mount()
    box.ticks()
    assert (box.run().outcome, box.run().failures, box.executor.steps[:5]) == (
        "promoted",
        0,
        ["prepare", "train", "merge", "evaluate", "decide"],
    )


@pytest.mark.parametrize("name", ["published", "read_result", "load_dataset"])
@pytest.mark.parametrize("step", ["prepare", "train", "merge", "evaluate", "decide"])
def test_nothing_is_concluded_from_a_file_that_is_missing_since_it_went_away(
    share: Share, step: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    box, real = share.box, getattr(run_files, name)
    box.drop("a")
    while box.executor.steps[-1:] != [step]:
        box.ticks(1)

    def leave_and_read(*arguments: object) -> object:
        share.umount()
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_files, name, leave_and_read)
        with pytest.raises(ShareGone):
            box.ticks()
    assert (box.run().state, box.executor.steps[-1:]) == (RunState.RUNNING, [step])
    share.mount()
    box.ticks()
    assert (box.run().outcome, box.run().failures, len(box.executor.steps)) == ("promoted", 0, 5)


@pytest.mark.parametrize("code", [1, 3, 137])
def test_a_step_that_fails_while_it_is_gone_is_done_again_and_no_failure(share: Share, code: int) -> None:
    box = share.box

    def fail(spec: StepSpec) -> StepResult:
        share.umount()
        with pytest.raises(ShareGone):
            box.dispatcher.tick(NOW)
        share.mount()
        return ended("failed", code)(spec)

    box.executor.script["merge"] = [fail]
    box.drop("a")
    box.ticks(40)
    run = box.run()
    assert (run.outcome, run.failures, run.deaths) == ("promoted", 0, 0)
    assert box.executor.steps.count("merge") == 2
    box.executor.script["merge"] = [ended("failed", code)]
    box.drop("b")
    for turn in range(12):
        box.ticks(1, now_ms() + turn)
        if box.run(2).failures or box.run(2).deaths:
            return
    pytest.fail("it was there all the time")
