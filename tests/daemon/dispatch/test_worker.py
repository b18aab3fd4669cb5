"""The worker, with real processes: small scripts stand where `python -m pipeline` stands in a real spec."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from daemon.dispatch.attempt import process_of, work_on, write_spec
from daemon.dispatch.spool import JobState, LocalExecutor
from daemon.dispatch.step_process import StepProcess
from daemon.dispatch.worker import Worker
from daemon.system.processes import FileLock, Identity, identify, is_alive, lock_holder, wait_until_dead
from pipeline import durable
from pipeline.config import JudgeConfig
from pipeline.contract import CLAIM_NAME, LOG_NAME, RESULT_NAME, SPEC_NAME, StepResult, StepSpec
from tests.made_artifacts import made_spec
from tests.run_owner import spool_of
from tests.slurm.cluster import wait_for

PRELUDE = """
import json, os, signal, sys, threading, pathlib
spec = json.loads(pathlib.Path("spec.json").read_text())
lifeline = int(os.environ["DROPFORGE_LIFELINE_FD"])
if not os.read(lifeline, 1):
    os._exit(75)
def result(status, code):
    key = f"{spec['run']}-{spec['step']}-{spec['attempt']}"
    value = {"key": key, "fence": spec["fence"], "status": status, "exit_code": code}
    pathlib.Path("aside").write_text(json.dumps(value)); os.rename("aside", "result.json")
    sys.exit(code)
def say(word):
    pathlib.Path("aside").write_text(word); os.rename("aside", "said")
"""
GOOD = PRELUDE + "say(os.environ.get('SECRET_TOKEN', 'none')); result('ok', 0)"
UNTIL_TERM = (
    PRELUDE
    + "stop = threading.Event(); signal.signal(signal.SIGTERM, lambda *_: stop.set()); say('up')\n"
    + "while not stop.wait(0.05): pass\nresult('interrupted', 75)"
)
DEAF = PRELUDE + "signal.signal(signal.SIGTERM, signal.SIG_IGN); say('up'); threading.Event().wait()"
UNTIL_ALONE = PRELUDE + "say('up'); os.read(lifeline, 1); result('interrupted', 75)"
#: It ignores SIGTERM, and so does what it has started.
DEAF_WITH_CHILD = (
    PRELUDE + "import subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import threading; threading.Event().wait()'])\n"
    "say(str(child.pid)); threading.Event().wait()"
)
KILLED = PRELUDE + "os.kill(os.getpid(), {})"


def spec_of(root: Path, script: str, *, run: int = 1, grace: float = 30.0) -> StepSpec:
    return made_spec(root, "train", run=run, fence="f", env={"SCRIPT": script}, grace_seconds=grace)


def as_scripted(spec: StepSpec, _place: Path) -> tuple[str, ...]:
    """Do what stands in the spec, which the worker itself would not look at."""
    return (sys.executable, "-c", spec.env["SCRIPT"])


def result_of(spec: StepSpec) -> StepResult:
    return StepResult.model_validate(durable.read_json(Path(spec.root) / spec.folder / RESULT_NAME))


def ordered(root: Path, script: str, **more: Any) -> tuple[LocalExecutor, StepSpec]:
    """Return an executor that has ordered an attempt, and the attempt."""
    executor, spec = LocalExecutor(spool_of(root)), spec_of(root, script, **more)
    executor.submit(spec)
    return executor, spec


def orders(root: Path) -> list[str]:
    """Return the keys of the attempts that the spool orders."""
    return sorted(path.stem for path in (root / "spool/queue").glob("*.json"))


@contextmanager
def serving(root: Path, parallel: int = 1) -> Iterator[Worker]:
    """Let a worker serve in a thread, until the end of the block."""
    worker = Worker(spool_of(root), as_scripted, parallel=parallel)
    thread = threading.Thread(target=worker.serve)
    thread.start()
    yield worker
    worker.stop.set()
    thread.join()


def test_steps_of_two_runs_are_run_at_once_and_a_third_and_a_runs_next_one_wait(tmp_path: Path) -> None:
    executor = LocalExecutor(spool_of(tmp_path))
    held = [spec_of(tmp_path, UNTIL_TERM, run=run) for run in (1, 2)]
    again = made_spec(tmp_path, "merge", run=1, fence="f", env={"SCRIPT": GOOD}, grace_seconds=30.0)
    third = spec_of(tmp_path, GOOD, run=3)
    for spec in (*held, again, third):
        executor.submit(spec)
    with serving(tmp_path, 2):
        wait_for(lambda: all((tmp_path / spec.folder / "said").exists() for spec in held))
        assert [executor.poll(spec) for spec in (again, third)] == [JobState.QUEUED, JobState.QUEUED]
        executor.cancel(held[1].key)
        wait_for(lambda: executor.poll(third) is JobState.ENDED)
        assert executor.poll(again) is JobState.QUEUED, "run 1 has a running step"
        assert executor.poll(held[0]) is JobState.RUNNING
    assert [result_of(spec).status for spec in held] == ["interrupted", "interrupted"], "each was told to stop"


@pytest.mark.parametrize("on_node", [None, {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "9", "SLURMD_NODENAME": "n2"}])
def test_only_an_attempt_on_a_node_is_claimed_by_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_node: dict[str, str] | None
) -> None:
    """A daemon may be started inside an allocation."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1")
    spec = spec_of(tmp_path, GOOD)
    folder = tmp_path / spec.folder
    spool_of(tmp_path)
    assert write_spec(spec)
    work_on(spec, as_scripted, threading.Event(), on_node=on_node)
    claimed = durable.read_object(folder / CLAIM_NAME)
    own = (None, 0) if on_node is None else ("7", 9)
    assert (claimed["job"], claimed["until"], claimed["node"] == "n2") == (*own, on_node is not None)


def test_an_attempt_whose_files_cannot_be_used_stops_no_other(tmp_path: Path) -> None:
    executor = LocalExecutor(spool_of(tmp_path))
    held, spoilt, after = spec_of(tmp_path, UNTIL_TERM), spec_of(tmp_path, GOOD, run=2), spec_of(tmp_path, GOOD, run=3)
    for spec in (held, spoilt, after):
        executor.submit(spec)
    (tmp_path / spoilt.folder / LOG_NAME).mkdir()
    with serving(tmp_path, 2):
        wait_for(lambda: executor.poll(after) is JobState.ENDED)
        assert (executor.poll(held), executor.poll(spoilt)) == (JobState.RUNNING, JobState.ENDED)
    assert result_of(spoilt).status == "failed"


def test_a_step_whose_folder_was_removed_is_stopped(tmp_path: Path) -> None:
    _, spec = ordered(tmp_path, UNTIL_TERM)
    folder = tmp_path / spec.folder
    with serving(tmp_path):
        wait_for((folder / "said").exists)
        process = process_of(folder)
        shutil.rmtree(folder)
        wait_for(lambda: process is not None and not is_alive(process))
        wait_for(lambda: orders(tmp_path) == [])


def no_order(root: Path, what: str) -> Path:
    """Order an attempt, spoil its entry and return that."""
    _, spec = ordered(root, GOOD, run=2)
    entry, place = spool_of(root).entry(spec.key), root / spec.folder / SPEC_NAME
    match what:
        case "torn":
            entry.write_bytes(b'{"fence": "')
        case "another fence":
            durable.write_json(entry, {"fence": "guessed"})
        case "a folder":
            entry.unlink()
            (entry / "within").mkdir(parents=True)
        case "a FIFO":
            entry.unlink()
            os.mkfifo(entry)
        case "no spec":
            place.unlink()
        case "a file for a folder":
            shutil.rmtree(place.parent)
            place.parent.touch()
        case "another attempt's spec":
            durable.write_json(place, spec.model_copy(update={"run": 3}).model_dump(mode="json"))
        case "another root":
            durable.write_json(place, spec.model_copy(update={"root": str(root.parent)}).model_dump(mode="json"))
        case _:
            entry = entry.rename(entry.with_name(what))
    return entry


@pytest.mark.parametrize(
    "what",
    [
        "torn",
        "a folder",
        "a FIFO",
        "another fence",
        "no spec",
        "a file for a folder",
        "another attempt's spec",
        "another root",
        "2",
    ],
)
def test_an_entry_that_is_no_order_is_removed_with_a_line_and_the_next_one_runs(tmp_path: Path, what: str) -> None:
    entry = no_order(tmp_path, what)
    executor, spec = ordered(tmp_path, GOOD)
    with capture_logs() as logged, serving(tmp_path):
        wait_for(lambda: executor.poll(spec) is JobState.ENDED)
    removed = [line["entry"] for line in logged if line["event"] == "order_removed"]
    assert removed == [entry.name]
    assert orders(tmp_path) == []
    assert not (tmp_path / "runs/2/attempts/train-1/log.txt").exists(), "it was not run"


def environment_of(spec: StepSpec) -> dict[str, str]:
    """Return the environment in which a worker does a step."""
    root = Path(spec.root)
    shows = PRELUDE + "say(json.dumps(dict(os.environ))); result('ok', 0)"
    LocalExecutor(spool_of(root)).submit(spec.model_copy(update={"env": {**spec.env, "SCRIPT": shows}}))
    with serving(root):
        wait_for((root / spec.folder / RESULT_NAME).exists)
    seen: dict[str, str] = json.loads((root / spec.folder / "said").read_text())
    return seen


def test_a_step_with_network_sees_its_key_and_the_proxies_and_no_other_step_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "hush")
    monkeypatch.setenv("OTHER_KEY", "hush too")
    monkeypatch.setenv("HTTPS_PROXY", "http://name:word@proxy")
    judge, seen = JudgeConfig(url="https://judge/v1", model="m", api_key_env="JUDGE_KEY"), {}
    for run, network in ((1, True), (2, False)):
        spec = spec_of(tmp_path, "", run=run)
        config = spec.config.model_copy(update={"judge": judge})
        seen[network] = environment_of(spec.model_copy(update={"network": network, "config": config}))
        assert "hush" not in (tmp_path / spec.folder / "spec.json").read_text()
    assert seen[True]["JUDGE_KEY"] == "hush"
    assert seen[True]["HTTPS_PROXY"] == "http://name:word@proxy"
    assert "OTHER_KEY" not in seen[True]
    assert {"JUDGE_KEY", "OTHER_KEY", "HTTPS_PROXY"} & set(seen[False]) == set()


def test_a_step_gets_no_variable_of_its_specs_that_the_program_does_not_set(tmp_path: Path) -> None:
    env = {"LD_AUDIT": "/evil.so", "DROPFORGE_DEVICE": "cpu"}
    seen = environment_of(spec_of(tmp_path, "").model_copy(update={"env": env}))
    assert ("LD_AUDIT" in seen, seen["DROPFORGE_DEVICE"]) == (False, "cpu")


def test_the_operators_number_of_threads_reaches_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    seen = environment_of(spec_of(tmp_path, ""))
    assert (seen["OMP_NUM_THREADS"], "GOMP_SPINCOUNT" in seen) == ("77", False)


def test_steps_in_parallel_share_the_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("daemon.system.threads._busy_ticks", lambda _processors: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    seen = [environment_of(spec_of(tmp_path, "", run=count).model_copy(update={"parallel": count})) for count in (1, 2)]
    assert [one["OMP_NUM_THREADS"] for one in seen] == ["8", "4"]


@pytest.mark.parametrize("own", ["", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_gpus_memory_is_in_expandable_segments_unless_its_user_configures_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv(own, "max_split_size_mb:64")
    seen = environment_of(spec_of(tmp_path, ""))
    expected = {own: "max_split_size_mb:64"} if own else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert {name: seen[name] for name in names if name in seen} == expected


def test_an_attempt_that_has_ended_is_not_done_again(tmp_path: Path) -> None:
    _, spec = ordered(tmp_path, GOOD)
    ended = StepResult(key=spec.key, fence=spec.fence, status="ok", exit_code=0)
    durable.write_json(tmp_path / spec.folder / RESULT_NAME, ended.model_dump())
    with serving(tmp_path):
        wait_for(lambda: not orders(tmp_path))
    assert not (tmp_path / spec.folder / "said").exists()


def start_worker(root: Path, before: str = "") -> subprocess.Popen[bytes]:
    code = (
        before + "import sys, pathlib; from daemon.dispatch.worker import serve; "
        "scripted = lambda spec, _: (sys.executable, '-c', spec.env['SCRIPT']); "
        "root = pathlib.Path(sys.argv[1]); sys.exit(serve(root, root, with_lifeline=True, command=scripted))"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(root)], stdin=subprocess.PIPE)


def running_step(root: Path, spec: StepSpec) -> Identity:
    wait_for((root / spec.folder / "said").exists)
    process = process_of(root / spec.folder)
    assert process is not None
    return process


def test_a_step_ends_when_its_worker_is_killed_and_the_next_worker_waits_for_it(tmp_path: Path) -> None:
    executor, spec = ordered(tmp_path, UNTIL_ALONE)
    with start_worker(tmp_path) as first:
        step = running_step(tmp_path, spec)
        first.kill()
    assert wait_until_dead(step, 30)
    assert executor.poll(spec) is JobState.ENDED
    assert result_of(spec).status == "interrupted"


def test_the_next_worker_ends_an_orphan_that_does_not_stop_by_itself(tmp_path: Path) -> None:
    executor, spec = ordered(tmp_path, DEAF, grace=-4.5)
    other = spec_of(tmp_path, GOOD, run=2)
    with start_worker(tmp_path) as first:
        step = running_step(tmp_path, spec)
        first.kill()
    assert is_alive(step)
    assert executor.poll(spec) is JobState.RUNNING, "an orphan still runs, so nothing may begin beside it"
    executor.submit(other)
    with start_worker(tmp_path) as second:
        wait_for(lambda: executor.poll(other) is JobState.ENDED)
        assert not is_alive(step), "the second step began only when the orphan was gone"
        assert result_of(spec).exit_code == 128 + signal.SIGKILL
        second.terminate()
        assert second.wait() == 0


def test_a_worker_ends_with_its_daemon_and_its_step_before_it(tmp_path: Path) -> None:
    _, spec = ordered(tmp_path, UNTIL_TERM)
    with start_worker(tmp_path) as worker:
        step = running_step(tmp_path, spec)
    assert worker.returncode == 0, "leaving the block closed its standard input, as a dead daemon does"
    assert not is_alive(step)
    assert result_of(spec).status == "interrupted"


def test_a_second_signal_ends_worker_and_step_now_and_leaves_nothing_running(tmp_path: Path) -> None:
    executor, spec = ordered(tmp_path, DEAF_WITH_CHILD, grace=600)
    with start_worker(tmp_path) as worker:
        step = running_step(tmp_path, spec)
        child = identify(int((tmp_path / spec.folder / "said").read_text()))
        assert child is not None
        worker.send_signal(signal.SIGTERM)
        assert not wait_until_dead(step, 0.5), "the first signal leaves it its grace"
        worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 128 + signal.SIGTERM
    assert not is_alive(step)
    assert wait_until_dead(child, 30)
    assert (result_of(spec).status, result_of(spec).exit_code) == ("interrupted", 75)
    assert executor.poll(spec) is JobState.ENDED


def test_a_second_signal_ends_the_worker_though_the_disk_is_full(tmp_path: Path) -> None:
    script = PRELUDE + "signal.signal(signal.SIGTERM, signal.SIG_IGN); say('up'); os.read(lifeline, 1)"
    spec = spec_of(tmp_path, script, grace=600)
    LocalExecutor(spool_of(tmp_path)).submit(spec)
    write = "os.write(os.open('/dev/full', os.O_WRONLY), b'x')"
    full = f"import os, daemon.dispatch.worker as full; full.end_steps = lambda _, now=False: now and {write}; "
    with start_worker(tmp_path, full) as worker:
        step = running_step(tmp_path, spec)
        worker.send_signal(signal.SIGTERM)
        assert not wait_until_dead(step, 0.5), "the first signal leaves it its grace"
        worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 128 + signal.SIGTERM
    assert wait_until_dead(step, 30)


def test_a_second_worker_waits_for_the_first(tmp_path: Path) -> None:
    lock = FileLock(spool_of(tmp_path).worker_lock)
    assert lock.acquire()
    executor, spec = ordered(tmp_path, GOOD)
    with serving(tmp_path):
        assert executor.poll(spec) is JobState.QUEUED
        assert lock_holder(lock.path) == os.getpid()
        lock.release()
        wait_for(lambda: executor.poll(spec) is JobState.ENDED)


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> threading.Event:
    """Let no file called `name` be written, for the reason `number`, but a claim without a process; tell when."""
    tried, real = threading.Event(), durable.write_json

    def write(path: Path, value: Any, **named: Any) -> None:
        if name in path.name:
            tried.set()
            raise OSError(number, os.strerror(number))
        real(path, value, **named)

    monkeypatch.setattr(durable, "write_json", write)
    return tried


def stop_when(tried: threading.Event, root: Path) -> None:
    """Let a worker serve until something was tried, and tell it to stop then."""
    worker = Worker(spool_of(root), as_scripted)
    thread = threading.Thread(target=worker.serve, daemon=True)
    thread.start()
    wait_for(tried.is_set)
    worker.stop.set()
    thread.join()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM])
def test_a_worker_that_is_stopped_while_an_order_waits_for_room_puts_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    executor, spec = ordered(tmp_path, GOOD)
    with monkeypatch.context() as patch:
        stop_when(refuse(patch, CLAIM_NAME, number), tmp_path)
    assert executor.poll(spec) is JobState.QUEUED
    assert not (tmp_path / spec.folder / "said").exists(), "a step that is not written down does nothing"
    with start_worker(tmp_path) as second:
        wait_for(lambda: executor.poll(spec) is JobState.ENDED)
        second.terminate()
    assert result_of(spec).status == "ok"


def test_a_worker_that_is_stopped_while_a_result_waits_for_room_gives_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, spec = ordered(tmp_path, KILLED)
    with monkeypatch.context() as patch:
        stop_when(refuse(patch, RESULT_NAME, errno.ENOSPC), tmp_path)
    assert executor.poll(spec) is JobState.ENDED
    assert (result_of(spec).exit_code, orders(tmp_path)) == (128 + signal.SIGKILL, [])


@pytest.mark.parametrize("name", [CLAIM_NAME, RESULT_NAME])
def test_only_what_passes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    executor, spec = ordered(tmp_path, KILLED)
    with monkeypatch.context() as patch:
        refuse(patch, name, errno.EIO)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            Worker(spool_of(tmp_path), as_scripted).serve()
    assert executor.poll(spec) is not JobState.RUNNING, "seen as what it is, and not as a step that goes on"


def test_a_step_written_down_before_the_machine_was_started_again_is_lost_though_its_number_lives(
    tmp_path: Path,
) -> None:
    executor, spec = ordered(tmp_path, GOOD)
    me = identify(os.getpid())
    assert me is not None
    for process, state in (
        (me, JobState.RUNNING),
        (replace(me, boot="another"), JobState.ENDED),
        (replace(me, started=me.started + 1), JobState.ENDED),
    ):
        (tmp_path / spec.folder / RESULT_NAME).unlink(missing_ok=True)
        durable.write_json(tmp_path / spec.folder / CLAIM_NAME, {"process": vars(process)})
        assert executor.poll(spec) is state


def test_a_step_that_has_died_before_it_is_let_go_is_a_failure_of_its_own(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "")
    (tmp_path / spec.folder).mkdir(parents=True)
    process = StepProcess(spec, tmp_path / spec.folder, ("false",))
    wait_for(lambda: process.identity is None)
    result = process.go(lambda: False)
    assert (result.status, result.exit_code) == ("failed", 1)


def test_an_order_whose_spec_was_lost_gets_it_again(tmp_path: Path) -> None:
    executor, spec = ordered(tmp_path, GOOD)
    (tmp_path / spec.folder / SPEC_NAME).unlink()
    executor.submit(spec)
    assert (tmp_path / spec.folder / SPEC_NAME).exists()
    assert orders(tmp_path) == [spec.key]
