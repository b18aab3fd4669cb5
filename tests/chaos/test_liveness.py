"""How a step's process ends, through the real worker, decides what becomes of its run; and who is taken for alive."""

import fcntl
import json
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

from daemon.cli import main
from daemon.dispatch.dispatcher import Dispatcher
from daemon.dispatch.spool import JobState, LocalExecutor, Spool
from daemon.dispatch.worker import Worker, end_steps_now
from daemon.inbox.watcher import make_inbox
from daemon.queue import run_queue, states
from daemon.settings.load import load
from daemon.state.database import migrate, open_engine, transaction
from daemon.state.states import DropState
from daemon.state.tables import Attempt, Drop, Event, Run
from daemon.system.processes import FileLock, identify, is_alive, lock_holder, wait_until_dead
from pipeline import durable
from pipeline.contract import StepSpec
from tests.model_folder import write_model

NOW = 1_767_225_600_000
HOUR = 3_600_000
#: Stands where `python -m pipeline` stands in a real spec; `end` is one of the ENDS.
STEP = """
import json, os, pathlib, signal, sys
if not os.read(int(os.environ["DROPFORGE_LIFELINE_FD"]), 1):
    os._exit(75)
def result(status, code):
    spec = json.loads(pathlib.Path("spec.json").read_text())
    error = {"message": f"{status} with {code}", "hint": "mend it"}
    value = {"key": f"{spec['run']}-{spec['step']}-{spec['attempt']}", "fence": spec["fence"], "status": status,
             "exit_code": code, "error": error}
    pathlib.Path("aside").write_text(json.dumps(value))
    os.rename("aside", "result.json")
    os._exit(code)
"""
HANG = "pathlib.Path('up').touch(); signal.pause()"


class House:
    """A daemon without its threads and a real worker, on a workspace whose steps end as they are told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_model(folder / "base", b"base weights")
        (folder / "dropforge.toml").write_text('base_model = "base"\nrun_after_quiet_seconds = 0\n')
        self.settings = load(folder / "dropforge.toml", {})
        make_inbox(self.settings)
        self.root = self.settings.state_folder
        migrate(self.root / "dropforge.db")
        self.engine = open_engine(self.root / "dropforge.db")
        self.executor = Scripted(self.root)
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
    worker = Worker(house.root, lambda spec, _path: (sys.executable, "-c", spec.env["SCRIPT"]))
    thread = threading.Thread(target=worker.serve)
    thread.start()
    yield worker
    worker.stop.set()
    end_steps_now(house.root)
    thread.join()


@pytest.fixture
def ask(house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call the console script's function in the workspace; return what it prints."""
    monkeypatch.chdir(house.folder)
    for name in [name for name in os.environ if name.startswith("DROPFORGE_")]:
        monkeypatch.delenv(name)

    def call(command: str) -> str:
        monkeypatch.setattr(sys, "argv", ["dropforge", *command.split()])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return call


class End(NamedTuple):
    """What a step does, and what the run is after one attempt and after three."""

    script: str
    first: tuple[str, int, int]
    """State, failures, deaths."""
    third: tuple[str, int, int] | None


ENDS = {
    "bad data (65) is never tried again": End("result('failed', 65)", ("failed", 1, 0), None),
    "nor without a result": End("os._exit(65)", ("failed", 1, 0), None),
    "an interruption (75) is not counted": End("result('interrupted', 75)", ("waiting", 0, 0), ("waiting", 0, 0)),
    "nor without a result of its own": End("os._exit(75)", ("waiting", 0, 0), ("waiting", 0, 0)),
    "a failure (1) is tried up to the limit": End("result('failed', 1)", ("waiting", 1, 0), ("failed", 3, 0)),
    "so is any other exit code": End("os._exit(70)", ("waiting", 1, 0), ("failed", 3, 0)),
    "and a good one without a result": End("os._exit(0)", ("waiting", 1, 0), ("failed", 3, 0)),
    "a kill is a death": End("os.kill(os.getpid(), 9)", ("waiting", 0, 1), ("crashed", 0, 3)),
    "so is a crash": End("os.kill(os.getpid(), signal.SIGSEGV)", ("waiting", 0, 1), ("crashed", 0, 3)),
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


def start_worker(root: Path) -> subprocess.Popen[bytes]:
    code = (
        "import sys, pathlib; from daemon.dispatch.worker import serve; "
        "scripted = lambda spec, _: (sys.executable, '-c', spec.env['SCRIPT']); "
        "serve(pathlib.Path(sys.argv[1]), with_lifeline=True, command=scripted)"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(root)], stdin=subprocess.PIPE)


def test_a_run_that_takes_worker_and_step_down_three_times_is_crashed_where_everybody_looks(
    house: House, ask: Callable[..., str]
) -> None:
    house.executor.script = HANG
    for number in (1, 2, 3):
        house.now += HOUR
        with start_worker(house.root) as worker:
            house.until(house.root.joinpath(f"runs/1/attempts/prepare-{number}/up").exists)
            step = Spool(house.root).process_of(f"1-prepare-{number}")
            assert step is not None
            worker.kill()
            os.kill(step.pid, signal.SIGKILL)
        assert wait_until_dead(step, 30)
        house.until(lambda n=number: house.ended() == n)  # type: ignore[misc]
        assert house.run().state == ("crashed" if number == 3 else "waiting")
    for command in ("status", "runs", "runs --state crashed", "show 1"):
        said = ask(command)
        assert "crashed" in said, command
        assert "vanished" in said, command
    for command in ("status", "show 1"):
        assert "hint: free memory or lower train.batch_tokens, then: dropforge retry 1" in ask(command)
    (shown,) = json.loads(ask("runs --json"))["runs"]
    assert (shown["state"], shown["hint"].rpartition(": ")[2]) == ("crashed", "dropforge retry 1")
    assert "vanished processes: 3" in ask("show 1")
    with transaction(house.engine) as session:
        kinds = [event.kind for event in session.exec(select(Event)) if event.run_id == 1]
    assert (kinds.count("run_died"), kinds.count("run_crashed")) == (2, 1)
    house.now += 24 * HOUR
    house.dispatcher.tick(house.now)
    assert len(house.attempts()) == 3, "it does not begin again by itself"
    assert "run 1 goes on where it stopped" in ask("retry 1")
    run = house.run()
    assert (run.state, run.deaths, run.hint) == ("waiting", 0, None)


def test_a_step_written_down_before_the_machine_was_started_again_is_lost_though_its_number_lives(house: House) -> None:
    house.dispatcher.tick(house.now)
    (path,) = (house.root / "spool/queue").glob("*.json")
    (spec_path,) = house.root.glob("runs/1/attempts/*/spec.json")
    spec = StepSpec.model_validate_json(spec_path.read_bytes())
    me = identify(os.getpid())
    assert me is not None
    running = house.root / "spool/running" / path.name
    path.rename(running)
    for process, state in (
        ({"pid": me.pid, "started": me.started, "boot": me.boot}, JobState.RUNNING),
        ({"pid": me.pid, "started": me.started, "boot": "another"}, JobState.LOST),
        ({"pid": me.pid, "started": me.started + 1, "boot": me.boot}, JobState.LOST),
    ):
        durable.write_json(running, {"fence": spec.fence, "process": process})
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


def test_nobody_else_is_taken_for_the_process_that_was_written_down() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        known = identify(child.pid)
        assert known is not None
        assert is_alive(known)
    assert not is_alive(known)
