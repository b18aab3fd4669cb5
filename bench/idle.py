"""
Measure an idle daemon: how soon it is ready, and the memory and processor time that it takes for nothing.

    python bench/idle.py [--seconds 60] [--files 1000] [--starts 5]

The inbox's folder `done` holds that many files with their receipts, as after as many drops, and the database knows
them. The worker, which is a process of its own, is shown beside the daemon. Exit code 1 if the daemon is over a budget.
"""

import argparse
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from daemon.inbox.watcher import make_inbox
from daemon.settings.load import load
from daemon.state.database import create

READY_SECONDS, RSS_MB, CPU_PERCENT = 1.5, 120.0, 0.2
DROP = (
    'INSERT INTO "drop" (track, role, state, name_bytes, name, sha256, size_bytes, rows, findings, warnings, '
    "received_at) VALUES ('default', 'train', 'rejected', ?, ?, ?, 10, 1, 0, 0, 1)"
)


class Use(NamedTuple):
    """What a process has taken so far."""

    cpu_seconds: float
    rss_mb: float


def main() -> int:
    """Start the daemon several times, leave the last one alone for a while, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--starts", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as name:
        folder = Path(name)
        make_workspace(folder, options.files)
        starts, busy = [], []
        for number in range(options.starts):
            daemon, seconds = start(folder)
            starts.append(seconds)
            busy.append(use(daemon.pid).cpu_seconds)
            if number < options.starts - 1:
                stop(daemon)
        try:
            worker = child_of(daemon.pid)
            time.sleep(5)
            before = {pid: use(pid) for pid in (daemon.pid, worker)}
            time.sleep(options.seconds)
            after = {pid: use(pid) for pid in (daemon.pid, worker)}
        finally:
            stop(daemon)
    table = Table("", "daemon", "its worker", "budget", title=f"idle, {options.files:,} files in inbox/done")
    cpu = [100 * (after[pid].cpu_seconds - before[pid].cpu_seconds) / options.seconds for pid in before]
    rss = [after[pid].rss_mb for pid in before]
    ready = statistics.median(starts)
    table.add_row(f"ready after, s (median of {len(starts)})", f"{ready:.2f}", "", f"{READY_SECONDS:g}")
    table.add_row("  of that on a processor, s", f"{statistics.median(busy):.2f}", "", "")
    table.add_row("RSS, MB", *(f"{value:.0f}" for value in rss), f"{RSS_MB:g}")
    table.add_row(f"CPU over {options.seconds} s, %", *(f"{value:.2f}" for value in cpu), f"{CPU_PERCENT:g}")
    kept = ready <= READY_SECONDS and rss[0] <= RSS_MB and cpu[0] <= CPU_PERCENT
    console = Console()
    console.print(table)
    console.print(f"budget of the daemon: {'kept' if kept else 'EXCEEDED'}")
    return 0 if kept else 1


def make_workspace(folder: Path, files: int) -> None:
    """Write a workspace that has taken that many files in."""
    (folder / "dropforge.toml").write_text("")
    settings = load(folder / "dropforge.toml", {})
    make_inbox(settings)
    for number in range(files):
        (settings.inbox_folder / "done" / f"{number}.jsonl").write_text('{"instruction": "x", "output": "y"}\n')
        (settings.inbox_folder / "done" / f"{number}.jsonl.receipt.json").write_text("{}\n")
    create(settings.state_folder / "dropforge.db")
    connection = sqlite3.connect(settings.state_folder / "dropforge.db")
    names = [f"{number}.jsonl" for number in range(files)]
    connection.executemany(DROP, ((name.encode(), name, f"{number:064x}") for number, name in enumerate(names)))
    connection.commit()
    connection.close()


def start(folder: Path) -> tuple["subprocess.Popen[bytes]", float]:
    """Start the daemon; return it and the seconds until it said that it is ready."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DROPFORGE_")}
    started = time.perf_counter()
    daemon = subprocess.Popen(
        [sys.executable, "-P", "-m", "daemon", "run"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert daemon.stdout is not None  # noqa: S101 - it is a pipe
    for line in daemon.stdout:
        if b"daemon_ready" in line:
            return daemon, time.perf_counter() - started
    message = f"the daemon ended with {daemon.wait()}"
    raise RuntimeError(message)


def stop(daemon: "subprocess.Popen[bytes]") -> None:
    """End it in order."""
    daemon.send_signal(signal.SIGTERM)
    daemon.communicate()


def child_of(pid: int) -> int:
    """Return the daemon's worker, once it is there."""
    while True:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if found:
            return int(found[0])
        time.sleep(0.05)


def use(pid: int) -> Use:
    """Return what a process has taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    rss = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
    return Use((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), rss / 1024)


if __name__ == "__main__":
    sys.exit(main())
