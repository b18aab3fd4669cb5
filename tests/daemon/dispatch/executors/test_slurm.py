"""What Slurm does to jobs and to whoever submits them: lost answers, a dead controller, other people's commands."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from daemon.dispatch import slurm, slurm_jobs
from daemon.dispatch.slurm import SlurmExecutor
from daemon.dispatch.slurm_jobs import SlurmJobs
from daemon.dispatch.spool import JobState
from daemon.settings.sections import ExecutorSettings
from daemon.state.run_files import was_out_of_time
from daemon.system import slurm_commands
from pipeline import durable
from pipeline.contract import CLAIM_NAME, JOB_NAME, REVOKED_NAME, SPEC_NAME, StepSpec
from tests.chaos.faults import Death
from tests.daemon.dispatch.executors.conftest import House, SlurmHouse
from tests.daemon.dispatch.test_worker import DEAF, GOOD, PRELUDE, UNTIL_TERM, result_of, spec_of
from tests.slurm.cluster import NEEDS_SLURM, Cluster, wait_for

ROOT = Path(__file__).parents[4]
pytestmark = [NEEDS_SLURM, pytest.mark.long]
UNTIL_GO = PRELUDE + "say('up')\nwhile not os.path.exists('go'): threading.Event().wait(.05)\nresult('ok', 0)"
MARKED = PRELUDE + "pathlib.Path('../marks').open('a').write('begun\\n'); result('ok', 0)"
#: Stops for any number of signals as a real step does, and says how many came.
AS_A_STEP = (
    PRELUDE
    + f"sys.path.insert(0, {str(ROOT)!r})\nfrom pipeline import __main__ as step\nfrom types import SimpleNamespace\n"
    + "attempt = SimpleNamespace(stop=threading.Event()); step._stop_on_signal(attempt); say('up')\n"
    + "while not attempt.stop.wait(0.05): pass\n"
    + "threading.Event().wait(1); pathlib.Path('checkpoint').touch(); result('interrupted', 75)"
)
#: Ends together with its job's process: no result is left.
VANISH = "os.kill(os.getppid(), 9); os.kill(os.getpid(), 9)"
MARKED_AND_VANISHED = MARKED.replace("result('ok', 0)", VANISH)


def begun(house: House, script: str, **more: Any) -> StepSpec:
    """Order an attempt, wait until its step says something, and return it."""
    spec = spec_of(house.root, script, **more)
    house.executor.submit(spec)
    wait_for((house.root / spec.folder / "said").exists)
    return spec


def run(house: House, script: str, **more: Any) -> StepSpec:
    """Order an attempt, wait until it has ended, and return it."""
    spec = spec_of(house.root, script, **more)
    house.executor.submit(spec)
    house.wait_until(spec, JobState.ENDED)
    return spec


def marks(house: House, spec: StepSpec) -> str:
    return (house.root / spec.folder / "../marks").read_text()


def jobs(cluster: Cluster, *columns: str) -> list[str]:
    return cluster.says("squeue", "--me", "--noheader", f"--format={'|'.join(columns)}").splitlines()


def thread_of(house: House) -> Any:
    assert isinstance(house.executor, SlurmExecutor)
    return house.executor


def wrap(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program before one of Slurm's, which it can call as $REAL."""
    real, place = shutil.which(name), folder / "bin"
    place.mkdir(exist_ok=True)
    (place / name).write_text(f"#!/bin/sh\nREAL={real}\n{script}\n")
    (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(place), prepend=":")


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the executor give up attempts within seconds."""
    monkeypatch.setattr(slurm, "GIVE_UP_SECONDS", 1.0)
    monkeypatch.setattr(slurm, "_AGAIN_SECONDS", 1.0)


@pytest.mark.parametrize("end", ["exit 1", "exec sleep 600"])
def test_a_job_whose_number_was_lost_is_found_by_its_name_and_runs_once(
    in_slurm: SlurmHouse, cluster: Cluster, tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It accepts the job and gives no answer, the first time.
    lost = f'[ -e {tmp_path}/lost ] && exec $REAL "$@"\ntouch {tmp_path}/lost; $REAL "$@" >&2; {end}'
    wrap(tmp_path, "sbatch", lost, monkeypatch)
    monkeypatch.setattr(slurm_commands, "_SECONDS", 3.0)
    monkeypatch.setattr(slurm, "_AGAIN_SECONDS", 1.0)
    spec = run(in_slurm, MARKED)
    assert marks(in_slurm, spec) == "begun\n"
    wait_for(lambda: jobs(cluster, "%j") == [])


def test_a_refusal_is_a_wait_with_its_reason_and_goes_on_when_it_passes(
    in_slurm: SlurmHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = f'[ -e {tmp_path}/room ] && exec $REAL "$@"\necho "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1'
    wrap(tmp_path, "sbatch", refuse, monkeypatch)
    monkeypatch.setattr(slurm, "_AGAIN_SECONDS", 0.5)
    spec = spec_of(in_slurm.root, GOOD)
    in_slurm.executor.submit(spec)
    troubles = thread_of(in_slurm)._troubles

    def told() -> str:
        assert in_slurm.executor.poll(spec) is JobState.QUEUED
        return str(troubles.words.get("run 1", ""))

    wait_for(lambda: "QOSMaxSubmitJobPerUserLimit" in told())
    (tmp_path / "room").touch()
    in_slurm.wait_until(spec, JobState.ENDED)
    wait_for(lambda: troubles.words == {})


@pytest.mark.usefixtures("soon")
def test_a_persons_own_defaults_for_squeue_and_sbatch_hide_no_job(
    in_slurm: SlurmHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUEUE_PARTITION", "high")
    monkeypatch.setenv("SBATCH_BEGIN", "tomorrow")
    spec = run(in_slurm, GOOD)
    assert result_of(spec).status == "ok"


@pytest.mark.usefixtures("soon")
def test_a_job_whose_scancel_is_refused_is_cancelled_before_the_run_goes_on(
    in_slurm: SlurmHouse, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = f'[ -e {tmp_path}/refused ] && exec $REAL "$@"\ntouch {tmp_path}/refused; echo no >&2; exit 1'
    wrap(tmp_path, "scancel", refuse, monkeypatch)
    spec = begun(in_slurm, DEAF, grace=600)
    folder = in_slurm.root / spec.folder
    durable.write_json(folder / SPEC_NAME, {**durable.read_object(folder / SPEC_NAME), "grace_seconds": 0.5})
    in_slurm.again()
    in_slurm.executor.cancel(spec.key)
    in_slurm.wait_until(spec, JobState.ENDED)
    wait_for(lambda: jobs(cluster, "%A") == [])


@pytest.mark.parametrize("point", ["after sbatch", "after the note", "before the release"])
def test_a_daemon_that_dies_while_it_submits_loses_and_doubles_nothing(
    in_slurm: SlurmHouse, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(in_slurm.root, MARKED)
    real_write, real_ask = durable.write_json, slurm_commands.ask
    died: list[str] = []

    def die() -> None:
        if not died:
            died.append(point)
            raise Death

    def write(path: Path, value: Any, **named: Any) -> None:
        if path.name == JOB_NAME and point == "after sbatch":
            die()
        real_write(path, value, **named)
        if path.name == JOB_NAME and point == "after the note":
            die()

    def ask(*command: str, stdin: str = "") -> str:
        if command[:2] == ("scontrol", "release") and point == "before the release":
            die()
        return real_ask(*command, stdin=stdin)

    monkeypatch.setattr(durable, "write_json", write)
    monkeypatch.setattr(slurm_jobs, "ask", ask)
    monkeypatch.setattr("threading.excepthook", lambda _arguments: None)
    in_slurm.executor.submit(spec)
    wait_for(lambda: died and not thread_of(in_slurm)._thread.is_alive())
    in_slurm.again()
    in_slurm.wait_until(spec, JobState.ENDED)
    assert (marks(in_slurm, spec), result_of(spec).status) == ("begun\n", "ok")


def test_a_step_that_slurm_signals_twice_leaves_its_checkpoint(
    in_slurm: SlurmHouse, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "GIVE_UP_SECONDS", 1.0)
    spec = begun(in_slurm, AS_A_STEP)
    (number,) = jobs(cluster, "%A")
    cluster.says("scancel", number)
    in_slurm.wait_until(spec, JobState.ENDED)
    assert result_of(spec).status == "interrupted"
    assert (in_slurm.root / spec.folder / "checkpoint").exists()


def test_a_step_that_slurm_signals_before_it_can_hear_it_is_interrupted_and_has_not_failed(
    in_slurm: SlurmHouse, cluster: Cluster
) -> None:
    spec = begun(in_slurm, PRELUDE + "say('up'); threading.Event().wait()")
    cluster.says("scancel", *jobs(cluster, "%A"))
    in_slurm.wait_until(spec, JobState.ENDED)
    assert result_of(spec).status == "interrupted"


def test_a_dead_controller_is_said_and_delays_nobody_and_the_job_goes_on(
    in_slurm: SlurmHouse, cluster: Cluster
) -> None:
    spec = begun(in_slurm, UNTIL_GO)
    troubles = thread_of(in_slurm)._troubles
    cluster.kill("slurmctld")
    try:
        wait_for(
            lambda: in_slurm.executor.poll(spec) and "Slurm has not answered since" in troubles.words.get("Slurm", "")
        )
        (in_slurm.root / spec.folder / "go").touch()
        in_slurm.wait_until(spec, JobState.ENDED)
    finally:
        cluster.start("slurmctld")
    assert result_of(spec).status == "ok"
    wait_for(lambda: troubles.words == {})


def moved_on(folder: Path, seen: str) -> bool:
    return (folder / "progress.json").read_text() != seen


def test_a_second_copy_of_a_job_does_nothing_and_does_not_end_the_first(
    in_slurm: SlurmHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "GIVE_UP_SECONDS", 1.5)
    moves = PRELUDE + (
        "say('up'); n = 0\nwhile not os.path.exists('go'):\n"
        "    n += 1; pathlib.Path('aside').write_text(str(n)); os.rename('aside', 'progress.json')\n"
        "    threading.Event().wait(.2)\nresult('ok', 0)"
    )
    spec = spec_of(in_slurm.root, moves)
    in_slurm.executor.submit(spec)
    folder = in_slurm.root / spec.folder
    wait_for((folder / "said").exists)
    # As if Slurm knew the copy alone that was refused.
    monkeypatch.setattr(SlurmJobs, "listed", lambda _self: [])
    for _ in range(4):
        seen = (folder / "progress.json").read_text()
        wait_for(partial(moved_on, folder, seen))
        assert in_slurm.executor.poll(spec) is JobState.RUNNING
        thread_of(in_slurm)._turn()
    assert not (folder / REVOKED_NAME).exists()
    (folder / "go").touch()
    in_slurm.wait_until(spec, JobState.ENDED)


def test_a_damaged_note_of_one_attempt_stops_no_other_and_is_said(in_slurm: SlurmHouse) -> None:
    spoilt, good = spec_of(in_slurm.root, UNTIL_TERM), spec_of(in_slurm.root, GOOD, run=2)
    (in_slurm.root / spoilt.folder).mkdir(parents=True)
    (in_slurm.root / spoilt.folder / JOB_NAME).write_text("")
    for spec in (spoilt, good):
        in_slurm.executor.submit(spec)
    in_slurm.wait_until(good, JobState.ENDED)
    in_slurm.executor.poll(spoilt)
    assert "run 1" in thread_of(in_slurm)._troubles.words


def error_of(spec: StepSpec) -> str:
    error = result_of(spec).error
    return "" if error is None else error.message


@pytest.mark.usefixtures("soon")
def test_attempts_on_a_node_that_is_away_are_interrupted_and_a_copy_that_lives_on_there_stops(
    in_slurm: SlurmHouse, cluster: Cluster
) -> None:
    lives = begun(in_slurm, UNTIL_TERM, grace=600)
    dies = begun(in_slurm, PRELUDE + "say(str(os.getpid())); threading.Event().wait()", run=2, grace=0.5)
    nodes = set(jobs(cluster, "%N"))
    for node in nodes:
        cluster.kill(node)
    try:
        # From Slurm's own process down to the step, or it would be told of the end.
        step = int((in_slurm.root / dies.folder / "said").read_text())
        for number in (parent_of(parent_of(step)), parent_of(step), step):
            os.kill(number, 9)
        # Slurm does so itself, later.
        cluster.says("scontrol", "update", f"nodename={','.join(nodes)}", "state=down", "reason=gone")
        for spec in (lives, dies):
            in_slurm.wait_until(spec, JobState.ENDED)
    finally:
        cluster.start(*nodes)
        cluster.resume()
    assert [result_of(spec).status for spec in (lives, dies)] == ["interrupted", "interrupted"]
    assert error_of(lives) == "", "the step wrote its result itself"
    assert error_of(dies).endswith("NODE_FAIL")


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.usefixtures("soon")
def test_a_number_that_slurm_gives_out_again_is_not_the_attempts(in_slurm: SlurmHouse, cluster: Cluster) -> None:
    state, older = cluster.root / "state", cluster.root / "older"
    cluster.stop("slurmctld")
    shutil.copytree(state, older)
    cluster.start("slurmctld")
    spec, other = begun(in_slurm, UNTIL_TERM), spec_of(in_slurm.root, GOOD, run=2)
    folder = in_slurm.root / spec.folder
    cluster.kill("slurmctld")
    shutil.rmtree(state)
    older.rename(state)
    cluster.start("slurmctld")
    number = cluster.says("sbatch", "--parsable", "--hold", "--wrap=true").strip()
    assert int(number) == durable.read_object(folder / JOB_NAME)["job"]
    in_slurm.wait_until(spec, JobState.ENDED)
    assert result_of(spec).status == "interrupted"
    in_slurm.executor.submit(other)
    # Slurm drains a node that sees a number twice.
    wait_for(lambda: cluster.resume() and in_slurm.executor.poll(other) is JobState.ENDED)
    assert result_of(other).status == "ok"
    # Somebody else's job stays.
    wait_for(lambda: jobs(cluster, "%A", "%r") == [f"{number}|JobHeldUser"])


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("leaves_result", [True, False])
def test_a_preempted_attempt_is_interrupted(in_slurm: SlurmHouse, cluster: Cluster, *, leaves_result: bool) -> None:
    silent = PRELUDE + f"def end(*_): {VANISH}\n" + "signal.signal(signal.SIGTERM, end); say('up')\n"
    silent += "while True: threading.Event().wait(1)"
    spec = begun(in_slurm, AS_A_STEP if leaves_result else silent, grace=600 if leaves_result else 0.5)
    cluster.says("sbatch", "--partition=high", "--exclusive", "--nodes=3", "--wrap=sleep 600")
    in_slurm.wait_until(spec, JobState.ENDED)
    assert result_of(spec).status == "interrupted"
    assert error_of(spec).endswith("" if leaves_result else "PREEMPTED")
    assert (in_slurm.root / spec.folder / "checkpoint").exists() is leaves_result


def test_a_step_is_told_of_the_time_limit_before_it(in_slurm: SlurmHouse) -> None:
    in_slurm.settings = ExecutorSettings(kind="slurm", poll_seconds=0.5, slurm={"train": {"time": "2"}})
    in_slurm.again()
    # Slurm looks every 30 s and signals a round early: at the earliest 45 s after the start, at the latest 45 s before
    # the limit.
    spec = run(in_slurm, AS_A_STEP, grace=45)
    assert result_of(spec).status == "interrupted"
    folder = in_slurm.root / spec.folder
    assert (folder / "checkpoint").stat().st_mtime < durable.read_object(folder / CLAIM_NAME)["until"]
    assert was_out_of_time(spec)


def test_a_job_that_the_administrator_holds_waits_with_its_reason_and_is_not_released(
    in_slurm: SlurmHouse, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = f'[ "$1" = release ] && [ ! -e {tmp_path}/free ] && exec $REAL hold "$2"\nexec $REAL "$@"'
    wrap(tmp_path, "scontrol", held, monkeypatch)
    spec = spec_of(in_slurm.root, GOOD)
    in_slurm.executor.submit(spec)

    def told() -> str:
        assert in_slurm.executor.poll(spec) is JobState.QUEUED
        return str(in_slurm.troubles.words.get("run 1", ""))

    wait_for(lambda: "does not begin: JobHeldAdmin" in told())
    (tmp_path / "free").touch()
    cluster.says("scontrol", "release", *jobs(cluster, "%A"))
    in_slurm.wait_until(spec, JobState.ENDED)
    assert result_of(spec).status == "ok"
    wait_for(lambda: in_slurm.troubles.words == {})


@pytest.mark.usefixtures("soon")
def test_a_job_that_slurm_has_forgotten_is_not_run_again(in_slurm: SlurmHouse, cluster: Cluster) -> None:
    good, bad = spec_of(in_slurm.root, MARKED), spec_of(in_slurm.root, MARKED_AND_VANISHED, run=2, grace=0.5)
    for spec in (good, bad):
        in_slurm.executor.submit(spec)
        wait_for((in_slurm.root / spec.folder / "../marks").exists)
    thread_of(in_slurm).stop()
    wait_for(lambda: cluster.answers() and not cluster.says("squeue", "--me", "--states=all", "--noheader"))
    in_slurm.again()
    for spec in (good, bad):
        in_slurm.wait_until(spec, JobState.ENDED)
        assert marks(in_slurm, spec) == "begun\n"
    assert [result_of(spec).status for spec in (good, bad)] == ["ok", "interrupted"]
    assert error_of(bad).endswith("GONE")


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("call", ["squeue", "sbatch", "scontrol"])
def test_a_controller_that_dies_after_a_call_loses_and_doubles_nothing(
    in_slurm: SlurmHouse, cluster: Cluster, tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies = f'[ -e {tmp_path}/died ] && exec $REAL "$@"\n$REAL "$@"; kill -9 $(cat {cluster.root}/slurmctld.pid)\n'
    wrap(tmp_path, call, dies + f"touch {tmp_path}/died", monkeypatch)
    spec = spec_of(in_slurm.root, MARKED, grace=0.5)
    in_slurm.executor.submit(spec)
    wait_for((tmp_path / "died").exists)
    cluster.kill("slurmctld")
    cluster.start("slurmctld")
    wait_for(lambda: cluster.resume() and in_slurm.executor.poll(spec) is JobState.ENDED)
    # A controller that is killed may lose a job that it has accepted.
    begun = (in_slurm.root / spec.folder / "../marks").exists()
    assert result_of(spec).status == ("ok" if begun else "interrupted")
    assert not begun or marks(in_slurm, spec) == "begun\n"


def test_two_installations_of_one_user_leave_each_other_alone(
    make_house: Callable[[Path], SlurmHouse], cluster: Cluster, tmp_path: Path
) -> None:
    houses = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        houses.append(make_house(tmp_path / name))
    one, two = (spec_of(house.root, UNTIL_GO) for house in houses)
    for house, spec in zip(houses, (one, two), strict=True):
        house.executor.submit(spec)
    wait_for(lambda: all((Path(spec.root) / spec.folder / "said").exists() for spec in (one, two)))
    assert len(jobs(cluster, "%A")) == 2
    houses[0].executor.cancel(one.key)
    houses[0].wait_until(one, JobState.ENDED)
    for house in houses:
        thread_of(house)._turn()
    assert houses[1].executor.poll(two) is JobState.RUNNING
    (houses[1].root / two.folder / "go").touch()
    houses[1].wait_until(two, JobState.ENDED)
    assert result_of(two).status == "ok"


def test_a_job_of_another_fence_is_not_taken_for_the_attempts(in_slurm: SlurmHouse, cluster: Cluster) -> None:
    spec = spec_of(in_slurm.root, MARKED)
    name = f"--job-name={thread_of(in_slurm)._jobs._name}{spec.key}"
    cluster.says("sbatch", "--hold", name, "--comment=another", "--wrap=true")
    in_slurm.executor.submit(spec)
    in_slurm.wait_until(spec, JobState.ENDED)
    assert marks(in_slurm, spec) == "begun\n"
    in_slurm.again()
    assert in_slurm.executor.poll(spec) is JobState.ENDED
    thread_of(in_slurm)._turn()
    wait_for(lambda: jobs(cluster, "%j") == [])
