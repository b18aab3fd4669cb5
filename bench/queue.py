"""
Measure the queue beside huey's SQLite storage: enqueue, claim and finish, one after the other, each of them durable.

    python bench/queue.py [--runs 300]

Both wait for the disk at every commit: synchronous=EXTRA in both journal modes. Ours writes an event for every change,
takes a snapshot at the claim and fences the finish with the claim's token; huey takes a row out and stores a result.
"""

import argparse
import importlib.util
import sqlite3
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "queue":
    # Whoever runs a script of this folder finds this file where the standard library's is wanted: hand that one over.
    _spec = importlib.util.spec_from_file_location("queue", Path(sysconfig.get_path("stdlib"), "queue.py"))
    assert _spec is not None  # noqa: S101
    assert _spec.loader is not None  # noqa: S101
    sys.modules["queue"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["queue"])


@dataclass(frozen=True)
class Rate:
    """Seconds that one peer took for all runs, by part."""

    name: str
    enqueue: float
    claim: float
    finish: float

    @property
    def total(self) -> float:
        """Seconds for all three."""
        return self.enqueue + self.claim + self.finish


def main() -> int:
    """Run every peer and print the table."""
    from rich.console import Console  # noqa: PLC0415 - see the top of this file
    from rich.table import Table  # noqa: PLC0415

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    table = Table("journal", "queue", "enqueue/s", "claim/s", "finish/s", "all three/s", "ours / huey")
    table.title = f"{options.runs} runs, synchronous=EXTRA, SQLite {sqlite3.sqlite_version}, best of {options.rounds}"
    for mode in ("delete", "wal"):
        best: dict[str, Rate] = {}
        # In turns, so that a busy moment of the machine does not hit one peer alone.
        for _ in range(options.rounds):
            for peer in (ours, huey):
                with tempfile.TemporaryDirectory(prefix="dropforge-bench-", dir=Path.cwd()) as folder:
                    rate = peer(Path(folder), mode, options.runs)
                if rate.name not in best or rate.total < best[rate.name].total:
                    best[rate.name] = rate
        for rate in best.values():
            parts = [f"{options.runs / seconds:.0f}" for seconds in (rate.enqueue, rate.claim, rate.finish, rate.total)]
            ratio = best["huey"].total / rate.total
            table.add_row(mode, rate.name, *parts, f"{ratio:.2f}" if rate.name == "dropforge" else "")
    Console().print(table)
    return 0


def ours(folder: Path, mode: str, runs: int) -> Rate:
    """Time our queue."""
    from daemon.queue import order, run_queue  # noqa: PLC0415
    from daemon.queue.states import Claim  # noqa: PLC0415
    from daemon.state import database  # noqa: PLC0415
    from daemon.state.states import DropState  # noqa: PLC0415
    from daemon.state.tables import Drop  # noqa: PLC0415
    from pipeline.artifacts import Verdict  # noqa: PLC0415
    from pipeline.config import RunConfig  # noqa: PLC0415

    database.create(folder / "state.db")
    with closing(sqlite3.connect(folder / "state.db")) as connection:
        connection.execute(f"PRAGMA journal_mode={mode}")
    engine = database.open_engine(folder / "state.db", keep=True)
    config = RunConfig(track="default", base_model="/base", base_model_id="b" * 64, salt="s")
    with database.transaction(engine) as session:
        session.add(
            Drop(
                track="default",
                role="train",
                state=DropState.ACCEPTED,
                name_bytes=b"a",
                name="a",
                sha256="0" * 64,
                size_bytes=1,
                rows=1,
                received_at=1,
            )
        )

    def enqueue() -> None:
        with database.transaction(engine) as session:
            run_queue.enqueue(session, "default", "drop", 1, 1)

    def claim() -> Claim:
        with database.transaction(engine) as session:
            run = order.due_runs(session, 2)[0]
            run_queue.begin(session, run, config, 2)
            return run_queue.claim(session, run, 2)

    lost = Verdict(outcome="worse", reasons=(), metric="exact_match", records=120, groups=120)

    def finish(held: Claim) -> None:
        with database.transaction(engine) as session:
            run_queue.finish(session, held, "worse", lost, 3)

    rate = timed("dropforge", runs, enqueue, claim, finish)
    engine.dispose()
    return rate


def huey(folder: Path, mode: str, runs: int) -> Rate:
    """Time huey's storage through its own interface."""
    from huey import SqliteHuey  # noqa: PLC0415
    from huey.storage import SqliteStorage  # noqa: PLC0415

    class Durable(SqliteStorage):
        def _create_connection(self) -> sqlite3.Connection:
            connection: sqlite3.Connection = super()._create_connection()
            connection.execute("PRAGMA synchronous=EXTRA")
            return connection

    app = SqliteHuey(filename=str(folder / "huey.db"), journal_mode=mode, storage_class=Durable, results=True)

    @app.task()  # type: ignore[untyped-decorator]
    def work() -> str:
        return "it lost"

    rate = timed("huey", runs, lambda: app.enqueue(work.s()), app.dequeue, app.execute)
    app.storage.close()
    return rate


def timed(
    name: str, runs: int, enqueue: Callable[[], object], claim: Callable[[], Any], finish: Callable[[Any], object]
) -> Rate:
    """Take `runs` runs through the three parts, and time each part."""
    spent = [0.0, 0.0, 0.0]
    for _ in range(runs):
        started = time.perf_counter()
        enqueue()
        queued = time.perf_counter()
        claimed = claim()
        taken = time.perf_counter()
        assert claimed is not None  # noqa: S101 - a queue that loses a run measures nothing
        finish(claimed)
        ended = time.perf_counter()
        for place, seconds in enumerate((queued - started, taken - queued, ended - taken)):
            spent[place] += seconds
    return Rate(name, *spent)


if __name__ == "__main__":
    sys.exit(main())
