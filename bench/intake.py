"""
Measure what it costs to validate a drop, beside the loop that everybody writes.

    python bench/intake.py [--rows 100000] [--megabytes 20 100] [--full]

Makes a file of Alpaca records (lengths, escapes and share of inputs like the original's), then reads it in two ways,
each in a process of its own, in turns:
  ours   `pipeline.validate`: every check on, control tokens of a chat model included
  loop   `json.loads` and `jsonschema` on every line, which knows neither lines, encodings, duplicate keys nor tokens
and prints one table: rows a second, their ratio, and the peak memory of ours on a small and a large file. --full is
1,000,000 rows, and files of 100 MB and 2 GB. Everything made is deleted at the end.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from jsonschema import Draft202012Validator
from rich.console import Console
from rich.table import Table

from pipeline.validate import Options, validate

TARGET_RATIO = 8.0
MOST_GROWTH = 1.1
TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>")
SCHEMA = Path(__file__).parents[1] / "schemas" / "alpaca-record.schema.json"
TURNS = 3
#: Share of records that spell characters beyond ASCII, as escapes.
ACCENTED = 0.02
TEXT = """
the of and to in is that it was for on are as with his they at be this have from or one had by word but not
what all were we when your can said there use an each which she do how their if will up other about out many
then them these so some her would make like him into time has look two more write go see number no way could
people over answer "quoted" describe list explain sentence following example model data language
"""


def main() -> int:
    """Measure and print the table; exit 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--megabytes", type=int, nargs=2, default=(20, 100), metavar=("SMALL", "LARGE"))
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--read", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.read:
        print(json.dumps(read(asked.read[0], Path(asked.read[1]))))
        return 0
    rows = 1_000_000 if asked.full else asked.rows
    small, large = (100, 2000) if asked.full else asked.megabytes
    with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as name:
        folder = Path(name)
        make(folder / "rows.jsonl", rows=rows)
        speeds = compare(folder / "rows.jsonl")
        peaks = []
        for megabytes in (small, large):
            path = folder / "size.jsonl"
            make(path, size=megabytes * 1_000_000)
            peaks.append(apart("ours", path)["peak"] / 1e6)
            path.unlink()
    return show(rows, speeds, (small, large), peaks)


def records() -> Iterator[str]:
    """Yield lines of records without end."""
    dice, vocabulary = random.Random(7), TEXT.split()

    def text(least: int, most: int) -> str:
        words = dice.choices(vocabulary, k=dice.randint(least, most))
        for place in range(12, len(words), 12):
            words[place] = "\n" + words[place]
        return " ".join(words).capitalize() + "."

    pool = [text(1, 120) for _ in range(5000)]
    while True:
        record = {
            "instruction": text(6, 18),
            "input": text(3, 30) if dice.random() < 0.4 else "",
            "output": dice.choice(pool),
        }
        if dice.random() < ACCENTED:
            record["output"] += " A naïve café \U0001f642"
        yield json.dumps(record) + "\n"


def make(path: Path, *, rows: int | None = None, size: int | None = None) -> None:
    """Write a file of `rows` records, or of about `size` bytes (of the same 20,000 records again and again)."""
    source = records()
    with path.open("w", encoding="utf-8") as file:
        if rows is not None:
            file.writelines(next(source) for _ in range(rows))
        if size is not None:
            block = "".join(next(source) for _ in range(20_000))
            for _ in range(max(1, round(size / len(block)))):
                file.write(block)


def read(way: str, path: Path) -> dict[str, float]:
    """Read a file in one way; return its rows, seconds of work, and the peak memory of this process in bytes."""
    started = time.process_time()
    rows = ours(path) if way == "ours" else loop(path)
    seconds = time.process_time() - started
    return {"rows": rows, "seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def ours(path: Path) -> int:
    """Validate as the intake does."""
    found = validate(path, Options(control_tokens=TOKENS))
    if not found.ok:
        sys.exit(found.reason)
    return found.good_rows


def loop(path: Path) -> int:
    """Validate as a script does."""
    validator = Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    rows = 0
    with path.open(encoding="utf-8") as file:
        for line in file:
            validator.validate(json.loads(line))
            rows += 1
    return rows


def apart(way: str, path: Path) -> dict[str, float]:
    """Read a file in a process of its own."""
    argv = [sys.executable, __file__, "--read", way, str(path)]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def compare(path: Path) -> dict[str, float]:
    """Return the best rows a second of both ways, taken in turns so that a busy machine is busy for both."""
    found: dict[str, list[float]] = {"ours": [], "loop": []}
    for _ in range(TURNS):
        for way, speeds in found.items():
            once = apart(way, path)
            speeds.append(once["rows"] / once["seconds"])
    return {way: max(speeds) for way, speeds in found.items()}


def show(rows: int, speeds: dict[str, float], sizes: tuple[int, int], peaks: list[float]) -> int:
    """Print one table; return the exit code."""
    ratio, growth = speeds["ours"] / speeds["loop"], peaks[1] / peaks[0]
    table = Table("", "ours", "loop", title=f"validation of {rows:,} Alpaca rows, one core, best of {TURNS}")
    table.add_row("rows/s", f"{speeds['ours']:,.0f}", f"{speeds['loop']:,.0f}")
    table.add_row("ours / loop", f"{ratio:.1f}", "1")
    for size, peak in zip(sizes, peaks, strict=True):
        table.add_row(f"peak memory at {size:,} MB, MB", f"{peak:.1f}", "")
    console = Console()
    console.print(table)
    fast, flat = ratio >= TARGET_RATIO, growth <= MOST_GROWTH
    console.print(f"at least {TARGET_RATIO:g} times the loop: {'kept' if fast else 'MISSED'}")
    console.print(f"memory within {MOST_GROWTH:g} times: {'kept' if flat else 'MISSED'}")
    return 0 if fast and flat else 1


if __name__ == "__main__":
    sys.exit(main())
