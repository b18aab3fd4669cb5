"""
Measure how soon a file in the inbox is a drop: from its rename to the committed row.

One drop after another, then a thousand at once; the real daemon on a state folder of its own, with the default settings
but for the trigger (nothing is trained). Beside it a bare script that makes as many copies, rows and receipts durable:
what the disk itself takes, and a disk that is slow itself is allowed for. Measured on two cores and a disk that takes
the script 2.7 ms: 11 ms, and 9.3 s for the thousand.
Run: python bench/latency.py [DROPS [AT_ONCE]]
"""

import json
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

DROPS, AT_ONCE = 200, 1000
BUDGET_MS, BUDGET_SECONDS, SLOW_DISK = 20.0, 10.0, 1.5
#: Who asks too often keeps the daemon from writing.
_POLL_SECONDS, _SLOW_POLL_SECONDS = 0.001, 0.05


def main(argv: list[str]) -> int:
    """Measure and print; return the exit code: 0 if both are within their budgets."""
    drops, at_once = (int(given) for given in (*argv, *map(str, (DROPS, AT_ONCE)[len(argv) :])))
    with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as name:
        folder = Path(name)
        (folder / "inbox").mkdir()
        (folder / "dropforge.toml").write_text(
            f'trigger = "nightly"\n[intake]\nmax_waiting_drops = {drops + at_once + 1}\n', encoding="utf-8"
        )
        bare = [bare_script(folder, number) for number in range(drops)]
        with (folder / "daemon.log").open("wb") as log:
            daemon = subprocess.Popen([sys.executable, "-P", "-m", "daemon", "run"], cwd=folder, stdout=log, stderr=log)
            try:
                wait_for(lambda: b"daemon_ready" in (folder / "daemon.log").read_bytes())
                took = [1000 * measure(folder, [number]) for number in range(drops)]
                burst = measure(folder, range(drops, drops + at_once))
            finally:
                daemon.send_signal(signal.SIGTERM)
                daemon.wait()
    return show(took, bare, at_once, burst)


def make(folder: Path, number: int) -> Path:
    """Write a file of one row beside the inbox."""
    path = folder / f"{number}.jsonl"
    path.write_text(json.dumps({"instruction": f"say {number}", "output": str(number)}) + "\n", encoding="utf-8")
    return path


def measure(folder: Path, numbers: Sequence[int]) -> float:
    """Return the seconds from renaming files in to the last of their committed rows."""
    made = [make(folder, number) for number in numbers]
    database = sqlite3.connect(f"file:{folder}/.dropforge/dropforge.db?mode=ro", uri=True)
    try:
        began = time.monotonic()
        for path in made:
            path.rename(folder / "inbox" / path.name)
        pause = _POLL_SECONDS if len(numbers) == 1 else _SLOW_POLL_SECONDS
        wait_for(lambda: database.execute('SELECT count(*) FROM "drop"').fetchone()[0] > numbers[-1], pause)
        return time.monotonic() - began
    finally:
        database.close()


def bare_script(folder: Path, number: int) -> float:
    """Return the milliseconds in which a script makes a file's copy, its row and its receipt durable."""
    path, home = make(folder, number), folder / "bare"
    home.mkdir(exist_ok=True)
    database = sqlite3.connect(home / "bare.db", isolation_level=None)
    database.execute("PRAGMA synchronous = EXTRA")
    database.execute("CREATE TABLE IF NOT EXISTS file (name TEXT)")
    began = time.monotonic()
    shutil.copyfile(path, home / path.name)
    sync(home / path.name, home)
    database.execute("INSERT INTO file VALUES (?)", (path.name,))
    (home / f"{number}.receipt").write_text(path.name, encoding="utf-8")
    sync(home / f"{number}.receipt", home)
    path.rename(home / f"{number}.done")
    sync(home, folder)
    took = 1000 * (time.monotonic() - began)
    database.close()
    return took


def sync(*paths: Path) -> None:
    """Make files or folders durable."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def wait_for(condition: Callable[[], object], pause: float = _POLL_SECONDS) -> None:
    """Wait for a condition, looked at every `pause` seconds."""
    while not condition():
        time.sleep(pause)


def show(took: list[float], bare: list[float], at_once: int, burst: float) -> int:
    """Print one table; return the exit code."""
    cuts = statistics.quantiles(took, n=100, method="inclusive")
    median = statistics.median(took)
    table = Table("drops", "median, ms", "90 %, ms", "99 %, ms", "longest, ms", title="rename into the inbox → row")
    table.add_row(str(len(took)), *(f"{value:.1f}" for value in (median, cuts[89], cuts[98], max(took))))
    table.add_row("bare script", f"{statistics.median(bare):.1f}", "", "", "")
    console = Console()
    console.print(table)
    least = SLOW_DISK * statistics.median(bare)
    soon, all_in = median <= max(BUDGET_MS, least), burst <= max(BUDGET_SECONDS, at_once * least / 1000)
    or_slow = f"or {SLOW_DISK:g} times the script's"
    console.print(f"median at most {BUDGET_MS:g} ms, {or_slow}: {'kept' if soon else 'EXCEEDED'}")
    console.print(f"{at_once:,} files at once, all taken: {burst:.1f} s")
    console.print(f"at most {BUDGET_SECONDS:g} s, {or_slow}: {'kept' if all_in else 'EXCEEDED'}")
    return 0 if soon and all_in else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
