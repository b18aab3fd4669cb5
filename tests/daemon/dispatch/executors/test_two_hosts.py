"""The shared folder as two hosts see it that remember for an hour that a name was not there, as NFS does for less."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon.dispatch.attempt import listed
from daemon.dispatch.spool import JobState
from tests.daemon.dispatch.executors.conftest import SlurmHouse
from tests.daemon.dispatch.test_worker import GOOD, UNTIL_TERM, result_of, spec_of
from tests.slurm.cluster import NEEDS_SLURM, Cluster, wait_for

_CACHE = "negative_timeout=3600,entry_timeout=3600,attr_timeout=30"


class Share:
    """A folder with two mounts: the daemon's, and one that the nodes see in the daemon's place."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`; needs bindfs and root."""
        self.here, self.there, server = (folder / name for name in ("here", "there", "server"))
        self._mounts = []
        for place in (server, self.here, self.there):
            place.mkdir()
        for place in (self.here, self.there):
            mount = subprocess.Popen(["bindfs", "-f", "-o", _CACHE, server, place])
            self._mounts.append(mount)
            wait_for(place.is_mount)

    @property
    def inside(self) -> tuple[str, ...]:
        """Command by which a node's daemon is started, so that it sees the nodes' mount."""
        script = f'mount --bind {self.there} {self.here} && exec "$@"'
        return ("unshare", "--mount", "sh", "-c", script, "sh")

    def end(self) -> None:
        """Unmount."""
        for place, mount in zip((self.here, self.there), self._mounts, strict=True):
            subprocess.run(["umount", "--lazy", place], check=True)
            mount.kill()  # a node's process that ends late keeps the mount, and with it the program, for as long
            mount.wait()


@pytest.fixture(scope="module")
def share() -> Iterator[Share]:
    folder = Path(tempfile.mkdtemp(prefix="share-"))
    made = Share(folder)
    yield made
    made.end()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cluster(share: Share) -> Iterator[Cluster]:
    """Start a cluster whose nodes see the shared folder through a mount of their own."""
    root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    root.chmod(0o755)
    made = Cluster(root, nodes=1, inside=share.inside)
    try:
        made.start()
        yield made
    finally:
        made.end()
        shutil.rmtree(root)


@NEEDS_SLURM
@pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="mounting needs root")
def test_a_result_and_a_revocation_are_seen_though_each_host_remembers_that_they_were_not_there(
    make_house: Callable[[Path], SlurmHouse], share: Share
) -> None:
    house = make_house(share.here)
    stopped, good = spec_of(house.root, UNTIL_TERM), spec_of(house.root, GOOD, run=2)
    house.executor.submit(stopped)
    house.wait_until(stopped, JobState.RUNNING)
    wait_for(lambda: "said" in listed(house.root / stopped.folder))
    house.executor.cancel(stopped.key)
    house.wait_until(stopped, JobState.ENDED)
    house.executor.submit(good)
    house.wait_until(good, JobState.ENDED)
    assert [result_of(spec).status for spec in (stopped, good)] == ["interrupted", "ok"]
