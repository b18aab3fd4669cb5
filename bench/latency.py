"""
Measure how soon a file in the inbox is a drop: from its rename to the committed row, one drop after another.

The real daemon on a state folder of its own, with the default settings but for the trigger (nothing is trained).
Measured: 53 ms; 520 ms while departures from the inbox were watched, since watchdog holds each back for half a second.
Run: python bench/latency.py [DROPS]
"""

import json
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

DROPS = 200
BUDGET_MS = 150.0
_POLL_SECONDS = 0.001


def main(argv: list[str]) -> int:
    """Measure and print; return the exit code: 0 if the median is within the budget."""
    drops = int(argv[0]) if argv else DROPS
    with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as name:
        folder = Path(name)
        (folder / "inbox").mkdir()
        (folder / "dropforge.toml").write_text(
            f'trigger = "nightly"\n[intake]\nmax_waiting_drops = {drops + 1}\n', encoding="utf-8"
        )
        with (folder / "daemon.log").open("wb") as log:
            daemon = subprocess.Popen([sys.executable, "-P", "-m", "daemon", "run"], cwd=folder, stdout=log, stderr=log)
            try:
                wait_for(lambda: b"daemon_ready" in (folder / "daemon.log").read_bytes())
                took = [measure(folder, number) for number in range(drops)]
            finally:
                daemon.send_signal(signal.SIGTERM)
                daemon.wait()
    return show(took)


def measure(folder: Path, number: int) -> float:
    """Return the milliseconds from renaming one file in to its committed row."""
    aside = folder / f"{number}.jsonl"
    aside.write_text(json.dumps({"instruction": f"say {number}", "output": str(number)}) + "\n", encoding="utf-8")
    database = sqlite3.connect(f"file:{folder}/.dropforge/dropforge.db?mode=ro", uri=True)
    try:
        began = time.monotonic()
        aside.rename(folder / "inbox" / aside.name)
        wait_for(lambda: database.execute('SELECT 1 FROM "drop" WHERE name = ?', (aside.name,)).fetchone())
        return 1000 * (time.monotonic() - began)
    finally:
        database.close()


def wait_for(condition: Callable[[], object]) -> None:
    """Wait for a condition."""
    while not condition():
        time.sleep(_POLL_SECONDS)


def show(took: list[float]) -> int:
    """Print one table; return the exit code."""
    cuts = statistics.quantiles(took, n=100, method="inclusive")
    median = statistics.median(took)
    table = Table("drops", "median, ms", "90 %, ms", "99 %, ms", "longest, ms", title="rename into the inbox → row")
    table.add_row(str(len(took)), *(f"{value:.0f}" for value in (median, cuts[89], cuts[98], max(took))))
    console = Console()
    console.print(table)
    within = median <= BUDGET_MS
    console.print(f"median budget {BUDGET_MS:g} ms: {'kept' if within else 'EXCEEDED'}")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
