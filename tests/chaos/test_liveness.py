"""How a step's process ends, through the real worker, decides what becomes of its run; and who is taken for alive."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlmodel import select

from daemon.dispatch.dispatcher import Dispatcher
from daemon.dispatch.spool import JobState, LocalExecutor
from daemon.dispatch.worker import Worker, end_steps_now
from daemon.inbox.watcher import make_inbox
from daemon.queue import run_queue, states
from daemon.settings.load import load
from daemon.state.database import create, open_engine, transaction
from daemon.state.states import DropState
from daemon.state.tables import Attempt, Drop, Run
from daemon.system.processes import FileLock, identify, lock_holder
from pipeline import durable
from pipeline.contract import CLAIM_NAME, RESULT_NAME, StepSpec
from tests.model_folder import write_model
from tests.run_owner import spool_of

NOW = 1_767_225_600_000
HOUR = 3_600_000
#: Stands where `python -m pipeline` stands in a real spec; one of the ENDS follows.
STEP = """
import os
if not os.read(int(os.environ["DROPFORGE_LIFELINE_FD"]), 1):
    os._exit(75)
"""


class House:
    """A daemon without its threads and a real worker, on a workspace whose steps end as they are told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_model(folder / "base", b"base weights")
        (folder / "dropforge.toml").write_text('base_model = "base"\nrun_after_quiet_seconds = 0\n')
        self.settings = load(folder / "dropforge.toml", {})
        make_inbox(self.settings)
        self.root = self.settings.state_folder
        create(self.root / "dropforge.db")
        self.engine = open_engine(self.root / "dropforge.db")
        self.executor = Scripted(spool_of(self.root))
        self.dispatcher = Dispatcher(self.engine, self.settings, self.executor)
        self.now = NOW
        with transaction(self.engine) as session:
            states.ensure_track(session, "default", NOW)
        self.dispatcher.recover(NOW)
        with transaction(self.engine) as session:
            drop = Drop(
                track="default",
                role="train",
                state=DropState.ACCEPTED,
                name_bytes=b"a",
                name="a",
                sha256="a" * 64,
                size_bytes=1,
                rows=1,
                received_at=NOW,
            )
            session.add(drop)
            run_queue.enqueue(session, "default", "drop", NOW, NOW)

    def run(self) -> Run:
        with transaction(self.engine) as session:
            return session.exec(select(Run)).one()

    def attempts(self) -> list[Attempt]:
        with transaction(self.engine) as session:
            return list(session.exec(select(Attempt)))

    def ended(self) -> int:
        return sum(attempt.ended_at is not None for attempt in self.attempts())

    def attempt(self) -> Run:
        """Let the next attempt be made, an hour after the one before, and end; return the run."""
        self.now += HOUR
        before = self.ended()
        self.until(lambda: self.ended() > before)
        return self.run()

    def until(self, condition: Callable[[], object]) -> None:
        pause = threading.Event()
        self.dispatcher.tick(self.now)
        while not condition():
            pause.wait(0.02)
            self.dispatcher.tick(self.now)


class Scripted(LocalExecutor):
    """The real executor, but that each step runs `script` instead of the pipeline."""

    script = ""

    def submit(self, spec: StepSpec) -> None:
        super().submit(spec.model_copy(update={"env": {**spec.env, "SCRIPT": STEP + self.script}}))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.fixture
def worker(house: House) -> Iterator[Worker]:
    worker = Worker(spool_of(house.root), lambda spec, _path: (sys.executable, "-c", spec.env["SCRIPT"]))
    thread = threading.Thread(target=worker.serve)
    thread.start()
    yield worker
    worker.stop.set()
    end_steps_now(spool_of(house.root))
    thread.join()


class End(NamedTuple):
    """What a step does, and what the run is after one attempt and after three."""

    script: str
    first: tuple[str, int, int]
    """State, failures, deaths."""
    third: tuple[str, int, int] | None


#: None of them leaves a result of its own.
ENDS = {
    "bad data (65) is never tried again": End("os._exit(65)", ("failed", 1, 0), None),
    "an interruption (75) is not counted": End("os._exit(75)", ("waiting", 0, 0), ("waiting", 0, 0)),
    "a good end (0) without a result is a failure": End("os._exit(0)", ("waiting", 1, 0), ("failed", 3, 0)),
    "a kill is a death": End("os.kill(os.getpid(), 9)", ("waiting", 0, 1), ("crashed", 0, 3)),
}


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("case", ENDS)
def test_how_a_step_ended_decides_what_becomes_of_its_run(house: House, case: str) -> None:
    end = ENDS[case]
    house.executor.script = end.script
    run = house.attempt()
    assert (run.state, run.failures, run.deaths) == end.first
    if end.third is None:
        house.now += 24 * HOUR
        house.dispatcher.tick(house.now)
        assert len(house.attempts()) == 1
        return
    house.attempt()
    run = house.attempt()
    assert (run.state, run.failures, run.deaths) == end.third
    assert [attempt.number for attempt in house.attempts()] == [1, 2, 3]


def test_a_step_written_down_before_the_machine_was_started_again_is_lost_though_its_number_lives(house: House) -> None:
    house.dispatcher.tick(house.now)
    (spec_path,) = house.root.glob("runs/1/attempts/*/spec.json")
    spec = StepSpec.model_validate_json(spec_path.read_bytes())
    me = identify(os.getpid())
    assert me is not None
    for process, state in (
        ({"pid": me.pid, "started": me.started, "boot": me.boot}, JobState.RUNNING),
        ({"pid": me.pid, "started": me.started, "boot": "another"}, JobState.ENDED),
        ({"pid": me.pid, "started": me.started + 1, "boot": me.boot}, JobState.ENDED),
    ):
        (spec_path.parent / RESULT_NAME).unlink(missing_ok=True)
        durable.write_json(spec_path.parent / CLAIM_NAME, {"process": process})
        assert house.executor.poll(spec) is state


def test_a_lock_is_given_back_by_death_and_by_nothing_else(tmp_path: Path) -> None:
    code = "import sys, signal; from daemon.system.processes import FileLock; from pathlib import Path\n"
    code += "lock = FileLock(Path(sys.argv[1])); print(lock.acquire(), flush=True); signal.pause()"
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"True\n"
        os.kill(holder.pid, signal.SIGSTOP)
        assert lock_holder(path) == holder.pid
        assert not FileLock(path).acquire(), "a frozen process is not a dead one"
        path.write_text("")
        assert not FileLock(path).acquire(), "what the file says does not matter"
        holder.kill()
    assert lock_holder(path) is None
    assert FileLock(path).acquire()


def test_somebody_who_only_looks_does_not_keep_the_daemon_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    path.touch()
    looking = os.open(path, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr("daemon.system.processes.time.sleep", lambda _seconds: fcntl.flock(looking, fcntl.LOCK_UN))
    lock = FileLock(path)
    assert lock.acquire()
    lock.release()
    os.close(looking)
