"""
Count the trials an hour of a search, beside a shell loop over the script that the libraries' guides tell to write.

    python bench/search_trials.py [--rows 64] [--trials 4] [--runs 3] [--base FOLDER]

Ours is one train step with a grid over ranks: each trial is trained, its checkpoints are kept, and it is asked the dev
rows; the fourth may end early. The loop starts `fit` of bench/bare_script.py in a process of its own for each rank,
over the base in 4 bits as the guide has it, and asks nothing. SmolLM2-135M-Instruct, rows of the demo, one epoch,
batches of 4; medians of the runs, in turns. On a busy machine they are worthless.

Measured on one of two cores with avx512_bf16, shared with other work, the defaults: the loop 50 trials an hour (61 of
processor time), a search 102 (112), its fourth trial ended early. With 16 rows and two trials a search was slower (112
beside 157): it loads the base twice a trial.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from daemon.cli.demo import demo_base
from daemon.system.threads import thread_variables
from pipeline.config import TrainConfig
from tests.demo_data import make_data

# A script finds only the files beside it.
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.methods import train
from bench.trained import DEV_ROWS

HOUR = 3600.0


def main() -> int:
    """Measure and print; exit 1 if a trial failed, or if the loop was as fast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--base", type=Path)
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    base, ranks = asked.base or demo_base(), [8 * (one + 1) for one in range(asked.trials)]
    rows = list(make_data(first=asked.rows + DEV_ROWS, heldout=1, second=1).first)
    table = Table("", "trials an hour", "of processor time", title=f"{asked.rows} rows; load {os.getloadavg()}")
    ways = {
        "the guide's script in a loop": (lambda: loop(base, rows[:-DEV_ROWS], ranks), {}),
        "a search": (lambda: search(base, rows, ranks), thread_variables()),
    }
    runs = [[measured(work, own) for work, own in ways.values()] for _ in range(asked.runs)]
    took = [tuple(map(statistics.median, zip(*times, strict=True))) for times in zip(*runs, strict=True)]
    for name, (wall, processor) in zip(ways, took, strict=True):
        table.add_row(name, f"{HOUR * asked.trials / wall:.0f}", f"{HOUR * asked.trials / processor:.0f}")
    Console().print(table)
    (theirs, _), (ours, _) = took
    return int(ours >= theirs)


def measured(work: Callable[[], None], own: Mapping[str, str]) -> tuple[float, float]:
    """Return the seconds by clock and processor that child processes with their `own` variables take for it."""
    with patch.dict(os.environ, own):
        return _measured(work)


def _measured(work: Callable[[], None]) -> tuple[float, float]:
    wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def loop(base: Path, rows: Sequence[dict[str, str]], ranks: Sequence[int]) -> None:
    """Train with each rank in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as folder:
        (Path(folder) / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for rank in ranks:
            settings = {"batch_size": 4, "learning_rate": 2e-4, "max_length": 256, "rank": rank}
            code = (
                "import bare_script as b, pathlib as p\n"
                f"b.fit({str(base)!r}, p.Path({folder!r}), {settings}, b.AutoTokenizer.from_pretrained({str(base)!r}))"
            )
            subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, check=True)


def search(base: Path, rows: Sequence[dict[str, str]], ranks: Sequence[int]) -> None:
    """Train with each rank in one step; raises `SystemExit` if a trial failed."""
    space = {"space": {"rank": ranks}, "trials": len(ranks)}
    config = TrainConfig.model_validate(
        {"format": "chat", "epochs": 1, "batch_size": 4, "max_length": 256, "search": space}
    )
    with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as folder:
        adapter = train(Path(folder), base, config, rows)
    if any(one.outcome == "failed" for one in adapter.candidates):
        sys.exit(f"a trial failed: {adapter.candidates}")


if __name__ == "__main__":
    sys.exit(main())
