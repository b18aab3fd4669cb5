"""
Measure what the loop costs beside its own steps, and beside a bare script that does the same.

    python bench/loop.py [--rows 240] [--heldout 120]

Runs, one after the other on the same data and the same base model (SmolLM2-135M-Instruct, NF4):
  loop    the real daemon: one dropped file, from the rename into the inbox to the end of its run
  script  the guide's code in one process: train, merge, evaluate one record at a time
and prints one table. The wait that the settings ask for (the track's quiet time) is left out of the loop's overhead and
shown; a file that is renamed into the inbox is taken without a settle time.

Measured on two cores with avx512_bf16, the first minutes beside another training: 240 s from file to verdict, of it 1.5
s the loop's own; the script 361 s. Training took 74 beside 179 s, evaluation, which asks the suite of general abilities
and one model twice as well, 146 beside 174 s.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sqlmodel import Session, select

from daemon.cli.demo.command import demo_base
from daemon.cli.demo.data import make_data, write_rows
from daemon.state.database import open_reader
from daemon.state.tables import Attempt, Drop, Run
from pipeline import durable

QUIET_SECONDS = 1.0
BUDGET_PERCENT = 5.0
TRAIN = {"learning_rate": 5e-4, "batch_size": 4, "rank": 16, "max_length": 256}


@dataclass(frozen=True)
class LoopTimes:
    """Seconds of one run through the daemon."""

    wall: float
    steps: dict[str, float]
    starts: float
    outcome: str

    @property
    def overhead(self) -> float:
        """What is neither a step's own compute, nor the start of its process, nor the quiet time."""
        return self.wall - sum(self.steps.values()) - self.starts - QUIET_SECONDS


def main() -> int:
    """Run both and print the table; exit 1 if the loop's overhead is over its budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--heldout", type=int, default=120)
    options = parser.parse_args()
    base = demo_base()
    data = make_data(first=options.rows, heldout=options.heldout, second=1)
    with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as name:
        folder = Path(name)
        write_rows(folder / "heldout.jsonl", data.heldout)
        write_rows(folder / "train.jsonl", data.first)
        loop = run_loop(folder, base)
        script = run_script(folder, base)
    return show(loop, script)


def run_loop(folder: Path, base: Path) -> LoopTimes:
    """Time one dropped file through the real daemon."""
    inbox = folder / "inbox"
    (inbox / "heldout").mkdir(parents=True)
    train = "\n".join(f"{key} = {value}" for key, value in TRAIN.items())
    (folder / "dropforge.toml").write_text(
        f'base_model = "{base}"\nrun_after_quiet_seconds = {QUIET_SECONDS}\n'
        f'[gate]\non = "pinned"\n[train]\nformat = "chat"\n{train}\n'
    )
    log = (folder / "daemon.log").open("wb")
    daemon = subprocess.Popen([sys.executable, "-P", "-m", "daemon", "run"], cwd=folder, stdout=log, stderr=log)
    database = folder / ".dropforge" / "dropforge.db"
    try:
        wait_for(lambda: b"daemon_ready" in (folder / "daemon.log").read_bytes())
        # Copies: the script reads the same two files afterwards.
        for name in ("heldout", "train"):
            shutil.copyfile(folder / f"{name}.jsonl", folder / f"{name}.copy")
        (folder / "heldout.copy").rename(inbox / "heldout" / "heldout.jsonl")
        wait_for(lambda: len(rows(database, Drop)) == 1)
        started = time.monotonic()
        (folder / "train.copy").rename(inbox / "train.jsonl")
        wait_for(lambda: any(run.ended_at for run in rows(database, Run)))
        wall = time.monotonic() - started
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait()
        log.close()
    steps, starts = {}, 0.0
    for attempt in rows(database, Attempt):
        place = folder / ".dropforge" / "runs" / "1" / "attempts" / f"{attempt.step}-{attempt.number}"
        seconds = durable.read_json(place / "result.json")["seconds"]
        steps[attempt.step] = seconds
        starts += process_start(place, seconds)
    return LoopTimes(wall, steps, starts, str(rows(database, Run)[0].outcome))


def process_start(place: Path, seconds: float) -> float:
    """Return the seconds from the order of a step to its result that are not its own work."""
    return (place / "result.json").stat().st_mtime - (place / "spec.json").stat().st_mtime - seconds


def run_script(folder: Path, base: Path) -> dict[str, float]:
    """Time the guide's code on the same data in a process of its own."""
    argv = [sys.executable, str(Path(__file__).with_name("bare_script.py")), str(base), str(folder), json.dumps(TRAIN)]
    started = time.monotonic()
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, env={**os.environ, "TQDM_DISABLE": "1"})
    wall = time.monotonic() - started
    parts: dict[str, float] = json.loads(done.stdout.decode().splitlines()[-1])
    return {**parts, "wall": wall}


def show(loop: LoopTimes, script: dict[str, float]) -> int:
    """Print one table; return the exit code."""
    table = Table("", "loop, s", "script, s", title="one dropped file, from inbox to verdict")
    for step, seconds in loop.steps.items():
        table.add_row(f"  {step}", f"{seconds:.1f}", f"{script[step]:.1f}" if step in script else "")
    table.add_row("sum of the steps' own work", f"{sum(loop.steps.values()):.1f}", "")
    table.add_row("starts of their processes", f"{loop.starts:.1f}", "")
    table.add_row("the track's quiet time", f"{QUIET_SECONDS:.1f}", "")
    share = 100 * loop.overhead / sum(loop.steps.values())
    table.add_row("the loop's own overhead", f"{loop.overhead:.1f} ({share:.1f} %)", "")
    table.add_row("wall", f"{loop.wall:.1f}", f"{script['wall']:.1f}")
    table.add_row("loop / script", f"{loop.wall / script['wall']:.2f}", "")
    console = Console()
    console.print(table)
    console.print(f"verdict {loop.outcome}; the script's exact match: {script['before']:.1f} → {script['after']:.1f}")
    within = share <= BUDGET_PERCENT
    console.print(f"overhead budget {BUDGET_PERCENT:g} %: {'kept' if within else 'EXCEEDED'}")
    return 0 if within else 1


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until `condition()` is true."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.1)


def rows(database: Path, table: type[Any]) -> list[Any]:
    """Read all rows of a table; none before there is a database."""
    if not database.exists():
        return []
    engine = open_reader(database)
    with Session(engine) as session:
        found: list[Any] = list(session.exec(select(table)))
    engine.dispose()
    return found


if __name__ == "__main__":
    sys.exit(main())
