"""A real cluster on this machine, and executors in a state folder of their own."""

import json
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon.dispatch.slurm import SlurmExecutor
from daemon.dispatch.spool import Executor, JobState, LocalExecutor
from daemon.settings.sections import ExecutorSettings
from daemon.state.troubles import Troubles
from daemon.system.folders import WorkFolder
from pipeline.contract import JOB_NAME, StepSpec
from tests.daemon.dispatch.test_worker import serving
from tests.run_owner import spool_of
from tests.slurm.cluster import NEEDS_SLURM, Cluster, new_cluster, wait_for

#: Does as `dropforge worker --one KEY FENCE --state ROOT`, with a script in the place of a step.
NODE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[4])!r})
from pathlib import Path
from daemon.dispatch import attempt
from tests.daemon.dispatch.test_worker import as_scripted
_, key, fence, _, root = sys.argv[1:]
attempt.serve_one(Path(root), key, fence, as_scripted)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Start a cluster of three nodes that soon forgets its jobs."""
    with new_cluster(MinJobAge=5, KillWait=30) as made:
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


class SlurmHouse(House):
    """A state folder whose steps are jobs."""

    def __init__(self, folder: Path) -> None:
        """Use `state` in `folder`; a change of `settings` holds from the next executor on."""
        root = folder / "state"
        (root / "runs").mkdir(mode=0o700, parents=True)
        root.chmod(0o700)
        (folder / "node.py").write_text(NODE)
        instance, program = uuid.uuid4().hex[:8], (sys.executable, str(folder / "node.py"))
        self.settings, self.troubles = ExecutorSettings(kind="slurm", poll_seconds=0.5), Troubles()
        super().__init__(root, lambda: SlurmExecutor(instance, WorkFolder(root), self.settings, self.troubles, program))


@pytest.fixture
def make_house(
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,  # noqa: ARG001 - which is removed after this one's end
) -> Iterator[Callable[[Path], SlurmHouse]]:
    """Make installations in folders; at the end no job of theirs is left."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    houses = []

    def make(folder: Path) -> SlurmHouse:
        houses.append(SlurmHouse(folder))
        return houses[-1]

    yield make
    for house in houses:
        assert isinstance(house.executor, SlurmExecutor)
        house.executor.stop()
    # A controller that was killed may give a number out again, and a node that has seen it refuses the job.
    seen = [json.loads(path.read_text() or "{}") for house in houses for path in house.root.glob(f"runs/**/{JOB_NAME}")]
    last = max((note.get("job", 0) for note in seen), default=0)
    held = ("sbatch", "--parsable", "--hold", "--wrap=true")
    wait_for(lambda: int((cluster.says(*held).split() or ["0"])[-1]) > last)
    cluster.clear()


@pytest.fixture
def in_slurm(make_house: Callable[[Path], SlurmHouse], tmp_path: Path) -> SlurmHouse:
    """Give a state folder whose steps are jobs."""
    return make_house(tmp_path)


@pytest.fixture(params=["local", pytest.param("slurm", marks=NEEDS_SLURM)])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    """Give a state folder with each executor."""
    if request.param == "slurm":
        yield request.getfixturevalue("in_slurm")
        return
    root = tmp_path / "state"
    root.mkdir(mode=0o700)
    with serving(root, parallel=2):
        yield House(root, lambda: LocalExecutor(spool_of(root)))
