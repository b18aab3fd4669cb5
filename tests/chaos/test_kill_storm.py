"""
Slurm's controller, its nodes' daemons and ours are killed, the shared folder is unmounted and filled, again and again.

Nothing is lost, nothing done twice. Needs root.
"""

import contextlib
import os
import random
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlmodel import select

from daemon.dispatch.step_specs import key_of
from daemon.inbox.watcher import make_inbox
from daemon.settings.load import load
from daemon.state.database import open_engine, transaction
from daemon.state.layout import DATABASE_NAME, SHARE_GONE_NOTE
from daemon.state.run_files import attempt_folder
from daemon.state.states import AttemptState, PromotionKind, RunState
from daemon.state.tables import Attempt, Drop, Promotion, Run
from daemon.system.clock import now_ms
from pipeline.contract import LOG_NAME
from tests.chaos.house import build
from tests.chaos.storm_daemon import ENOUGH
from tests.slurm.cluster import Cluster, new_cluster

ROOT = Path(__file__).parents[2]
SEED = 28
_SETTINGS = """
[executor]
kind = "slurm"
parallel = 4
poll_seconds = 0.5
shared = "{folder}/share"
[disk]
low_water_bytes = 4000000
[tracks.a]
[tracks.b]
[tracks.c]
"""


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


class Storm:
    """The cluster, the daemon and what was killed of them, with the time."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.server, self.share = folder / "server", folder / "share"
        self.kills: list[tuple[int, str]] = []
        self._forks = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.storm_daemon", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **cluster.environment, "PYTHONPATH": str(ROOT)},
        )
        self._daemon = self._begin()

    def kill(self, name: str) -> None:
        """Kill a daemon of Slurm or `dropforge`; take the `share` away, or fill it (`room`)."""
        self.kills.append((now_ms(), name))
        if name == "share":
            run("umount", "--lazy", self.share)
            # An absence that no daemon has seen is none.
            self.wait_until(self._is_absence_seen)
        elif name == "room":
            with contextlib.suppress(OSError), (self.server / "filler").open("wb") as file:
                while True:
                    file.write(bytes(4096))
                    file.flush()
        elif name == "dropforge":
            os.kill(self._daemon, 9)
            assert self._said() == -9, "it had ended by itself"
        else:
            self.cluster.kill(name)

    def start(self, name: str) -> None:
        """Start again what was killed."""
        if name in {"share", "room"}:
            self.kills.append((now_ms(), f"{name} back"))
        if name == "share":
            run("mount", "--bind", self.server, self.share)
        elif name == "room":
            (self.server / "filler").unlink()
        elif name == "dropforge":
            self._daemon = self._begin()
        else:
            self.cluster.start(name)

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait; meanwhile give back nodes that Slurm has drained, as it does where a number comes twice."""
        pause = threading.Event()
        while not condition():
            self.cluster.resume()
            pause.wait(0.2)

    def wait_for_progress(self, marks: int) -> None:
        """Wait until the steps have said that they began, stopped or ended `marks` times."""
        self.wait_until(lambda: self.progress() >= marks)

    def progress(self) -> int:
        """Return how often the steps have said that they began, stopped or ended."""
        with contextlib.suppress(FileNotFoundError):
            return len((self.folder / "share.marks").read_text().splitlines())
        return 0

    def _is_absence_seen(self) -> bool:
        note = self.folder / ".dropforge" / SHARE_GONE_NOTE
        return note.exists() and note.stat().st_mtime_ns // 1_000_000 >= self.kills[-1][0]

    def explains(self, attempt: Attempt) -> bool:
        """Return whether anything was killed during the attempt."""
        return any(attempt.started_at <= at <= (attempt.ended_at or 0) for at, _ in self.kills)

    def finish(self) -> int:
        """Let the daemon end its runs and begin no other; return its exit code."""
        (self.folder / ENOUGH).touch()
        self.wait_until(lambda: not Path(f"/proc/{self._daemon}").exists())
        return self._said()

    def end(self) -> None:
        """End the process that forks the daemons, and the daemon."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._daemon, 9)
        with self._forks:
            self._forks.kill()

    def _begin(self) -> int:
        assert self._forks.stdin is not None
        self._forks.stdin.write("\n")
        self._forks.stdin.flush()
        return self._said()

    def _said(self) -> int:
        assert self._forks.stdout is not None
        return int(self._forks.stdout.readline())


@pytest.fixture
def storm(tmp_path: Path) -> Iterator[Storm]:
    build(tmp_path)
    settings = tmp_path / "dropforge.toml"
    settings.write_text(settings.read_text() + _SETTINGS.format(folder=tmp_path))
    make_inbox(load(settings, {}))
    for name in ("server", "share"):
        (tmp_path / name).mkdir(mode=0o700)
    run("mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs", tmp_path / "server")
    run("mount", "--bind", tmp_path / "server", tmp_path / "share")
    try:
        with new_cluster(MinJobAge=5) as cluster:
            made = Storm(cluster, tmp_path)
            try:
                yield made
            finally:
                made.end()
    finally:
        for name in ("share", "server"):
            run("umount", "--lazy", tmp_path / name)


def test_kills_of_slurm_and_of_the_daemon_lose_no_run_and_double_nothing(
    storm: Storm, capsys: pytest.CaptureFixture[str], *, whole: bool
) -> None:
    dice, pause = random.Random(SEED), threading.Event()
    for _ in range(200 if whole else 25):
        storm.wait_for_progress(storm.progress() + dice.randint(0, 3))
        pause.wait(dice.random())
        name = dice.choice(("slurmctld", "slurmctld", "dropforge", "dropforge", "share", "room", *storm.cluster.nodes))
        storm.kill(name)
        pause.wait(dice.choice((0, 0, 1, 2)))
        storm.start(name)
    assert storm.finish() == 0
    root = storm.folder / ".dropforge"
    engine = open_engine(root / DATABASE_NAME)
    with transaction(engine) as session:
        runs, drops = session.exec(select(Run)).all(), session.exec(select(Drop)).all()
        attempts, promotions = session.exec(select(Attempt)).all(), session.exec(select(Promotion)).all()
    engine.dispose()
    run("umount", "--lazy", storm.share)
    # Slurm itself makes the folder of a job's output.
    left = [path for path in storm.share.rglob("*") if path.is_file() and path.name != LOG_NAME]
    run("mount", "--bind", storm.server, storm.share)
    marks = Counter((storm.folder / "share.marks").read_text().splitlines())
    extra = [attempt for attempt in attempts if attempt.state != AttemptState.PUBLISHED]
    with capsys.disabled():
        kinds = Counter(name for _, name in storm.kills)
        print(f"\n{len(runs)} runs, {len(attempts)} attempts, {len(extra)} of them in vain; killed: {dict(kinds)}")
    assert [(run.id, run.error) for run in runs if run.state != RunState.SUCCEEDED] == []
    assert len(runs) == len(drops), "each drop has its run"
    blamed = [run.id for run in runs if run.failures or run.deaths]
    failed = [(one.run_id, one.step, one.error) for one in extra if one.run_id in blamed]
    assert failed == [], "a kill is nobody's failure"
    published = Counter((one.run_id, one.step) for one in attempts if one.state == AttemptState.PUBLISHED)
    assert set(published.values()) == {1}
    assert Counter(one.run_id for one in promotions if one.kind == PromotionKind.PROMOTION) == Counter(
        run.id for run in runs
    )
    assert {mark: count for mark, count in marks.items() if count != 1} == {}, "an attempt is worked on once"
    submitted = re.findall(r"job_submitted +job=(\d+) key=(\S+)", (storm.folder / "daemon.log").read_text())
    numbers = Counter(number for number, _ in submitted)
    # A node refuses a job whose number it has seen: the kill of the controller that gave it out again was earlier.
    refused = {key for number, key in submitted if numbers[number] > 1}
    assert [one for one in extra if not storm.explains(one) and key_of(one) not in refused] == []
    # The share may go between the look at it and a write. Root may write below the mount point then, a user may not.
    taken = [at for at, name in storm.kills if name == "share"]
    during = [one for one in attempts if any(one.started_at <= at <= (one.ended_at or at) for at in taken)]
    folders = {storm.share / attempt_folder(one.run_id, one.step, one.number) for one in during}
    assert [path for path in left if folders.isdisjoint(path.parents)] == [], "nothing is written into the mount point"
