"""
Measure one control plane with SQLite on the history of a large installation, up to where it bends.

    PYTHONPATH=. python bench/scale.py [--parts 0.1,0.5,1] [--tracks 1000] [--drops 1000] [--runs 100] [--jobs 200]

Simulated: a month of 1,000 tracks with 1,000 drops and 100 runs each, written by SQL into a database of the product's
own schema, with the folders of the runs; an executor whose steps take their time by a simulated clock. Real: SQLite's
file, dispatcher, schedule, intake, collection and `dropforge status`. A run's snapshot has the ids of all accepted
drops of its track.

Each time is given twice, by the clock and on a processor: on a machine that does something else the second is nearer
to what an idle one takes, though it leaves the waits for the disk out. Due → claimed: in a night every track has a run
that is due, and as many are claimed in a tick as may run at once. What needs more memory than `--memory` GB is said so:
the process is limited to it.

The history is that of a daemon that has collected garbage: of each track eight models are on disk, and three failed
runs' files, so a collection finds nothing to remove. For leave-one-out each drop was left out already.

Measured with --jobs 1000 on two cores of an AMD EPYC (virtual), by the clock and on a processor; at 1,000 tracks other
work had both cores, so the clock shows up to three times as much.

    tracks and runs at once                             10            100           1,000
    database                                            0.01 GB       0.14 GB       1.4 GB
    check at start                                      0.1, 0.1 s    0.7, 0.7 s    10, 8.5 s
    recovery at start                                   0.1, 0.1 s    0.6, 0.6 s    9.1, 8.6 s
    collection at the start                             0.3, 0.3 s    2.6, 2.6 s    31, 30 s
    collection later                                    0.1, 0.1 s    0.9, 0.9 s    11, 11 s
    a night's slots of all tracks                       0.0, 0.0 s    0.2, 0.2 s    2.6, 2.6 s
    due → claimed and the first step submitted, of all  0.4, 0.4 s    3.5, 3.3 s    57, 52 s
    tick that looks at all tracks and ends many steps   0.2, 0.2 s    1.5, 1.4 s    32, 26 s
    tick with all runs open: median                     0, 0 ms       1, 1 ms       16, 9 ms
    tick that ends a run's step: median                 92, 79 ms     96, 87 ms     376, 109 ms
    intake of a drop: median                            8, 7 ms       8, 7 ms       28, 11 ms
    dropforge status                                    0.4, 0.4 s    0.6, 0.5 s    2.8, 2.0 s
    page /                                              28, 28 ms     83, 83 ms     717, 615 ms
    page /api/v1/status                                 19, 19 ms     59, 59 ms     455, 428 ms
    leave-one-out: at the start, and each hour          0.1, 0.1 s    1.7, 1.7 s    62, 23 s
    leave-one-out: without news                         1, 1 ms       1, 1 ms       1, 1 ms
    most memory of the process                          0.11 GB       0.25 GB       0.44 GB

At 100 tracks all is well below what a person or the watchdog notices; at 1,000 the tick that claims a whole night takes
half of the watchdog's two minutes.
"""

import argparse
import contextlib
import json
import random
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine
from starlette.testclient import TestClient

from daemon.champions.hooks.changes import Hooks
from daemon.dispatch.dispatcher import Dispatcher
from daemon.dispatch.spool import JobState
from daemon.dispatch.step_specs import compose
from daemon.inbox.intake import Intake
from daemon.inbox.watcher import Settled, make_inbox
from daemon.queue import leave_one_out
from daemon.queue.nightly import take_due_slots
from daemon.settings.load import load
from daemon.settings.model import Settings
from daemon.state import tables
from daemon.state.database import create, open_engine
from daemon.state.database_file import verify
from daemon.state.troubles import Troubles
from daemon.storage import gc
from daemon.web.server import make_app
from pipeline import durable
from pipeline.artifacts import Verdict
from pipeline.contract import RESULT_NAME, SPEC_NAME, StepResult, StepSpec
from pipeline.decide.explain import brief
from tests.made_artifacts import made_adapter, made_dataset, made_model, made_report, made_spec, made_verdict
from tests.model_folder import write_model

DAY_MS = 86_400_000
PAUSE = 0.25
STEPS = ("prepare", "train", "merge", "evaluate", "decide")
#: Seconds that a step takes: at least and at most.
SECONDS = {"prepare": (20, 60), "train": (1200, 3600), "merge": (30, 90), "evaluate": (200, 600), "decide": (2, 6)}
#: State of each tenth drop of a track.
STATES = ("accepted",) * 7 + ("duplicate", "rejected", "withdrawn")
#: Drops of each track that wait for its next run.
WAITING = 10


#: Labels and values.
Rows = Iterator[tuple[str, str]]


class Size(NamedTuple):
    """How many tracks, drops and runs of each, and runs at once."""

    tracks: int
    drops: int
    runs: int
    jobs: int


def main() -> int:
    """Measure each part of the size, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="0.1,0.5,1", help="parts of the size")
    parser.add_argument("--tracks", type=int, default=1000)
    parser.add_argument("--drops", type=int, default=1000, help="of each track")
    parser.add_argument("--runs", type=int, default=100, help="of each track")
    parser.add_argument("--jobs", type=int, default=200, help="runs at once")
    parser.add_argument("--memory", type=float, default=8, help="most GB that this process may have")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (round(options.memory * 1e9),) * 2)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    results: list[dict[str, str]] = []
    for part in sorted(map(float, options.parts.split(","))):
        with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as name:
            history = History(Path(name), options.drops, options.runs)
            size = Size(round(options.tracks * part), options.drops, options.runs, round(options.jobs * part))
            results.append({"": f"{part:.0%}"})
            print(f"{part:.0%}: the history took {timed(partial(history.make, size))}", flush=True)
            for label, value in measure(history.settings, history, size):
                results[-1][label] = value
                print(f"    {label}: {value}", flush=True)
    table = Table(*(result[""] for result in [{"": ""}, *results]))
    table.title = f"by the clock / on a processor, SQLite {sqlite3.sqlite_version}"
    for label in list(results[0])[1:]:
        table.add_row(label, *(result[label] for result in results))
    Console().print(table)
    return 0


# --- what is measured


def measure(settings: Settings, history: "History", size: Size) -> Rows:
    """Measure one size; yield labels and values."""
    path = settings.state_folder / "dropforge.db"
    yield "tracks, drops, runs", f"{size.tracks:,}, {size.tracks * size.drops:,}, {size.tracks * size.runs:,}"
    yield "database, GB", f"{path.stat().st_size / 1e9:.2f}"
    yield "check at start, s", seconds_of(lambda: verify(path, at_start=True))
    engine = open_engine(path, keep=True)
    forget_peak()
    cleared = set[tuple[int, int]]()
    for when in ("at the start", "later"):
        took = seconds_of(lambda: collect(engine, settings, history.now, cleared))
        yield f"collection {when}, nothing to remove, s", took
    yield "most memory in a collection, MB", f"{peak_mb():.0f}"
    forget_peak()
    take_due_slots(engine, settings, history.now)  # nights count from here
    history.now += DAY_MS
    yield "a night's slots, all tracks, s", seconds_of(lambda: take_due_slots(engine, settings, history.now))
    yield from Dispatching(engine, settings, history, size).measure()
    hooks = Hooks(engine, settings)
    yield "tick of the hooks after a change, ms", f"{timed(lambda: hooks.tick(history.now)):ms}"
    yield "intake of a drop, ms", intake(engine, settings, size, history.now)
    yield "most memory else, MB", f"{peak_mb():.0f}"
    for words in (("status",), ("status", "--json")):
        yield f"dropforge {' '.join(words)}, s", f"{timed(partial(command, settings, *words))}"
    yield from page(settings)
    history.leave_all_out()
    yield from leaving_out(engine, settings, history)
    engine.dispose()


def collect(engine: Engine, settings: Settings, now: int, cleared: set[tuple[int, int]]) -> None:
    """Collect garbage, of which there must be none: the history is that of a daemon that has collected."""
    found = gc.collect(engine, settings, now, cleared=cleared)
    assert not found.items, found.items[:3]  # noqa: S101 - else it measures deletions


def page(settings: Settings) -> Rows:
    """Load the page and the API's status twice each, as a browser does; the second times count."""
    with TestClient(make_app(settings, "t" * 43), base_url="http://127.0.0.1:8765") as client:
        for path in ("/", "/api/v1/status"):
            took = [timed(lambda: client.get(path).raise_for_status()) for _ in range(3)]  # noqa: B023 - at once
            yield f"page {path}, ms", f"{min(took):ms}"


def leaving_out(engine: Engine, settings: Settings, history: "History") -> Rows:
    """Ask of every track whether to leave a drop out, where each was left out already; twice."""
    looked = [(0, 0)]
    tracks = settings.track_names
    for number in ("first", "second"):
        took = timed(
            lambda: looked.append(leave_one_out.go_on(engine, settings, tracks, history.now, Troubles(), looked[-1]))
        )
        yield f"leave-one-out, nothing to queue, {number}, ms", f"{took:ms}"


class Dispatching:
    """A dispatcher with a simulated executor."""

    def __init__(self, engine: Engine, settings: Settings, history: "History", size: Size) -> None:
        """Make both; the history's clock goes on by what ticks take."""
        self._history, self._size = history, size
        self._executor = SimulatedExecutor(history)
        self._dispatcher = Dispatcher(engine, settings, self._executor)

    def measure(self) -> Rows:
        """Claim the runs of a night, work on them all at once, and end three."""
        dispatcher, jobs = self._dispatcher, self._size.jobs
        yield "recovery at start, s", seconds_of(lambda: dispatcher.recover(self._history.now))
        dispatcher.upkeep.may_collect = False  # measured apart
        ticks: list[Took] = []
        claimed: list[Took] = []
        while len(dispatcher.claimed) < jobs:
            before = len(dispatcher.claimed)
            ticks.append(self._tick())
            if len(dispatcher.claimed) > before:
                pauses = PAUSE * (len(ticks) - 1)
                claimed.append(Took(*(pauses + sum(tick[place] for tick in ticks) for place in (0, 1))))
        yield "due → claimed, s: median; worst", f"{of(claimed, statistics.median)}; {of(claimed, max)}"
        yield "tick that claims the last tenth, ms: median; worst", shown(ticks[-max(jobs // 10, 1) :])
        self._history.now += 31_000
        yield "tick that looks at all tracks, ms", f"{self._tick():ms}"
        usual: list[Took] = []
        looked = self._history.now
        while len(usual) < 150:
            if self._history.now - looked > 29_000:
                self._history.now += 2000
                looked = self._history.now
                self._tick()
            else:
                usual.append(self._tick())
        yield (
            "tick with all runs open, ms: median; 99 %",
            f"{of(usual, statistics.median):ms}; {of(usual, most):ms}",
        )
        yield "steps published meanwhile", f"{self._executor.ended}"
        ending = set(sorted(dispatcher.claimed)[:3])
        self._executor.hurried |= ending
        took = []
        while ending & dispatcher.claimed:
            took.append(self._tick())
            dispatcher.upkeep.may_collect = False
        yield "tick that ends steps of three runs, ms: median; worst", shown(took)

    def _tick(self) -> "Took":
        took = timed(lambda: self._dispatcher.tick(self._history.now))
        self._history.now += round(1000 * (took.clock + PAUSE))
        return took


class SimulatedExecutor:
    """Has every step last as long as `SECONDS` says by the simulated clock, and then leave a good result."""

    def __init__(self, history: "History") -> None:
        """Use the clock of `history`."""
        self._history, self._random = history, random.Random(28)
        self._ends: dict[str, float] = {}
        self.hurried: set[int] = set()
        self.ended = 0

    def submit(self, spec: StepSpec) -> None:
        """Write the spec as durably as the product's executors do."""
        folder = Path(spec.root) / spec.folder
        folder.mkdir(parents=True, exist_ok=True)
        durable.write_bytes(folder / SPEC_NAME, spec.model_dump_json().encode())
        durable.fsync_folder(folder.parent)
        self._ends[spec.key] = self._history.now + 1000 * self._random.uniform(*SECONDS[spec.step])

    def poll(self, spec: StepSpec) -> JobState:
        """Return that it runs, until its time is over."""
        if self._history.now < self._ends[spec.key] and spec.run not in self.hurried:
            return JobState.RUNNING
        path = Path(spec.root) / spec.folder / RESULT_NAME
        if not path.exists():
            self.ended += 1
            told = {"key": spec.key, "fence": spec.fence, "status": "ok", "exit_code": 0}
            artifact = ARTIFACTS[spec.step](spec).model_dump(mode="json")
            path.write_text(StepResult.model_validate({**told, "artifact": artifact}).model_dump_json())
        return JobState.ENDED

    def cancel(self, key: str) -> None:
        """Do nothing: nothing runs."""


ARTIFACTS: dict[str, Callable[[StepSpec], Any]] = {
    "prepare": made_dataset,
    "train": made_adapter,
    "merge": made_model,
    "evaluate": made_report,
    "decide": lambda spec: made_verdict(spec, "not_shown_better", gain=0.1),
}


def intake(engine: Engine, settings: Settings, size: Size, now: int) -> str:
    """Take 60 files in as the daemon does; return median and worst."""
    taker, took = Intake(engine, settings), list[Took]()
    for number in range(60):
        track = track_name(number * size.tracks // 60)
        rows = [{"instruction": f"say {number} {place} of {now}", "output": str(place)} for place in range(50)]
        name = f"new{now}-{number}.jsonl"
        (settings.inbox_folder / track / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        took.append(timed(lambda: taker.take(Settled(track, "train", name.encode()), now)))  # noqa: B023 - called at once
    return shown(took)


def command(settings: Settings, *words: str) -> None:
    """Start a command as a person does; 69 says that no daemon runs."""
    argv = [sys.executable, "-P", "-m", "daemon", "--config", str(Path(settings.state).parent / "dropforge.toml")]
    done = subprocess.run([*argv, *words], stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == 69, done  # noqa: S101 - a command that fails measures nothing


class Took(NamedTuple):
    """Seconds by the clock, and on a processor in this process and those that it has waited for."""

    clock: float
    cpu: float

    def __format__(self, unit: str) -> str:
        """Return both in seconds, or with `ms` in milliseconds."""
        return " / ".join(f"{1000 * value:.0f}" if unit == "ms" else f"{value:.1f}" for value in self)


def timed(work: Callable[[], object]) -> Took:
    """Return what `work` takes."""
    began, had = time.perf_counter(), processor_seconds()
    work()
    return Took(time.perf_counter() - began, processor_seconds() - had)


def processor_seconds() -> float:
    """Return what this process and those that it has waited for have had of processors."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def seconds_of(work: Callable[[], object]) -> str:
    """Return the seconds that `work` takes, or that there was not the memory for it."""
    try:
        return f"{timed(work)}"
    except MemoryError:
        return "no memory"


def of(times: list[Took], which: Callable[[list[float]], float]) -> Took:
    """Return one of many times: their median, say."""
    return Took(*(which([took[place] for took in times]) for place in (0, 1)))


def most(values: list[float]) -> float:
    """Return the value that 99 % of `values` are below."""
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def shown(times: list[Took]) -> str:
    """Return median and worst in ms."""
    return f"{of(times, statistics.median):ms}; {of(times, max):ms}"


def forget_peak() -> None:
    """Have Linux count the most memory of this process from now on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mb() -> float:
    """Return the most memory since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


# --- the history


class History:
    """A workspace whose database is filled by SQL, and its clock."""

    def __init__(self, folder: Path, drops: int, runs: int) -> None:
        """Make an empty workspace in `folder`, for tracks with so many drops and runs."""
        self._folder, self._drops, self._runs = folder, drops, runs
        self.now = round(time.time() * 1000)
        self._began = self.now - 30 * DAY_MS
        self._base = folder / "base"
        self._base_id = write_model(self._base, b"base weights")
        self.settings = Settings()

    def make(self, size: Size) -> None:
        """Write the tracks, with their drops, runs, events and run folders."""
        new = range(size.tracks)
        tables_of_tracks = "".join(
            f"[tracks.{track_name(number)}]\nrun_after_quiet_seconds = 60\n" for number in range(size.tracks)
        )
        (self._folder / "dropforge.toml").write_text(
            f'base_model = "base"\ntrigger = "both"\n[disk]\nlow_water_bytes = 0\n'
            f"[executor]\nparallel = {size.jobs}\n"
            f"{tables_of_tracks}",
            encoding="utf-8",
        )
        settings = self.settings = load(self._folder / "dropforge.toml", {})
        make_inbox(settings)
        create(settings.state_folder / "dropforge.db")
        with closing(sqlite3.connect(settings.state_folder / "dropforge.db", isolation_level=None)) as base:
            for pragma in ("synchronous=OFF", "cache_size=-200000", "temp_store=MEMORY"):
                base.execute(f"PRAGMA {pragma}")
            base.execute("BEGIN")
            self._write(base, settings, new)
            base.execute("COMMIT")
        for run in range(1, 1 + size.tracks * self._runs):
            self._make_folder(settings.work_folder, run, size)

    def _write(self, base: sqlite3.Connection, settings: Settings, new: range) -> None:
        """Write the rows of the tracks `new` in the order of time, all tracks beside each other."""
        like = tables.Track(name=track_name(new.start), salt="s", created_at=0)
        config = json.dumps(compose(settings, like).model_dump(mode="json"))
        fill(base, tables.Track, (self._track(number) for number in new))
        fill(base, tables.Promotion, (self._base_row(number) for number in new))
        snapshots: dict[int, list[int]] = {track: [] for track in new}
        begun = 0
        for turn in range(self._runs + 1):
            upto = -(-(turn + 1) * (self._drops - WAITING) // self._runs) if turn < self._runs else self._drops
            fresh = range(begun, upto)
            begun = upto
            fill(base, tables.Drop, (self._drop(track, place, turn, new) for place in fresh for track in new))
            fill(base, tables.Event, (self._drop_event(track, place, turn, new) for place in fresh for track in new))
            if turn == self._runs:
                break
            for track in new:
                snapshots[track] += [self._number(track, place, new, self._drops) for place in fresh if is_used(place)]
            fill(base, tables.Run, (self._run(track, turn, new, snapshots[track], config) for track in new))
            fill(base, tables.Attempt, (row for track in new for row in self._attempts(track, turn, new)))
            fill(base, tables.Event, (row for track in new for row in self._run_events(track, turn, new)))
            if turn % 10 == 9:
                fill(base, tables.Promotion, (self._promotion(track, turn, new) for track in new))

    def _at(self, turn: int) -> int:
        return self._began + turn * 30 * DAY_MS // (self._runs + 1)

    def _number(self, track: int, place: int, new: range, each: int) -> int:
        """Return the number of a row, counted in the order of time after the earlier tracks' rows."""
        return 1 + new.start * each + place * len(new) + track - new.start

    def _track(self, number: int) -> dict[str, Any]:
        made = self._runs // 10
        return {
            "name": track_name(number),
            "salt": "s",
            "created_at": self._began + number,
            "metric": "exact_match",
            "max_new_tokens": 64,
            "eval_batch_size": 8,
            "split": '{"heldout": 0.1, "dev": 0.05}',
            "base_path": str(self._base),
            "base_model_id": self._base_id,
            "champion_generation": made,
            "champion_model_id": model_of(number, made) if made else self._base_id,
            "champion_path": f"models/{model_of(number, made)}" if made else str(self._base),
        }

    def _base_row(self, number: int) -> dict[str, Any]:
        return {
            "track": track_name(number),
            "kind": "base",
            "generation": 0,
            "model_id": self._base_id,
            "model_path": str(self._base),
            "reason": "base model",
            "created_at": self._began,
        }

    def _promotion(self, track: int, turn: int, new: range) -> dict[str, Any]:
        generation = (turn + 1) // 10
        upto = (turn + 1) * (self._drops - WAITING) // self._runs
        drops = [self._number(track, place, new, self._drops) for place in range(upto) if is_used(place)]
        before = model_of(track, generation - 1) if generation > 1 else self._base_id
        return {
            "track": track_name(track),
            "run_id": self._number(track, turn, new, self._runs),
            "kind": "promotion",
            "generation": generation,
            "model_id": model_of(track, generation),
            "model_path": f"models/{model_of(track, generation)}",
            "previous_model_id": before,
            "previous_path": f"models/{before}" if generation > 1 else str(self._base),
            "reason": "better by 2.0 points",
            "created_at": self._at(turn) + 3_600_000,
            "drops": json.dumps(drops),
        }

    def _drop(self, track: int, place: int, turn: int, new: range) -> dict[str, Any]:
        number, state = self._number(track, place, new, self._drops), STATES[place % 10]
        name = f"batch-{place:05}.jsonl"
        used = state == "accepted" and turn < self._runs
        return {
            "id": number,
            "track": track_name(track),
            "role": "train",
            "state": state,
            "name_bytes": name.encode(),
            "name": name,
            "sha256": f"{number:064x}",
            "size_bytes": 10_000,
            "rows": 50,
            "findings": 0,
            "warnings": 0,
            "duplicate_of": number - len(new) if state == "duplicate" else None,
            "reason": "every row is bad" if state == "rejected" else None,
            "owner": "anna",
            "received_at": self._at(turn),
            "first_run": self._number(track, turn, new, self._runs) if used else None,
        }

    def _run(self, track: int, turn: int, new: range, snapshot: list[int], config: str) -> dict[str, Any]:
        failed, won = turn % 10 == 5, turn % 10 == 9
        outcome = None if failed else "promoted" if won else "not_shown_better"
        facts = {"metric": "exact_match", "records": 120, "groups": 120, "gain": 2.0 if won else 0.5}
        verdict = Verdict.model_validate({"outcome": outcome or "worse", "reasons": (), **facts})
        return {
            "id": self._number(track, turn, new, self._runs),
            "track": track_name(track),
            "state": "failed" if failed else "succeeded",
            "trigger": "drop",
            "created_at": self._at(turn),
            "not_before": self._at(turn),
            "started_at": self._at(turn),
            "ended_at": self._at(turn) + 3_600_000,
            "config": config,
            "snapshot": json.dumps(snapshot),
            "failures": 3 if failed else 0,
            "deaths": 0,
            "cancel_requested": 0,
            "step": "train" if failed else "decide",
            "error": "step train failed" if failed else None,
            "outcome": outcome,
            "verdict": None if failed else json.dumps(brief(verdict)),
            "heldout_version": None if failed else f"{turn // 20:064x}",
        }

    def _attempts(self, track: int, turn: int, new: range) -> Iterator[dict[str, Any]]:
        run = self._number(track, turn, new, self._runs)
        for place, step in enumerate(STEPS[:2] if turn % 10 == 5 else STEPS):
            ended = "failed" if turn % 10 == 5 and step == "train" else "published"
            at = self._at(turn) + 600_000 * place
            told = {"run_id": run, "step": step, "number": 1, "fence": f"{run:032x}", "state": ended}
            yield {**told, "started_at": at, "ended_at": at + 600_000}

    def _drop_event(self, track: int, place: int, turn: int, new: range) -> dict[str, Any]:
        detail = {
            "name": f"batch-{place:05}.jsonl",
            "rows": 50,
            "reason": None,
            "source": f"{place}:{self._at(turn) * 1_000_000}:10000",
            "warnings": [],
            "run": None,
            "kinds": [],
        }
        kind = f"drop_{STATES[place % 10]}"
        about = {"track": track_name(track), "drop_id": self._number(track, place, new, self._drops)}
        return {"at": self._at(turn), "kind": kind, **about, "run_id": None, "detail": json.dumps(detail)}

    def _run_events(self, track: int, turn: int, new: range) -> Iterator[dict[str, Any]]:
        about = {"track": track_name(track), "run_id": self._number(track, turn, new, self._runs), "drop_id": None}
        steps = [(kind, step) for step in STEPS for kind in ("step_submitted", "step_published")]
        for kind, step in (("run_queued", ""), ("run_claimed", ""), *steps, ("run_succeeded", "")):
            detail = {"step": step, "attempt": 1, "error": None} if step else {"trigger": "drop"}
            yield {"at": self._at(turn), "kind": kind, **about, "detail": json.dumps(detail)}

    def _make_folder(self, root: Path, run: int, size: Size) -> None:
        """
        Make a run's folder as a collection leaves it, and its model if that is kept.

        Of each track eight models are kept: of the five latest promotions, and of the three latest other wins.
        """
        turn, track = divmod(run - 1, size.tracks)
        failed, won, left = turn % 10 == 5, turn % 10 == 9, size.runs - turn
        kept = left <= (50 if won else 30 if failed else 4)
        folder, source = root / "runs" / str(run), self._folder / "artifacts" / str(run // 10_000)
        if not source.exists():
            source.mkdir(parents=True)
            for name in (*STEPS, "spec"):
                (source / f"{name}.json").write_text(json.dumps({"folder": "runs/0", "model_id": f"{1:064x}"}))
        for step in STEPS[:2] if failed else STEPS:
            attempt = folder / "attempts" / f"{step}-1"
            attempt.mkdir(parents=True)
            (attempt / SPEC_NAME).hardlink_to(source / "spec.json")
            if not kept:
                gone = ".removed" if step in {"prepare", "train", "merge"} else ""
                (folder / f"{step}{gone}.json").hardlink_to(source / f"{step}.json")
        if not kept:
            return
        (folder / "attempts/train-1/adapter").mkdir()
        (folder / "attempts/prepare-1/train.jsonl").touch()
        spec = made_spec(root, "prepare", run=run)
        (folder / "prepare.json").write_text(made_dataset(spec).model_dump_json())
        if failed:
            return
        model = model_of(track, (turn + 1) // 10) if won else f"{run:064x}"
        (root / "models" / model).mkdir(parents=True)
        (root / "models" / model / "model.safetensors").touch()
        artifacts: dict[str, dict[str, Any]] = {
            "train": {"folder": f"runs/{run}/attempts/train-1/adapter"},
            "merge": {"model_id": model, "folder": f"models/{model}"},
            "evaluate": {"prediction_keys": {}},
            "decide": {"candidate_model_id": model, "report": f"runs/{run}/attempts/decide-1/report"},
        }
        for step, artifact in artifacts.items():
            (folder / f"{step}.json").write_text(json.dumps(artifact))

    def leave_all_out(self) -> None:
        """Note that each champion's drops were left out once, and that no drop waits for a run."""
        with closing(sqlite3.connect(self.settings.state_folder / "dropforge.db")) as base, base:
            base.execute("UPDATE run SET state = 'cancelled', token = NULL, ended_at = 1 WHERE ended_at IS NULL")
            base.execute('UPDATE "drop" SET first_run = 1 WHERE first_run IS NULL')
            base.execute(
                'INSERT INTO run (track, state, "trigger", purpose, about_drop, about_champion, created_at, '
                "not_before, ended_at, failures, deaths, cancel_requested) "
                "SELECT track, 'succeeded', 'idle', 'left_out', "
                'one.id, champion_model_id, 1, 1, 1, 0, 0, 0 FROM "drop" AS one JOIN track ON track.name = track '
                "WHERE one.state = 'accepted'"
            )


def fill(base: sqlite3.Connection, table: Any, rows: Iterator[dict[str, Any]]) -> None:
    """Insert rows of one table, whose values have the same columns."""
    first = next(rows, None)
    if first is None:
        return
    names, marks = ", ".join(first), ", ".join(f":{name}" for name in first)
    statement = f'INSERT INTO "{table.__tablename__}" ({names}) VALUES ({marks})'  # noqa: S608 - our own words
    base.execute(statement, first)
    base.executemany(statement, rows)


def track_name(number: int) -> str:
    """Return the name of a track."""
    return f"t{number:04}"


def is_used(place: int) -> bool:
    """Return whether a track's drop of this number is accepted."""
    return STATES[place % 10] == "accepted"


def model_of(track: int, generation: int) -> str:
    """Return the id of a champion."""
    return f"{track + 1:032x}{generation:032x}"


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
