"""
Measure what the loop costs beside its own steps, and beside a bare script that does the same.

    python bench/loop.py [--rows 240] [--heldout 120] [--runs 3]

Runs, one after the other on the same data and the same base model (SmolLM2-135M-Instruct, NF4), two nights:
  loop    the real daemon: a dropped file, from the rename into the inbox to the end of its run; then a second one
  script  the guide's code in one process: train, merge, evaluate one record at a time; then again on both files' rows
and prints a table for each night, of the run with the median share of the script's time. The script runs as its users
run it, the daemon as its users do; on a busy machine the times are worthless. The wait that the settings ask for (the
track's quiet time) is left out of the loop's overhead; a file that is renamed into the inbox is taken without a settle
time. In the second night the champion's answers are known already, as are the base's to the suite of general
abilities, which the script never asks.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sqlmodel import Session, select

from daemon.cli.demo import demo_base
from daemon.state.database import open_reader
from daemon.state.tables import Drop, Run
from tests.demo_data import make_data, write_rows

QUIET_SECONDS = 1.0
BUDGET_PERCENT = 5.0
#: The loop's share of the script's time, by night.
BUDGETS = (0.65, 0.5)
TRAIN = {"learning_rate": 5e-4, "epochs": 1, "batch_size": 4, "rank": 16, "max_length": 256}


@dataclass(frozen=True)
class LoopTimes:
    """Seconds of one run through the daemon."""

    wall: float
    steps: dict[str, float]
    """From the order of a step to its result, with the start of its process."""
    outcome: str

    @property
    def overhead(self) -> float:
        """Return the time in which no step ran, without the quiet time."""
        return self.wall - sum(self.steps.values()) - QUIET_SECONDS


def main() -> int:
    """Run both and print the tables; exit 1 if the loop's overhead or its share of the time is over its budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--heldout", type=int, default=120)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    base = demo_base()
    data = make_data(first=2 * options.rows, heldout=options.heldout, second=1)
    drops = [data.first[: options.rows], data.first[options.rows :]]
    runs = [both(base, drops, data.heldout) for _ in range(options.runs)]
    middle = [sorted(nights, key=share)[len(nights) // 2] for nights in zip(*runs, strict=True)]
    kept = [show(night, *times) for night, times in enumerate(middle)]
    return 0 if all(kept) else 1


def both(
    base: Path, drops: Sequence[Sequence[dict[str, str]]], heldout: Sequence[dict[str, str]]
) -> list[tuple[LoopTimes, dict[str, float]]]:
    """Run the loop and the script in a folder of their own; return the times of each night."""
    with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as name:
        folder = Path(name)
        write_rows(folder / "heldout.jsonl", heldout)
        times = []
        for night, loop in enumerate(run_loop(folder, base, drops)):
            write_rows(folder / "train.jsonl", [row for drop in drops[: night + 1] for row in drop])
            times.append((loop, run_script(folder, base)))
    return times


def share(times: tuple[LoopTimes, dict[str, float]]) -> float:
    """Return the loop's time over the script's."""
    loop, script = times
    return loop.wall / script["wall"]


def run_loop(folder: Path, base: Path, drops: Sequence[Sequence[dict[str, str]]]) -> list[LoopTimes]:
    """Time each of `drops`, dropped as a file when the run of the former has ended, through the real daemon."""
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
    walls = []
    try:
        wait_for(lambda: b"daemon_ready" in (folder / "daemon.log").read_bytes())
        shutil.copyfile(folder / "heldout.jsonl", folder / "copy")  # the script reads the same file afterwards
        (folder / "copy").rename(inbox / "heldout" / "heldout.jsonl")
        wait_for(lambda: len(rows(database, Drop)) == 1)
        for number, drop in enumerate(drops, 1):
            write_rows(folder / "drop", drop)
            started = time.monotonic()
            (folder / "drop").rename(inbox / f"train-{number}.jsonl")
            wait_for(lambda: sum(run.ended_at is not None for run in rows(database, Run)) == number)  # noqa: B023 - now
            walls.append(time.monotonic() - started)
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait()
        log.close()
    runs = rows(database, Run)
    return [
        LoopTimes(wall, step_seconds(folder, run.id), str(run.outcome)) for wall, run in zip(walls, runs, strict=True)
    ]


def step_seconds(folder: Path, run: int) -> dict[str, float]:
    """Return the seconds from the order of each step of a run to its result."""
    seconds: dict[str, float] = {}
    results = (folder / ".dropforge" / "runs" / str(run) / "attempts").glob("*/result.json")
    for ended, began in sorted((path.stat().st_mtime, path.with_name("spec.json")) for path in results):
        step = began.parent.name.rpartition("-")[0]
        seconds[step] = seconds.get(step, 0.0) + ended - began.stat().st_mtime
    return seconds


def run_script(folder: Path, base: Path) -> dict[str, float]:
    """Time the guide's code on the same data in a process of its own."""
    argv = [sys.executable, str(Path(__file__).with_name("bare_script.py")), str(base), str(folder), json.dumps(TRAIN)]
    started = time.monotonic()
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, env={**os.environ, "TQDM_DISABLE": "1"})
    wall = time.monotonic() - started
    parts: dict[str, float] = json.loads(done.stdout.decode().splitlines()[-1])
    return {**parts, "wall": wall}


def show(night: int, loop: LoopTimes, script: dict[str, float]) -> bool:
    """Print the table of a night, from 0; return whether its budgets are kept."""
    table = Table(
        "", "loop, s", "script, s", title=f"night {night + 1}, from inbox to verdict; load {os.getloadavg()[0]:.1f}"
    )
    for step, seconds in loop.steps.items():
        table.add_row(f"  {step}", f"{seconds:.1f}", f"{script[step]:.1f}" if step in script else "")
    percent, part = 100 * loop.overhead / sum(loop.steps.values()), share((loop, script))
    table.add_row("the track's quiet time", f"{QUIET_SECONDS:.1f}", "")
    table.add_row("the loop's own overhead", f"{loop.overhead:.1f} ({percent:.1f} %)", "")
    table.add_row("wall", f"{loop.wall:.1f}", f"{script['wall']:.1f}")
    Console().print(table)
    print(f"verdict {loop.outcome}; the script's exact match: {script['before']:.1f} → {script['after']:.1f}")
    print(f"loop / script {part:.2f} (budget: {BUDGETS[night]}), overhead's budget: {BUDGET_PERCENT:g} %", flush=True)
    return percent <= BUDGET_PERCENT and part <= BUDGETS[night]


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
