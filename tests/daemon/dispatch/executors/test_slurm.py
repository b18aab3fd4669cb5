"""What Slurm does to jobs and to whoever submits them: lost answers, a dead controller, other people's commands."""

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from daemon.dispatch import slurm
from daemon.dispatch.slurm import SlurmExecutor
from daemon.dispatch.spool import JobState
from daemon.state.run_files import load_progress
from daemon.system.folders import StateFolder, WorkFolder
from pipeline import durable
from pipeline.contract import CLAIM_NAME, JOB_NAME, JOB_STATE_NAME, REVOKED_NAME, StepSpec
from pipeline.errors import DropforgeError
from tests.daemon.dispatch.executors.conftest import House
from tests.daemon.dispatch.test_worker import GOOD, PRELUDE, UNTIL_TERM, result_of, spec_of, wait_for
from tests.slurm.cluster import NEEDS_SLURM, Cluster

ROOT = Path(__file__).parents[4]
pytestmark = NEEDS_SLURM
MARKED = PRELUDE + "pathlib.Path('../marks').open('a').write('begun\\n'); result('ok', 0)"
#: Stops for any number of signals as a real step does, and says how many came.
AS_A_STEP = (
    PRELUDE
    + f"sys.path.insert(0, {str(ROOT)!r})\nfrom pipeline import __main__ as step\nfrom types import SimpleNamespace\n"
    + "attempt = SimpleNamespace(stop=threading.Event()); step._stop_on_signal(attempt); say('up')\n"
    + "while not attempt.stop.wait(0.05): pass\n"
    + "threading.Event().wait(1); pathlib.Path('checkpoint').touch(); result('interrupted', 75)"
)


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


def test_a_job_whose_number_was_lost_is_found_by_its_name_and_runs_once(
    in_slurm: House, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It accepts the job and gives no answer, the first time.
    lost = f'[ -e {tmp_path}/lost ] && exec $REAL "$@"\ntouch {tmp_path}/lost; $REAL "$@"; exit 1'
    wrap(tmp_path, "sbatch", lost, monkeypatch)
    monkeypatch.setattr(slurm, "_AGAIN_SECONDS", 1.0)
    spec = spec_of(in_slurm.root, MARKED)
    in_slurm.executor.submit(spec)
    in_slurm.wait_until(spec, JobState.ENDED)
    assert marks(in_slurm, spec) == "begun\n"
    wait_for(lambda: jobs(cluster, "%j") == [])


def test_what_a_sites_wrapper_says_before_the_number_is_left_out(
    in_slurm: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrap(tmp_path, "sbatch", 'echo "Welcome to the cluster"; exec $REAL "$@"', monkeypatch)
    spec = spec_of(in_slurm.root, GOOD)
    in_slurm.executor.submit(spec)
    in_slurm.wait_until(spec, JobState.ENDED)
    assert result_of(spec).status == "ok"


def test_a_refusal_is_a_wait_with_its_reason_and_goes_on_when_it_passes(
    in_slurm: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    in_slurm.executor.poll(spec)
    assert troubles.words == {}


@pytest.mark.parametrize("point", ["after sbatch", "after the note", "before the release"])
def test_a_daemon_that_dies_while_it_submits_loses_and_doubles_nothing(
    in_slurm: House, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(in_slurm.root, MARKED)
    real_write, real_ask = durable.write_json, SlurmExecutor._ask
    died: list[str] = []

    class Died(BaseException):
        """Ends the thread, as a kill ends the daemon."""

    def die() -> None:
        if not died:
            died.append(point)
            raise Died

    def write(path: Path, value: Any) -> None:
        if path.name == JOB_NAME and point == "after sbatch":
            die()
        real_write(path, value)
        if path.name == JOB_NAME and point == "after the note":
            die()

    def ask(self: SlurmExecutor, *command: str, stdin: str = "") -> str:
        if command[:2] == ("scontrol", "release") and point == "before the release":
            die()
        return real_ask(self, *command, stdin=stdin)

    monkeypatch.setattr(durable, "write_json", write)
    monkeypatch.setattr(SlurmExecutor, "_ask", ask)
    monkeypatch.setattr("threading.excepthook", lambda _arguments: None)
    in_slurm.executor.submit(spec)
    wait_for(lambda: died and not thread_of(in_slurm)._thread.is_alive())
    in_slurm.again()
    in_slurm.wait_until(spec, JobState.ENDED)
    assert (marks(in_slurm, spec), result_of(spec).status) == ("begun\n", "ok")


def test_a_step_that_slurm_signals_twice_leaves_its_checkpoint(
    in_slurm: House, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "GIVE_UP_SECONDS", 1.0)
    spec = spec_of(in_slurm.root, AS_A_STEP)
    in_slurm.executor.submit(spec)
    wait_for((in_slurm.root / spec.folder / "said").exists)
    (number,) = jobs(cluster, "%A")
    cluster.says("scancel", number)
    in_slurm.wait_until(spec, JobState.ENDED)
    assert result_of(spec).status == "interrupted"
    assert (in_slurm.root / spec.folder / "checkpoint").exists()


def test_a_dead_controller_is_said_and_delays_nobody_and_the_job_goes_on(in_slurm: House, cluster: Cluster) -> None:
    spec = spec_of(
        in_slurm.root,
        PRELUDE + "say('up')\nwhile not os.path.exists('go'): threading.Event().wait(.05)\nresult('ok', 0)",
    )
    in_slurm.executor.submit(spec)
    wait_for((in_slurm.root / spec.folder / "said").exists)
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

    def is_over() -> bool:
        in_slurm.executor.poll(spec)
        return not troubles.words

    wait_for(is_over)


def test_a_cancelled_attempt_that_has_not_begun_is_ended_at_once_and_its_job_goes(
    in_slurm: House, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrap(tmp_path, "scontrol", '[ "$1" = release ] && exit 0\nexec $REAL "$@"', monkeypatch)
    spec = spec_of(in_slurm.root, GOOD)
    in_slurm.executor.submit(spec)
    state = in_slurm.root / spec.folder / JOB_STATE_NAME
    wait_for(state.exists)
    progress = load_progress(WorkFolder(in_slurm.root), spec.run, spec.step, spec.attempt)
    assert progress is not None
    assert re.fullmatch(r"train waits in Slurm \(JobHeldUser\), job \d+, since .*\d\d:\d\d", progress.words)
    in_slurm.executor.cancel(spec.key)
    in_slurm.wait_until(spec, JobState.ENDED)
    assert result_of(spec).status == "interrupted"
    assert durable.read_object(in_slurm.root / spec.folder / CLAIM_NAME)["job"] is None, "nobody can begin it any more"
    wait_for(lambda: jobs(cluster, "%j") == [])


def test_a_job_waits_since_it_was_first_seen_to_wait_whatever_for(in_slurm: House) -> None:
    spec = spec_of(in_slurm.root, GOOD)
    state = in_slurm.root / spec.folder / JOB_STATE_NAME
    state.parent.mkdir(parents=True)

    def since(told: str, reason: str, nodes: str = "") -> object:
        thread_of(in_slurm)._note_state(spec, slurm.Job(7, "name", spec.fence, told, reason, nodes))
        return durable.read_object(state)["since"]

    since("PENDING", "Resources")
    durable.write_hint(state, {**durable.read_object(state), "since": 1})
    assert since("PENDING", "Priority") == 1
    assert since("RUNNING", "None", "n2") != 1


def moved_on(folder: Path, seen: str) -> bool:
    return (folder / "progress.json").read_text() != seen


def test_a_second_copy_of_a_job_does_nothing_and_does_not_end_the_first(
    in_slurm: House, monkeypatch: pytest.MonkeyPatch
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
    monkeypatch.setattr(SlurmExecutor, "_look", lambda _self: [])
    for _ in range(4):
        seen = (folder / "progress.json").read_text()
        wait_for(partial(moved_on, folder, seen))
        assert in_slurm.executor.poll(spec) is JobState.RUNNING
        thread_of(in_slurm)._turn()
    assert not (folder / REVOKED_NAME).exists()
    (folder / "go").touch()
    in_slurm.wait_until(spec, JobState.ENDED)


def test_a_shared_folder_that_is_not_there_is_refused_and_not_begun_anew(tmp_path: Path) -> None:
    state, work = tmp_path / "state", tmp_path / "share"
    for folder in (state, work):
        folder.mkdir()
    slurm._instance(StateFolder(state), WorkFolder(work))
    assert slurm._instance(StateFolder(state), WorkFolder(work)) == (work / "instance").read_text()
    (work / "instance").unlink()
    with pytest.raises(DropforgeError, match="is not this installation's"):
        slurm._instance(StateFolder(state), WorkFolder(work))


def test_a_damaged_note_of_one_attempt_stops_no_other_and_is_said(in_slurm: House) -> None:
    spoilt, good = spec_of(in_slurm.root, UNTIL_TERM), spec_of(in_slurm.root, GOOD, run=2)
    (in_slurm.root / spoilt.folder).mkdir(parents=True)
    (in_slurm.root / spoilt.folder / JOB_NAME).write_text("")
    for spec in (spoilt, good):
        in_slurm.executor.submit(spec)
    in_slurm.wait_until(good, JobState.ENDED)
    in_slurm.executor.poll(spoilt)
    assert "run 1" in thread_of(in_slurm)._troubles.words
