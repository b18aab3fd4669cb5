"""
Measure each page and each answer of the API on a long history beside a short one.

    python bench/web.py [--runs 10000] [--drops 100000] [--rounds 15]

The histories are those of bench/status.py, with an event for each drop (what was wrong with it is in there) and the
drops of each champion. Pages are asked in one process without a socket, each first once uncounted; the fastest of all
rounds counts, by the clock: what a person waits for, on a machine that does nothing else. Exit code 1 if a page takes
more than 100 ms.
"""

import argparse
import json
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from starlette.testclient import TestClient

from daemon.settings.load import load
from daemon.web.server import make_app

# A script finds only the files beside it.
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.status import SHORT, STARTED, make_history

BUDGET_MS = 100
EVENT = "INSERT INTO event (at, kind, track, run_id, drop_id, detail) VALUES (?,?,'default',?,?,?)"
PAGES = (
    "/",
    "/runs",
    "/runs?before={runs}",
    "/runs?track=default&state=succeeded",
    "/runs?state=failed",
    "/runs/{run}",
    "/drops",
    "/drops?state=rejected",
    "/drops?track=default&state=rejected",
    "/drops?before={half}",
    "/drops/{drop}",
    "/drops/{rejected}",
    "/tracks/default",
    "/tracks/default?before={middle}",
    "/inbox",
    "/inbox?before={half}",
    "/api/v1/status",
    "/api/v1/runs",
    "/api/v1/runs/{run}",
    "/api/v1/drops",
    "/api/v1/drops/{drop}",
    "/api/v1/tracks/default/champions",
)


def main() -> int:
    """Time each page on both histories and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--drops", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as name:
        sizes = (SHORT, (options.runs, options.drops))
        clients = [open_history(Path(name, str(place)), *size) for place, size in enumerate(sizes)]
        heads = [f"{runs:,} runs, {drops:,} drops, ms" for runs, drops in sizes]
        table = Table("", *heads, "ratio", title=f"fastest of {options.rounds}")
        worst = 0.0
        for page in PAGES:
            found = [
                min(timed(client, page, size) for _ in range(options.rounds))
                for client, size in zip(clients, sizes, strict=True)
            ]
            worst = max(worst, found[1])
            table.add_row(page, *(f"{value:.1f}" for value in found), f"{found[1] / found[0]:.1f}")
    console = Console()
    console.print(table)
    console.print(f"budget {BUDGET_MS} ms a page: {'kept' if worst <= BUDGET_MS else 'EXCEEDED'}, worst {worst:.0f} ms")
    return 0 if worst <= BUDGET_MS else 1


def open_history(folder: Path, runs: int, drops: int) -> TestClient:
    """Write a workspace with so many runs and drops, and return a client of its page, each page asked once."""
    make_history(folder, runs, drops)
    settings = load(folder / "dropforge.toml", {})
    base = sqlite3.connect(settings.state_folder / "dropforge.db")
    kinds = [{"message": "output is missing", "remedy": "add it", "rows": 3, "line": 1, "field": "output"}]
    detail = json.dumps({"kinds": kinds, "warnings": []})
    base.executemany(
        EVENT,
        ((STARTED + number, "drop_taken", None, number, detail) for number in range(1, drops + 1)),
    )
    base.execute("UPDATE \"drop\" SET owner = 'ana'")
    base.execute("UPDATE promotion SET drops = json_array(id, id + 1, id + 2, id + 3, id + 4)")
    base.commit()
    base.close()
    client = TestClient(make_app(settings, "t" * 43), base_url="http://127.0.0.1:8765")
    for page in PAGES:
        timed(client, page, (runs, drops))
    return client


def timed(client: TestClient, page: str, size: tuple[int, int]) -> float:
    """Return the milliseconds that a page takes."""
    runs, drops = size
    rejected = next(number for number in range(drops, 0, -1) if number % 7 == 4)  # as bench/status.STATES has it
    path = page.format(
        runs=runs, run=runs - 2, drop=drops // 2, rejected=rejected, half=drops // 2, middle=max(runs // 20, 1)
    )
    begun = time.perf_counter()
    answer = client.get(path)
    taken = (time.perf_counter() - begun) * 1000
    if answer.status_code != 200:
        sys.exit(f"{path}: {answer.status_code} {answer.text}")
    return taken


if __name__ == "__main__":
    sys.exit(main())
