"""
A disk of 48 MB that is filled at each stage of a run, stays full while the daemon turns, and is freed: the run ends.

The daemon's own objects do it, without their threads, and a worker that writes a step's files by a script. Needs root,
mkfs.ext4, mount.
"""

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import select

from daemon import service
from daemon.champions import promotion
from daemon.dispatch import attempt, claimer
from daemon.dispatch.spool import JobState, LocalExecutor
from daemon.dispatch.step_process import StepProcess
from daemon.dispatch.worker import Worker
from daemon.inbox import intake
from daemon.queue import run_queue
from daemon.service import Service
from daemon.settings.load import load
from daemon.state import run_files
from daemon.state.database import transaction
from daemon.state.database_file import verify
from daemon.state.layout import DATABASE_NAME
from daemon.state.states import AttemptState, RunState
from daemon.state.tables import Attempt, Drop, Promotion, Run, Track
from pipeline import __main__ as step_process
from pipeline import durable
from pipeline.artifacts import Artifact
from pipeline.contract import RESULT_NAME, Step, StepResult, StepSpec
from pipeline.contract import Attempt as StepAttempt
from pipeline.models.manifest import MANIFEST_NAME
from pipeline.report import write
from tests.chaos.loop_disk import LoopDisk, needs_root
from tests.chaos.scripted_steps import ARTIFACTS
from tests.made_artifacts import made_spec
from tests.model_folder import write_model
from tests.run_owner import spool_of
from tests.slurm.cluster import wait_for

pytestmark = needs_root
MEGABYTES = 48
STEPS = ("prepare", "train", "merge", "evaluate", "decide")
STAGES = ("copy", "enqueue", "claim", *STEPS, "publish", "promote", "finish")
_SETTINGS = """
inbox = "{inbox}"
state = "{state}"
base_model = "{base}"
run_after_quiet_seconds = 0
[intake]
settle_seconds = 0
[disk]
low_water_bytes = 2000000
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[LoopDisk]:
    with LoopDisk(tmp_path / "loop", MEGABYTES) as mounted:
        yield mounted


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.ms = 1_764_000_000_000

    def __call__(self) -> int:
        self.ms += 1000
        return self.ms


CLOCK = Clock()


class House:
    """The daemon without its threads, and a worker whose steps write what the script says."""

    def __init__(self, folder: Path, disk: LoopDisk) -> None:
        self.disk = disk
        self.inbox = folder / "inbox"
        base = folder / "base"
        if not base.exists():
            write_model(base, b"base")
            (base / MANIFEST_NAME).unlink()
        text = _SETTINGS.format(inbox=self.inbox, state=disk.place / "state", base=base)
        (folder / "dropforge.toml").write_text(text)
        self.service = Service(load(folder / "dropforge.toml", {}))
        self.root = disk.place / "state"
        self.engine = self.service._engine
        self.service._dispatcher.recover(CLOCK())
        self.results: dict[str, StepResult] = {}
        #: Called in a step before it writes.
        self.before: dict[str, Callable[[], None]] = {}

    def close(self) -> None:
        self.engine.dispose()
        self.service._lock.release()

    def take_in(self) -> None:
        """What the intake's thread does at one waking."""
        self.service._intake._turn()

    def turn(self) -> None:
        """One turn of everything."""
        self.take_in()
        self.service._tick()
        self.work()

    def work(self) -> None:
        """What the worker does with the orders in the spool; a result that cannot be written waits for room."""
        for spec in self.service._spool.orders():
            folder = self.root / spec.folder
            if spec.key not in self.results:
                self.results[spec.key] = step_process._run(spec.step, StepAttempt(spec))
            with contextlib.suppress(OSError):
                durable.write_json(folder / RESULT_NAME, self.results[spec.key].model_dump(mode="json"))
                self.service._spool.entry(spec.key).unlink()

    def do(self, attempt: StepAttempt) -> Artifact:
        """Do one step."""
        self.before.pop(attempt.spec.step, lambda: None)()
        return ARTIFACTS[attempt.spec.step](attempt)

    def rows(self, table: type[Any]) -> list[Any]:
        with transaction(self.engine) as session:
            return list(session.exec(select(table)).all())

    def run(self) -> Run | None:
        found = self.rows(Run)
        return found[0] if found else None


def drop_file(inbox: Path) -> None:
    lines = "".join(json.dumps({"instruction": f"say {number}", "output": "x" * 500}) + "\n" for number in range(200))
    inbox.mkdir(exist_ok=True)
    (inbox / "good.jsonl").write_text(lines)


@pytest.fixture
def house(tmp_path: Path, disk: LoopDisk, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr(service, "now_ms", CLOCK)
    made = House(tmp_path, disk)
    monkeypatch.setattr(Step, "load", lambda _step: made.do)
    monkeypatch.setattr(write, "write_report", lambda _attempt, verdict: verdict.report)  # there are no records
    yield made
    made.close()


def arm(house: House, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk be filled when the run comes to a stage."""
    fill = house.disk.fill
    if stage in STEPS:
        house.before[stage] = fill
        return
    places = {
        "copy": (intake, "copy"),
        "enqueue": (intake, "examine"),
        "claim": (claimer, "needed_bytes"),
        "publish": (run_files, "publish"),
        "promote": (promotion, "add_promotion"),
        "finish": (run_queue, "finish"),
    }
    module, name = places[stage]
    real = getattr(module, name)

    def first_fill(*arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(module, name, real)
        result = real(*arguments, **named) if stage in {"claim", "enqueue"} else None
        fill()
        return real(*arguments, **named) if result is None else result

    monkeypatch.setattr(module, name, first_fill)


def judge(house: House) -> None:
    """The run ended well, once, and nothing was lost or counted."""
    run = house.run()
    assert run is not None
    assert (run.state, run.outcome, run.failures, run.deaths) == (RunState.SUCCEEDED, "promoted", 0, 0), run
    assert [drop.state for drop in house.rows(Drop)] == ["accepted"]
    assert not (house.inbox / "good.jsonl").exists()
    assert (house.inbox / "done/good.jsonl").exists()
    done = [row for row in house.rows(Promotion) if row.run_id]
    assert len(done) == 1
    track = house.rows(Track)[0]
    assert (house.root / "tracks/default/champion").resolve() == (house.root / track.champion_path).resolve()
    assert {attempt.state for attempt in house.rows(Attempt)} <= {AttemptState.PUBLISHED, AttemptState.FAILED}
    verify(house.root / DATABASE_NAME, at_start=True)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_ends_well_though_the_disk_was_full_at(
    stage: str, house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drop_file(house.inbox)
    arm(house, stage, monkeypatch)
    filled_at = None
    for number in range(40):
        house.turn()
        if filled_at is None and (house.disk.place / "filler").exists():
            filled_at = number
        if filled_at is not None and number - filled_at >= 6:
            break
    assert filled_at is not None, "the stage never came"
    if stage == "copy":
        assert (house.rows(Drop), (house.inbox / "good.jsonl").exists()) == ([], True), (
            "nothing lost, nothing half taken"
        )
        assert list((house.root / "incoming").iterdir()) == []
    assert house.service._dispatcher.upkeep.disk.shortage(), "status says so"
    verify(house.root / DATABASE_NAME, at_start=True)
    house.disk.free()
    for _ in range(100):
        house.turn()
        run = house.run()
        if run is not None and run.state == RunState.SUCCEEDED:
            break
    judge(house)
    said = capsys.readouterr().out
    assert "disk_full" in said or "disk_low" in said or stage == "copy", said
    assert "_trouble" not in said, "it knew what was wrong all the time"


def scripted(spec: StepSpec, _path: Path) -> tuple[str, ...]:
    return (sys.executable, "-c", spec.env["SCRIPT"])


@pytest.fixture
def serving(disk: LoopDisk) -> Iterator[Callable[[], None]]:
    """Start a worker on the small disk; it is stopped at the end."""
    worker = Worker(spool_of(disk.place), scripted)
    thread = threading.Thread(target=worker.serve)
    yield thread.start
    worker.stop.set()
    thread.join()


def order(disk: LoopDisk, script: str) -> tuple[LocalExecutor, StepSpec]:
    """Order an attempt whose process runs `script` once it may begin."""
    begin = "import os, sys\nos.read(int(os.environ['DROPFORGE_LIFELINE_FD']), 1) or os._exit(75)\n"
    spec = made_spec(disk.place, "train", env={"SCRIPT": begin + script})
    executor = LocalExecutor(spool_of(disk.place))
    executor.submit(spec)
    return executor, spec


def test_an_order_that_cannot_begin_for_want_of_room_begins_when_there_is(
    disk: LoopDisk, serving: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, spec = order(disk, "sys.exit(3)")
    tried: list[int] = []
    real = attempt._begin

    def begin(*arguments: Any) -> Any:
        tried.append(1)
        return real(*arguments)

    monkeypatch.setattr(attempt, "_begin", begin)
    disk.fill()
    serving()
    wait_for(lambda: len(tried) > 1 or executor.poll(spec) is JobState.ENDED)
    assert executor.poll(spec) in {JobState.QUEUED, JobState.RUNNING}
    disk.free()
    wait_for(lambda: executor.poll(spec) is JobState.ENDED)
    assert durable.read_json(disk.place / spec.folder / RESULT_NAME)["exit_code"] == 3


def test_how_a_step_ended_is_written_down_when_there_is_room_for_it(
    disk: LoopDisk, serving: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, spec = order(disk, "sys.exit(74)")
    filled = threading.Event()
    real = StepProcess._wait

    def watch(*arguments: Any) -> Any:
        stopped = real(*arguments)
        disk.fill()
        filled.set()
        return stopped

    monkeypatch.setattr(StepProcess, "_wait", watch)
    serving()
    wait_for(filled.is_set)
    assert executor.poll(spec) is JobState.RUNNING, "not lost: nobody is to count a death"
    disk.free()
    wait_for(lambda: executor.poll(spec) is JobState.ENDED)
    result = StepResult.model_validate(durable.read_json(disk.place / spec.folder / RESULT_NAME))
    assert (result.exit_code, result.status) == (74, "failed")
    assert result.error is not None
    assert "is full" in result.error.message


def test_a_job_whose_shared_folder_stays_full_ends_without_a_result_and_gives_its_node_back(
    disk: LoopDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, spec = order(disk, "sys.exit(3)")
    real = StepProcess._wait

    def fill(*arguments: Any) -> Any:
        stopped = real(*arguments)
        disk.fill()
        return stopped

    monkeypatch.setattr(StepProcess, "_wait", fill)
    monkeypatch.setattr(attempt, "_LOOK_SECONDS", 0.01)
    attempt.work_on(spec, scripted, threading.Event(), on_node={})
    assert not (disk.place / spec.folder / RESULT_NAME).exists()
