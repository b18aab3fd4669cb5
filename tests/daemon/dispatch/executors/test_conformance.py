"""What both executors do alike: the local one with its worker, and Slurm's with a real cluster on this machine."""

import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon.dispatch.slurm import SlurmExecutor
from daemon.dispatch.spool import Executor, JobState, LocalExecutor
from daemon.dispatch.worker import Worker
from daemon.settings.model import ExecutorSettings
from daemon.state.layout import StateFolder, WorkFolder
from daemon.state.troubles import Troubles
from pipeline.contract import LOG_NAME, StepSpec
from tests.daemon.dispatch.test_worker import (
    DEAF,
    GOOD,
    KILLED,
    PRELUDE,
    UNTIL_TERM,
    as_scripted,
    result_of,
    spec_of,
    wait_for,
)
from tests.run_owner import spool_of
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[4]
#: Does as `dropforge worker --one KEY FENCE --state ROOT`, with a script in the place of a step.
NODE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from daemon.dispatch import node
from tests.daemon.dispatch.test_worker import as_scripted
_, key, fence, _, root = sys.argv[1:]
node.serve_one(Path(root), key, fence, as_scripted)
"""
TWICE = PRELUDE + "marks = pathlib.Path('../marks'); marks.open('a').write('begun\\n'); result('ok', 0)"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Start a cluster of three nodes."""
    root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    root.chmod(0o755)
    made = Cluster(root)
    try:
        made.start()
        yield made
    finally:
        made.end()
        shutil.rmtree(root)


class House:
    """A state folder with an executor, which can be replaced as by a new daemon."""

    def __init__(self, root: Path, make: Callable[[], Executor]) -> None:
        self.root, self.make = root, make
        self.executor = make()

    def again(self) -> None:
        """Have a new daemon's executor."""
        if isinstance(self.executor, SlurmExecutor):
            self.executor.stop()
        self.executor = self.make()

    def wait_until(self, spec: StepSpec, *states: JobState) -> None:
        wait_for(lambda: self.executor.poll(spec) in states)


@pytest.fixture(params=["local", "slurm"])
def house(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    root = tmp_path / "state"
    root.mkdir(mode=0o700)
    if request.param == "local":
        worker = Worker(spool_of(root), as_scripted, parallel=2)
        thread = threading.Thread(target=worker.serve)
        thread.start()
        yield House(root, lambda: LocalExecutor(spool_of(root)))
        worker.stop.set()
        thread.join()
        return
    cluster: Cluster = request.getfixturevalue("cluster")
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "node.py").write_text(NODE)
    settings = ExecutorSettings(kind="slurm", poll_seconds=0.5)
    program = (sys.executable, str(tmp_path / "node.py"))
    made = House(root, lambda: SlurmExecutor((StateFolder(root), WorkFolder(root)), settings, Troubles(), program))
    yield made
    assert isinstance(made.executor, SlurmExecutor)
    made.executor.stop()


def test_an_attempt_that_is_ordered_twice_runs_once_and_its_result_stays(house: House) -> None:
    spec = spec_of(house.root, TWICE)
    for _ in range(2):
        house.executor.submit(spec)
    house.wait_until(spec, JobState.ENDED)
    house.executor.submit(spec)
    assert house.executor.poll(spec) is JobState.ENDED
    assert result_of(spec).status == "ok"
    assert (house.root / spec.folder / "../marks").read_text() == "begun\n"


def test_a_step_that_is_cancelled_while_it_runs_stops_and_says_so(house: House) -> None:
    spec = spec_of(house.root, UNTIL_TERM)
    house.executor.submit(spec)
    house.wait_until(spec, JobState.RUNNING)
    wait_for((house.root / spec.folder / "said").exists)
    for _ in range(2):
        house.executor.cancel(spec.key)
    house.wait_until(spec, JobState.ENDED)
    assert result_of(spec).status == "interrupted"


def test_a_step_that_does_not_stop_is_killed(house: House) -> None:
    spec = spec_of(house.root, DEAF, grace=0.5)
    house.executor.submit(spec)
    wait_for((house.root / spec.folder / "said").exists)
    house.executor.cancel(spec.key)
    house.wait_until(spec, JobState.ENDED)
    assert result_of(spec).status == "interrupted"


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        (KILLED.replace("{}", "9"), 137, "step train was killed by SIGKILL"),
        ("raise SystemExit(3)", 3, "step train ended with exit code 3 and left no result"),
        ("raise SystemExit(74)", 74, "the disk of"),
    ],
)
def test_a_step_that_leaves_no_result_gets_one_with_the_reason(
    house: House, script: str, code: int, words: str
) -> None:
    spec = spec_of(house.root, script)
    house.executor.submit(spec)
    house.wait_until(spec, JobState.ENDED)
    found = result_of(spec)
    assert (found.status, found.exit_code) == ("failed", code)
    assert found.error is not None
    assert found.error.message.startswith(words)


def test_what_a_step_prints_is_in_its_log_while_it_runs_and_a_new_daemon_finds_it(house: House) -> None:
    spec = spec_of(house.root, PRELUDE + "print('seen', flush=True)\n" + UNTIL_TERM.removeprefix(PRELUDE))
    house.executor.submit(spec)
    log = house.root / spec.folder / LOG_NAME
    wait_for(lambda: log.exists() and "seen" in log.read_text())
    house.again()
    house.wait_until(spec, JobState.RUNNING)
    house.executor.cancel(spec.key)
    house.wait_until(spec, JobState.ENDED)
    assert result_of(spec).status == "interrupted"


def test_attempts_of_several_runs_run_at_once(house: House) -> None:
    specs = [spec_of(house.root, UNTIL_TERM, run=run) for run in (1, 2)]
    for spec in specs:
        house.executor.submit(spec)
    wait_for(lambda: all((house.root / spec.folder / "said").exists() for spec in specs))
    for spec in specs:
        house.executor.cancel(spec.key)
        house.wait_until(spec, JobState.ENDED)


def test_a_step_sees_no_secret_of_the_daemons(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    spec = spec_of(house.root, GOOD)
    house.executor.submit(spec)
    house.wait_until(spec, JobState.ENDED)
    assert (house.root / spec.folder / "said").read_text() == "none"
