"""A real cluster on this machine, and executors in a state folder of their own."""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon.dispatch.slurm import SlurmExecutor
from daemon.dispatch.spool import Executor, JobState, LocalExecutor
from daemon.dispatch.worker import Worker
from daemon.settings.model import ExecutorSettings
from daemon.state.troubles import Troubles
from daemon.system.folders import StateFolder, WorkFolder
from pipeline.contract import StepSpec
from tests.daemon.dispatch.test_worker import as_scripted, wait_for
from tests.run_owner import spool_of
from tests.slurm.cluster import NEEDS_SLURM, Cluster, new_cluster

#: Does as `dropforge worker --one KEY FENCE --state ROOT`, with a script in the place of a step.
NODE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[4])!r})
from pathlib import Path
from daemon.dispatch import node
from tests.daemon.dispatch.test_worker import as_scripted
_, key, fence, _, root = sys.argv[1:]
node.serve_one(Path(root), key, fence, as_scripted)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Start a cluster of three nodes."""
    with new_cluster() as made:
        yield made


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
        """Wait until an attempt is in one of `states`."""
        wait_for(lambda: self.executor.poll(spec) in states)


@pytest.fixture
def in_slurm(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    """Give a state folder whose steps are jobs."""
    root = tmp_path / "state"
    root.mkdir(mode=0o700)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "node.py").write_text(NODE)
    settings, folders = ExecutorSettings(kind="slurm", poll_seconds=0.5), (StateFolder(root), WorkFolder(root))
    program, troubles = (sys.executable, str(tmp_path / "node.py")), Troubles()
    made = House(root, lambda: SlurmExecutor(folders, settings, troubles, program))
    yield made
    assert isinstance(made.executor, SlurmExecutor)
    made.executor.stop()


@pytest.fixture(params=["local", pytest.param("slurm", marks=NEEDS_SLURM)])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    """Give a state folder with each executor."""
    if request.param == "slurm":
        yield request.getfixturevalue("in_slurm")
        return
    root = tmp_path / "state"
    root.mkdir(mode=0o700)
    worker = Worker(spool_of(root), as_scripted, parallel=2)
    thread = threading.Thread(target=worker.serve)
    thread.start()
    yield House(root, lambda: LocalExecutor(spool_of(root)))
    worker.stop.set()
    thread.join()
