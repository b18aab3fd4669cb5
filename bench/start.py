"""
Measure what a command costs before it does anything: processor time beside that of a bare interpreter.

    python bench/start.py

Measured: --help 6.8 times a bare interpreter (23 while all commands were imported), status of an empty workspace 31.7.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

RUNS = 15
#: Most bare interpreters that a command may cost.
BUDGETS = {"--help": 12.0, "status": 30.0}


def main() -> int:
    """Measure in turns and print; return the exit code: 0 if each command is within its budget."""
    with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as name:
        subprocess.run([*dropforge("init"), "."], cwd=name, check=True, stdout=subprocess.DEVNULL)
        ways = {"bare": [sys.executable, "-c", "pass"], **{words: dropforge(words) for words in BUDGETS}}
        took: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(RUNS):
            for way, argv in ways.items():
                took[way].append(cost(argv, Path(name)))
    bare = statistics.median(took["bare"])
    table = Table("command", "ms", "bare interpreters", "budget", title=f"processor time, median of {RUNS}")
    exceeded = []
    for way, times in took.items():
        median = statistics.median(times)
        table.add_row(way, f"{1000 * median:.0f}", f"{median / bare:.1f}", f"{BUDGETS.get(way, 1):g}")
        exceeded += [way] if median > BUDGETS.get(way, 1) * bare else []
    Console().print(table)
    print(f"within the budgets: {'EXCEEDED by ' + ', '.join(exceeded) if exceeded else 'kept'}")
    return 1 if exceeded else 0


def dropforge(*words: str) -> list[str]:
    """Return the command line of a command."""
    return [sys.executable, "-P", "-m", "daemon", *words]


def cost(argv: list[str], folder: Path) -> float:
    """Return the seconds of processor time of a command; that the daemon does not run is no matter."""
    child = subprocess.Popen(argv, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _pid, _status, used = os.wait4(child.pid, 0)
    child.returncode = 0
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
