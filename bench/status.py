"""
Measure `dropforge status` and `status --json` on a long history beside a short one.

    python bench/status.py [--runs 10000] [--drops 100000] [--rounds 15]

Both histories are of one track and differ in length alone: a tenth as many promotions as runs, one run in training, one
queued, and each run's snapshot names the ten drops that were new in it. The command is timed as a person starts it, a
process each time, and its questions alone in one process; the fastest of all rounds counts, since a machine that does
something else makes the others slower. What counts is the time on a processor: by the clock the start of one and the
same process was seen to differ by a third on an idle virtual machine. Exit code 1 if the long history costs the command
more than 1.2 times as much.
"""

import argparse
import contextlib
import io
import json
import resource
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from daemon.cli import main as dropforge
from daemon.inbox.watcher import make_inbox
from daemon.settings.load import load
from daemon.state.database import create

BUDGET = 1.2
SHORT = (10, 10)
STARTED = 1_764_000_000_000
STATES = ("accepted", "accepted", "accepted", "duplicate", "rejected", "withdrawn", "suspended")
RUN = (
    "INSERT INTO run (id, track, state, trigger, created_at, not_before, token, started_at, ended_at, config, "
    "snapshot, failures, deaths, cancel_requested, step, outcome, verdict) VALUES (?,?,?,?,?,?,?,?,?,?,?,0,0,0,?,?,?)"
)
DROP = (
    'INSERT INTO "drop" (id, track, role, state, name_bytes, name, sha256, size_bytes, rows, findings, warnings, '
    "received_at, first_run) VALUES (?,?,?,?,?,?,?,1000,50,0,0,?,?)"
)
LOST = json.dumps(
    {"outcome": "worse", "reasons": [], "metric": "exact_match", "records": 120, "groups": 120, "gain": -2.0}
)
PROMOTION = (
    "INSERT INTO promotion (track, run_id, generation, model_id, model_path, reason, created_at) "
    "VALUES ('default',?,?,?,?,?,?)"
)


def main() -> int:
    """Time both histories in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--drops", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as name:
        short, long = Path(name, "short"), Path(name, "long")
        make_history(short, *SHORT)
        make_history(long, options.runs, options.drops)
        heads = [f"{runs:,} runs, {drops:,} drops, CPU ms" for runs, drops in (SHORT, (options.runs, options.drops))]
        table = Table("", *heads, "ratio")
        table.title = f"fastest of {options.rounds}, in turns"
        worst = 0.0
        for label, arguments in (("status", ["status"]), ("status --json", ["status", "--json"])):
            for how, take in (("process", in_a_process), ("questions alone", in_this_process)):
                times: dict[Path, list[float]] = {short: [], long: []}
                for _ in range(options.rounds):
                    for folder, taken in times.items():
                        taken.append(timed(lambda: take(folder, arguments)))  # noqa: B023 - called at once
                fastest = [min(taken) * 1000 for taken in times.values()]
                ratio = fastest[1] / fastest[0]
                worst = max(worst, ratio) if how == "process" else worst
                table.add_row(f"{label}, {how}", *(f"{value:.0f}" for value in fastest), f"{ratio:.2f}")
    console = Console()
    console.print(table)
    console.print(f"budget {BUDGET:g} for the command: {'kept' if worst <= BUDGET else 'EXCEEDED'}")
    return 0 if worst <= BUDGET else 1


def make_history(folder: Path, runs: int, drops: int) -> None:
    """Write a workspace with so many runs and drops."""
    folder.mkdir()
    (folder / "dropforge.toml").write_text("")
    settings = load(folder / "dropforge.toml", {})
    make_inbox(settings)
    create(settings.state_folder / "dropforge.db")
    connection = sqlite3.connect(settings.state_folder / "dropforge.db")
    connection.execute(
        "INSERT INTO track (name, salt, created_at, base_path, base_model_id, champion_generation) "
        "VALUES ('default', 's', ?, '/base', 'b', ?)",
        (STARTED, runs // 10),
    )
    connection.executemany(RUN, (run_row(number, runs) for number in range(1, runs + 1)))
    connection.executemany(DROP, (drop_row(number, runs, drops) for number in range(1, drops + 1)))
    connection.executemany(
        PROMOTION,
        (
            (number * 10 or None, number, f"{number:064x}", f"models/{number}", "better", STARTED + number)
            for number in range(runs // 10)
        ),
    )
    connection.commit()
    connection.close()


def run_row(number: int, runs: int) -> tuple[object, ...]:
    """Return run `number` of so many: the last one is queued, the one before it in training, all others over."""
    at = STARTED + number * 60_000
    state = "queued" if number == runs else "running" if number == runs - 1 else "succeeded"
    ended = at + 50_000 if state == "succeeded" else None
    snapshot = json.dumps([10 * number + place for place in range(10)])
    return (
        number,
        "default",
        state,
        "drop",
        at,
        at,
        "token" if state == "running" else None,
        at,
        ended,
        "{}",
        None if state == "queued" else snapshot,
        "train",
        "worse" if ended else None,
        LOST if ended else None,
    )


def drop_row(number: int, runs: int, drops: int) -> tuple[object, ...]:
    """Return drop `number`, spread evenly over the runs."""
    run = 1 + number * (runs - 2) // drops
    name = f"drop{number}.jsonl"
    state = STATES[number % len(STATES)]
    return number, "default", "train", state, name.encode(), name, f"{number:064x}", STARTED + number, run


def in_a_process(folder: Path, arguments: list[str]) -> None:
    """Start the command as a person does."""
    argv = [sys.executable, "-P", "-m", "daemon", *arguments]
    subprocess.run(argv, cwd=folder, stdout=subprocess.DEVNULL, check=False)


def in_this_process(folder: Path, arguments: list[str]) -> None:
    """Call the command's function."""
    sys.argv = ["dropforge", "--config", str(folder / "dropforge.toml"), *arguments]
    with contextlib.redirect_stdout(io.StringIO()):
        dropforge()


def timed(work: Callable[[], object]) -> float:
    """Return the seconds on a processor that `work` takes, here and in processes that it waits for."""
    before = processor_seconds()
    work()
    return processor_seconds() - before


def processor_seconds() -> float:
    """Return what this process and those that it has waited for have had of processors."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    sys.exit(main())
