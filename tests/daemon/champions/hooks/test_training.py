"""The commands around what needs the GPU: real processes, real rows; nothing waits for the clock."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sqlmodel import col, select

from daemon.champions.hooks.changes import Hooks
from daemon.champions.hooks.training import TrainingHooks, is_gpu_lent
from daemon.queue import run_queue
from daemon.settings.load import load
from daemon.settings.model import SettingsError
from daemon.state.database import transaction
from daemon.state.tables import Run
from daemon.state.troubles import Troubles
from daemon.system.processes import identify
from pipeline import durable
from pipeline.contract import CLAIM_NAME, RESULT_NAME, StepError, StepResult
from tests.chaos.house import START, Daemon, build, records, result_of, work
from tests.run_owner import spool_of
from tests.settled_hooks import settle

TELL = """
import os, sys
run = os.environ.get("TRAINING_RUN") or os.environ["PROMOTION_RUN"]
open(sys.argv[1], "a").write(f"{sys.argv[2]} {run}\\n")
"""
MINUTE = 60_000


def tell(folder: Path, word: str, code: str = "") -> list[str]:
    return [sys.executable, "-c", f"{TELL}\n{code}", str(folder / "told"), word]


class Box:
    """A workspace whose settings name commands around a training, and a drop in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = START
        self.clock = 0.0
        build(folder)
        (folder / "inbox" / "a.jsonl").write_bytes(records("a"))
        self._settings = (folder / "dropforge.toml").read_text()

    def start(self, before: list[str] | None = None, after: list[str] | None = None, more: str = "") -> "Box":
        """Start a daemon, after one that was killed too."""
        before = tell(self.folder, "before") if before is None else before
        after = tell(self.folder, "after") if after is None else after
        (self.folder / "dropforge.toml").write_text(
            f"{self._settings}[hooks]\nbefore_training = {json.dumps(before)}\nafter_training = {json.dumps(after)}\n"
            f"{more}"
        )
        self.daemon = Daemon(self.folder, self.now)
        self.dispatcher = self.daemon.dispatcher
        self.troubles = Troubles(lambda: self.clock)
        self.dispatcher._gpu = TrainingHooks(self.daemon.engine, self.daemon.settings, self.troubles)
        self.daemon.take_in(self.now)
        return self

    def tick(self) -> None:
        """Let the dispatcher do what it can, and a command end that it began."""
        self.now += 1
        self.dispatcher.tick(self.now)
        running = self.dispatcher._gpu._running
        if running is not None:
            running[1].wait()

    def settle(self, outcome: str = "not_shown_better") -> dict[str, list[str]]:
        """Let all go on until nothing does; return what the commands had said as each step was done."""
        seen: dict[str, list[str]] = {}
        for _ in range(60):
            self.tick()
            seen |= {spec.step: self.told() for spec in work(self.daemon.root, outcome)}
        return seen

    def until(self, step: str) -> None:
        for _ in range(60):
            self.tick()
            if list((self.daemon.root / "spool" / "queue").glob(f"*-{step}-*.json")):
                return
            work(self.daemon.root, "not_shown_better")
        message = f"step {step} was not ordered"
        raise AssertionError(message)

    def told(self) -> list[str]:
        path = self.folder / "told"
        return path.read_text().splitlines() if path.exists() else []

    def run(self) -> Run:
        with transaction(self.daemon.engine) as session:
            return session.exec(select(Run).order_by(col(Run.id))).all()[-1]

    def is_lent(self) -> bool:
        return is_gpu_lent(self.daemon.root)


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_the_gpu_is_freed_before_the_training_and_given_back_after_the_evaluation(box: Box) -> None:
    seen = box.start().settle()
    assert seen["prepare"] == []
    assert seen["train"] == seen["merge"] == seen["evaluate"] == ["before 1"]
    assert box.told() == ["before 1", "after 1"]
    assert box.run().outcome == "not_shown_better"
    assert not box.is_lent()


def test_a_command_that_cannot_free_the_gpu_lets_the_run_wait_and_it_goes_on_once_that_is_mended(box: Box) -> None:
    box.start(tell(box.folder, "before", "print('vllm.service is masked'); raise SystemExit(5)")).settle()
    run = box.run()
    assert run.state == "waiting"
    assert run.error == "hooks.before_training failed: exit code 5: vllm.service is masked"
    assert "hooks.before_training" in box.troubles.words
    assert run.failures == 0
    # That it failed says nothing of how far it came: the GPU is given back.
    assert box.told() == ["before 1", "after 1"]
    assert not box.is_lent()
    box.now += 10 * MINUTE
    assert "train" in box.start().settle()
    assert box.run().outcome == "not_shown_better"
    assert box.troubles.words == {}


def test_a_gpu_that_cannot_be_given_back_is_tried_again_and_trains_on_meanwhile(box: Box) -> None:
    fails_once = "import pathlib\np = pathlib.Path(sys.argv[1] + '.mended')\nsys.exit(0 if p.exists() else 3)"
    box.start(after=tell(box.folder, "after", fails_once)).settle()
    assert box.told() == ["before 1", "after 1"]
    assert "exit code 3" in box.troubles.words["hooks.after_training"]
    assert box.is_lent()
    # The next run asks again for what it needs: nobody knows how far the command came.
    (box.folder / "inbox" / "b.jsonl").write_bytes(records("b"))
    box.daemon.take_in(box.now)
    box.settle()
    assert box.told() == ["before 1", "after 1", "before 2"]
    (box.folder / "told.mended").touch()
    box.clock += 3600
    box.settle()
    assert box.told() == ["before 1", "after 1", "before 2", "after 2"]
    assert box.troubles.words == {}
    assert not box.is_lent()


def test_runs_that_overlap_give_the_gpu_back_before_another_begins_where_a_new_champion_waits(box: Box) -> None:
    told = json.dumps(tell(box.folder, "promoted"))
    box.start(more=f"after_promotion = {told}\n[executor]\nparallel = 2\n[tracks.b]\n[tracks.c]\n")
    for track in ("b", "c"):
        (box.folder / "inbox" / track / "a.jsonl").write_bytes(records(track))
    box.daemon.take_in(box.now)
    spool = spool_of(box.daemon.root)
    for _ in range(30):
        box.tick()
        for spec in [spec for spec in spool.orders() if spec.run == 1]:
            durable.write_json(
                box.daemon.root / spec.folder / RESULT_NAME, result_of(spec, "promoted").model_dump(mode="json")
            )
            spool.entry(spec.key).unlink()

    def states() -> list[str]:
        with transaction(box.daemon.engine) as session:
            return [run.state for run in session.exec(select(Run).order_by(col(Run.id)))]

    assert states() == ["succeeded", "running", "queued"], "else the GPU would never be given back"
    assert box.told() == ["before 1"]
    for _ in range(30):
        box.tick()
        work(box.daemon.root, "not_shown_better")
        if states()[2] != "queued":
            break
    assert states() == ["succeeded", "succeeded", "running"]
    assert box.told() == ["before 1", "after 1"]


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
def test_the_gpu_comes_back_however_the_training_ends(box: Box, how: str) -> None:
    box.start().until("train")
    if how == "is cancelled":
        run_queue.cancel(box.daemon.engine, 1, box.now)
    else:
        fail_training(box)
    box.settle()
    assert box.told()[:2] == ["before 1", "after 1"]
    assert box.told()[-1] == "after 1"
    assert not box.is_lent()


def test_a_step_that_was_told_to_stop_keeps_the_gpu_until_it_has_ended(box: Box) -> None:
    box.start().until("train")
    with subprocess.Popen(["sleep", "600"]) as process:
        identity = identify(process.pid)
        assert identity is not None
        claim = box.daemon.root / "runs/1/attempts/train-1" / CLAIM_NAME
        durable.write_json(claim, {"process": {**vars(identity)}})
        box.dispatcher.draining = True
        box.dispatcher.abandon(box.now)
        box.tick()
        told = box.told()
        process.kill()
    assert told == ["before 1"]
    box.tick()
    assert box.told() == ["before 1", "after 1"]


@pytest.mark.parametrize("point", ["train", "after 1"])
def test_a_daemon_that_dies_forgets_no_gpu(box: Box, point: str) -> None:
    box.start().until("train" if point == "train" else "decide")
    # A command has ended, and nobody was there to note it.
    while point != "train" and point not in box.told():
        box.tick()
    assert box.is_lent()
    box.start().settle()
    assert box.run().outcome == "not_shown_better"
    told = box.told()
    assert told[-1] == "after 1"
    assert not box.is_lent()
    if point == "train":
        # A reboot may have started the server again: the next step asks anew.
        assert told == ["before 1", "before 1", "after 1"]


def test_a_daemon_that_ends_gives_the_gpu_back_before_it_has_ended(box: Box) -> None:
    box.start().until("train")
    box.dispatcher.draining = True
    box.dispatcher.abandon(box.now)
    box.dispatcher.give_gpu_back()
    assert box.told() == ["before 1", "after 1"]
    assert not box.is_lent()


def test_the_server_is_told_of_a_champion_before_a_run_takes_its_gpu_again(box: Box) -> None:
    box.start(more=f"after_promotion = {json.dumps(tell(box.folder, 'promoted'))}\n").settle("promoted")
    hooks = Hooks(box.daemon.engine, box.daemon.settings)
    (box.folder / "inbox" / "b.jsonl").write_bytes(records("b"))
    box.daemon.take_in(box.now)
    box.settle()
    assert box.told() == ["before 1", "after 1"]
    settle(hooks, box.now)
    box.settle()
    assert box.told() == ["before 1", "after 1", "promoted 1", "before 2", "after 2"]


def test_a_server_that_has_not_got_its_gpu_back_is_told_of_no_champion(box: Box) -> None:
    fails = tell(box.folder, "after", "raise SystemExit(3)")
    box.start(after=fails, more=f"after_promotion = {json.dumps(tell(box.folder, 'promoted'))}\n").settle("promoted")
    settle(Hooks(box.daemon.engine, box.daemon.settings), box.now)
    assert box.told() == ["before 1", "after 1"]
    box.start(more=f"after_promotion = {json.dumps(tell(box.folder, 'promoted'))}\n").settle()
    settle(Hooks(box.daemon.engine, box.daemon.settings), box.now)
    assert box.told() == ["before 1", "after 1", "after 1", "promoted 1"]


def test_a_tracks_own_commands_around_a_training_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "dropforge.toml"
    path.write_text('[tracks.support.hooks]\nbefore_training = ["true"]\n')
    with pytest.raises(SettingsError, match=r"tracks\.support\.hooks\.before_training cannot be a track's own"):
        load(path, {})


def fail_training(box: Box) -> None:
    """Leave what the worker leaves of a step that failed for good."""
    entry = next((box.daemon.root / "spool" / "queue").glob("*.json"))
    folder = box.daemon.root / "runs" / "1" / "attempts" / "train-1"
    spec = durable.read_object(folder / "spec.json")
    error = StepError(message="the loss is no number")
    result = StepResult(key="1-train-1", fence=spec["fence"], status="failed", exit_code=65, error=error)
    durable.write_json(folder / RESULT_NAME, result.model_dump())
    entry.unlink()
