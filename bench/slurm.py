"""
Measure the Slurm executor against a real Slurm of three nodes, or five, on this machine, with steps that sleep.

    PYTHONPATH=. python bench/slurm.py [--tries 12] [--dead 45] [--parts overhead,rate,dead,restart]

Needs slurmctld, slurmd and munged (`apt-get install slurm-wlm munge`). A job is the product's own, `dropforge worker
--one`, but that a sleeping script takes the place of `python -m pipeline`; dispatcher, database, spool and the worker
of the local steps are the product's. Overhead is the time from submit to the result seen by a main loop that looks each
0.25 s, less what the step sleeps. The restart is without the start of the process, which bench/start.py measures.

Measured on two cores of an AMD EPYC (Zen 3, virtual) with Slurm 24.11: overhead of 12 steps, median 1.3 s, worst 2.5 s;
three tracks on three nodes 2.86 times the runs per hour of one at a time; a tick with slurmctld dead 2 ms, worst 14 ms,
and the trouble noted after 10 s; a restart with ten jobs stops none and has looked at all after 0.14 s.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import structlog
from rich.console import Console
from rich.table import Table
from sqlmodel import select

from daemon.dispatch.attempt import folder_of
from daemon.dispatch.dispatcher import Dispatcher
from daemon.dispatch.slurm import SlurmExecutor
from daemon.dispatch.spool import Executor, JobState, LocalExecutor, Spool
from daemon.dispatch.worker import Worker
from daemon.queue import run_queue
from daemon.queue.states import FINAL
from daemon.settings.load import load
from daemon.settings.sections import ExecutorSettings
from daemon.state.database import create, open_engine, transaction
from daemon.state.states import RunState
from daemon.state.tables import Attempt, Drop, Run
from daemon.state.troubles import Troubles
from daemon.system.clock import now_ms
from daemon.system.folders import WorkFolder
from pipeline.contract import StepSpec
from tests.made_artifacts import made_adapter, made_dataset, made_model, made_report, made_spec, made_verdict
from tests.model_folder import write_model
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[1]
TICK = 0.25
ASKED = "asked.json"
#: Sleeps as long as the file says that lies beside its spec, and hands over the artifact in it.
STEP = f"""
import json, os, pathlib, time
if not os.read(int(os.environ["DROPFORGE_LIFELINE_FD"]), 1):
    os._exit(75)
asked, spec = (json.loads(pathlib.Path(name).read_text()) for name in ("{ASKED}", "spec.json"))
time.sleep(asked["seconds"])
key = f"{{spec['run']}}-{{spec['step']}}-{{spec['attempt']}}"
told = {{"key": key, "fence": spec["fence"], "status": "ok", "exit_code": 0, "artifact": asked["artifact"]}}
pathlib.Path("aside").write_text(json.dumps(told))
os.rename("aside", "result.json")
"""
#: `dropforge worker`, with that script in the place of a step.
NODE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from daemon.cli import main
from daemon.dispatch import attempt
attempt.serve_one.__defaults__ = (lambda spec, path: (sys.executable, "-c", {STEP!r}),)
sys.argv[1:1] = ["worker"]
main()
"""
ARTIFACTS: Mapping[str, Callable[[StepSpec], Any]] = {
    "prepare": made_dataset,
    "train": made_adapter,
    "merge": made_model,
    "evaluate": made_report,
    "decide": lambda spec: made_verdict(spec, "not_shown_better", gain=0.1),
}
Seconds = Mapping[str, float]
#: What the steps of a run sleep.
SHORT: Seconds = {"prepare": 0.2, "train": 20, "merge": 3, "evaluate": 10, "decide": 0.2}
LONG: Seconds = {**SHORT, "train": 100_000}


Row = tuple[str, str, str]


def main() -> int:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=12)
    parser.add_argument("--dead", type=float, default=45, help="seconds without slurmctld")
    parser.add_argument("--parts", default="overhead,rate,dead,restart")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the cluster ends with it
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    table = Table("", "measured", "bar", title="a real Slurm on this machine")
    parts: dict[str, tuple[int, Callable[[Cluster], Iterator[Row]]]] = {
        "overhead": (3, lambda _: overhead(options.tries)),
        "rate": (3, lambda _: rate()),
        "dead": (3, lambda cluster: dead_controller(cluster, options.dead)),
        "restart": (5, restart),  # nodes of two processors: ten jobs
    }
    for name in options.parts.split(","):
        nodes, measure = parts[name]
        with lab(nodes) as cluster:
            for row in measure(cluster):
                table.add_row(*row)
                print(*row, sep=" | ", flush=True)
    Console().print(table)
    return 0


@contextlib.contextmanager
def lab(nodes: int) -> Iterator[Cluster]:
    """Start a cluster whose commands this process finds."""
    root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a short path, for sockets
    root.chmod(0o755)
    cluster = Cluster(root, nodes, cpus=2)
    os.environ.update(cluster.environment)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(root)


# --- what is measured


def overhead(tries: int) -> Iterator[Row]:
    """Run one step after another on the idle cluster."""
    took = []
    with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as name:
        root = Path(name)
        settings = ExecutorSettings(kind="slurm", poll_seconds=1)
        slurm = SlurmExecutor("bench", WorkFolder(root), settings, Troubles(), program_in(root))
        executor = Asking(slurm, {"train": 1.0})
        for number in range(1, tries + 1):
            time.sleep(1.5 + number * 0.37 % 1)  # idle again, and at any moment of the second between two looks
            spec = made_spec(root, "train", run=number)
            began = time.monotonic()
            executor.submit(spec)
            while executor.poll(spec) is not JobState.ENDED:
                time.sleep(TICK)
            took.append(time.monotonic() - began - 1.0)
        slurm.stop()
    measured = f"median {statistics.median(took):.1f} s, worst {max(took):.1f} s"
    yield f"overhead of a step, {tries} tries", measured, "median 2 s, worst 4 s"


def rate() -> Iterator[Row]:
    """Take three tracks' runs to their ends, at once and one at a time."""
    took = {}
    for parallel in (3, 1):
        with House(tracks=3, parallel=parallel, seconds=SHORT, cpus=2) as house:
            began = time.monotonic()
            house.go_on(lambda: house.ended == 3)
            took[parallel] = time.monotonic() - began
    hour = {parallel: 3 * 3600 / seconds for parallel, seconds in took.items()}
    measured = f"{hour[3] / hour[1]:.2f} times ({hour[3]:.0f} and {hour[1]:.0f} runs per hour)"
    yield f"3 tracks on 3 nodes, steps of {sum(SHORT.values()):.0f} s", measured, "2.7 times"


def dead_controller(cluster: Cluster, seconds: float) -> Iterator[Row]:
    """Tick while slurmctld is dead, with three jobs that go on."""
    with House(tracks=3, parallel=3, seconds=LONG) as house:
        house.go_on(lambda: house.training == 3)
        alive = house.go_on_for(15)
        cluster.kill("slurmctld")
        began, said = time.monotonic(), None
        dead = []
        while time.monotonic() - began < seconds:
            dead += house.go_on_for(0)
            if said is None and "Slurm" in house.troubles.words:
                said = time.monotonic() - began
        cluster.start("slurmctld")
        house.go_on(lambda: "Slurm" not in house.troubles.words)
        for label, ticks in (("slurmctld alive", alive), ("slurmctld dead", dead)):
            cuts = statistics.quantiles(ticks, n=100, method="inclusive")
            measured = ", ".join(f"{1000 * value:.0f}" for value in (statistics.median(ticks), cuts[98], max(ticks)))
            yield f"tick, 3 jobs, {label}: median, 99 %, worst of {len(ticks)}", f"{measured} ms", "100 ms"
        yield "until status says so", "never" if said is None else f"{said:.0f} s", "30 s"
        yield "jobs that went on meanwhile", f"{house.training} of 3", "3"
        house.cancel_all()


def restart(cluster: Cluster) -> Iterator[Row]:
    """End the dispatcher and its executor with ten jobs, and begin with new ones."""
    with House(tracks=10, parallel=10, seconds=LONG) as house:
        house.go_on(lambda: house.training == 10)
        before = numbers(cluster)
        house.end_dispatcher()
        began = time.monotonic()
        house.begin_dispatcher()
        house.tick()
        took = time.monotonic() - began
        adopted = len(house.dispatcher.claimed)
        house.go_on_for(5)
        stopped = len(before) - len(before & numbers(cluster))
        yield "restart with 10 jobs: stopped", f"{stopped + 10 - house.training}", "0"
        yield f"restart with 10 jobs: {adopted} adopted and looked at after", f"{took:.2f} s", "2 s"
        house.cancel_all()


def numbers(cluster: Cluster) -> set[str]:
    """Return the numbers of the running jobs."""
    return set(cluster.says("squeue", "--me", "--noheader", "--states=running", "--format=%A").split())


# --- an installation whose steps sleep


def program_in(folder: Path) -> tuple[str, ...]:
    """Write the program that a job runs, and return its arguments."""
    (folder / "node.py").write_text(NODE, encoding="utf-8")
    return (sys.executable, "-P", str(folder / "node.py"))


class Asking:
    """An executor that says beside each spec how long its step sleeps and what it hands over."""

    def __init__(self, executor: Executor, seconds: Seconds) -> None:
        """Have `executor` run the steps."""
        self._executor, self._seconds = executor, seconds
        self.poll, self.cancel = executor.poll, executor.cancel

    def submit(self, spec: StepSpec) -> None:
        """Have the attempt run."""
        folder = Path(spec.root) / spec.folder
        folder.mkdir(parents=True, exist_ok=True)
        artifact = ARTIFACTS[spec.step](spec).model_dump(mode="json") if spec.inputs or spec.step == "prepare" else None
        asked = {"seconds": self._seconds[spec.step], "artifact": artifact}
        (folder / ASKED).write_text(json.dumps(asked), encoding="utf-8")
        self._executor.submit(spec)


class House:
    """A workspace of so many tracks, of each a run that is due, with a dispatcher and a worker for the local steps."""

    def __init__(self, tracks: int, parallel: int, seconds: Seconds, cpus: int = 1) -> None:
        """Write the workspace, whose jobs ask for so many processors; entering it begins its worker."""
        self._folder = Path(tempfile.mkdtemp(prefix="dropforge-bench-"))
        self._seconds = seconds
        write_model(self._folder / "base", b"base weights")
        names = [f"t{number}" for number in range(tracks)]
        text = "".join(f"[tracks.{name}]\n" for name in names)
        jobs = "".join(f"[executor.slurm.{step}]\ncpus = {cpus}\n" for step in ("train", "merge", "evaluate"))
        (self._folder / "dropforge.toml").write_text(
            'base_model = "base"\n[disk]\nlow_water_bytes = 0\n[executor]\nkind = "slurm"\npoll_seconds = 1\n'
            f"parallel = {parallel}\n{jobs}{text}",
            encoding="utf-8",
        )
        self._settings = load(self._folder / "dropforge.toml", {})
        root = self._settings.state_folder
        root.mkdir(mode=0o700)
        create(root / "dropforge.db")
        self._engine = open_engine(root / "dropforge.db", keep=True)
        self._spool = Spool(root, self._settings.work_folder)
        self._worker = Worker(self._spool, lambda _spec, _path: (sys.executable, "-c", STEP), parallel=parallel)
        self._thread = threading.Thread(target=self._worker.serve)
        self.begin_dispatcher()
        with transaction(self._engine) as session:
            for number, name in enumerate(names):
                drop = Drop(
                    track=name,
                    role="train",
                    state="accepted",
                    sha256=f"{number:064x}",
                    name="a",
                    name_bytes=b"a",
                    size_bytes=1,
                    rows=50,
                    received_at=1,
                )
                session.add(drop)
                run_queue.enqueue(session, name, "drop", now_ms(), now_ms())

    def __enter__(self) -> Self:
        """Begin the worker."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End all, and remove the workspace."""
        self.end_dispatcher()
        self._worker.stop.set()
        self._thread.join()
        self._engine.dispose()
        shutil.rmtree(self._folder)

    def begin_dispatcher(self) -> None:
        """Begin as a new daemon does."""
        self.troubles = Troubles()
        self._slurm = SlurmExecutor(
            "bench", self._settings.work_folder, self._settings.executor, self.troubles, program_in(self._folder)
        )
        on_nodes = self._settings.executor.steps_on_nodes
        nodes = dict.fromkeys(on_nodes, Asking(self._slurm, self._seconds))
        local = Asking(LocalExecutor(self._spool), self._seconds)
        self.dispatcher = Dispatcher(self._engine, self._settings, local, self.troubles, nodes)
        self.dispatcher.recover(now_ms())

    def end_dispatcher(self) -> None:
        """End as a daemon does that is told to."""
        self.dispatcher.draining = True
        self.dispatcher.abandon(now_ms())
        self._slurm.stop()

    def tick(self) -> float:
        """Tick once, and return the seconds that it took."""
        began = time.perf_counter()
        self.dispatcher.tick(now_ms())
        return time.perf_counter() - began

    def go_on(self, until: Callable[[], bool]) -> None:
        """Tick as the main loop does until something is so."""
        while not until():
            self.tick()
            time.sleep(TICK)

    def go_on_for(self, seconds: float) -> list[float]:
        """Tick for so many seconds, at least once; return the seconds that each tick took."""
        took: list[float] = []
        end = time.monotonic() + seconds
        while not took or time.monotonic() < end:
            took.append(self.tick())
            time.sleep(TICK)
        return took

    @property
    def ended(self) -> int:
        """How many runs have ended well."""
        with transaction(self._engine) as session:
            states = [run.state for run in session.exec(select(Run))]
        assert not set(states) & (FINAL - {RunState.SUCCEEDED}), states  # noqa: S101 - it would measure nothing
        return states.count(RunState.SUCCEEDED)

    @property
    def training(self) -> int:
        """How many runs have a job that works on their first attempt at training."""
        with transaction(self._engine) as session:
            found = session.exec(select(Attempt).where(Attempt.step == "train", Attempt.state == "submitted")).all()
        folders = [self._settings.work_folder / folder_of(f"{one.run_id}-train-{one.number}") for one in found]
        return sum(
            one.number == 1 and (folder / "claim.json").exists() for one, folder in zip(found, folders, strict=True)
        )

    def cancel_all(self) -> None:
        """Cancel every run and wait until none is open."""
        for run in self.dispatcher.claimed:
            run_queue.cancel(self._engine, run, now_ms())
        self.go_on(lambda: self.dispatcher.idle)


if __name__ == "__main__":
    sys.exit(main())
