"""
Measure what it costs to validate a drop, beside the loop that everybody writes.

    python bench/intake.py [--rows 100000] [--megabytes 20 100] [--full] [--hostile MEGABYTES]

Makes a file of Alpaca records (lengths, escapes and share of inputs like the original's), then reads it in two ways,
each in a process of its own, in turns:
  ours   what `dropforge check`, `submit` and the intake do: every check on, special tokens of a chat model included
  loop   `json.loads` and `jsonschema` on every line, which knows neither lines, encodings, duplicate keys nor tokens
and prints one table: rows a second by the clock and of processor time, medians of three runs, their ratio by the clock,
and the peak memory of ours on a small and a large file. --messages
measures conversations of OpenAI's messages in place of Alpaca rows, against a ratio of 3. --full is 1,000,000 rows, and
files of 100 MB and 2 GB. --hostile measures files made to cost much instead: seconds, time a byte beside that of a good
file of the same size, and peak memory. Everything made is deleted at the end.

Measured by the clock on 100,000 rows, two cores of an AMD EPYC: 215,000 rows a second, 5.3 times as many as the loop.
Memory does not grow with the file: 119 MB at its peak on both.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from jsonschema import Draft202012Validator
from rich.console import Console
from rich.table import Table

from pipeline.records.validate import Options, validate

TARGET_RATIO = 5.0
TARGET_MESSAGES = 3.0
MOST_GROWTH_MB = 36.0
TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>")
SCHEMAS = Path(__file__).parents[1] / "schemas"
TURNS = 3
#: Share of records that spell characters beyond ASCII, as escapes.
ACCENTED = 0.02
#: How often the time a byte of a good file a refused one may take.
MOST_TIMES = 4.0
HEAD = b'{"instruction": "a", "output": "b", "'
#: Files made to cost much: the lines that they repeat.
HOSTILE: dict[str, bytes] = {
    "tags of two million numbers": HEAD + b'tags": [' + b"1," * 1_980_000 + b"1]}\n",
    "tags of 20,000 numbers": HEAD + b'tags": [' + b"1," * 20_000 + b"1]}\n",
    "20 bad tags a line": HEAD + b'tags": [' + b"1," * 19 + b"1]}\n",
    "empty lines": b"\n",
    "carriage returns": b"\r\n",
    "no JSON": b"x\n",
    "empty objects": b"{}\n",
    "keys that stand twice": HEAD + b'x": 1, "x": 2}\n',
    "lone surrogates": HEAD[:-4] + b'\\ud83d"}\n',
    "4 MB of lone surrogates": HEAD + b'x": "' + b"\\ud83d" * 660_000 + b'"}\n',
    "4 MB without an end": HEAD + b"x" * 3_990_000 + b"\n",
    "nested without end": HEAD + b'x": ' + b"[" * 3_990_000 + b"\n",
    "4 MB of digits": HEAD + b'x": ' + b"7" * 3_990_000 + b"}\n",
    "4 MB of <": HEAD[:-4] + b"<" * 3_990_000 + b'"}\n',
    "NUL": b"\0",
}
#: Files whose rows need a look at their JSON, as honest ones may.
UNUSUAL: dict[str, bytes] = {
    "short rows": HEAD[:-3] + b"}\n",
    "an empty line after each row": HEAD[:-3] + b"}\n\n",
    "short rows with a key more": HEAD + b'id": 1}\n',
    "rows of 900 keys more": HEAD + b"".join(b'k%d": 1, "' % key for key in range(900)) + b'":1}\n',
    "330,000 unknown keys": HEAD + b"".join(b'k%d":1,"' % key for key in range(330_000)) + b'":1}\n',
    "two million numbers a row": HEAD + b'x": [' + b"1," * 1_980_000 + b"1]}\n",
    "500,000 objects a row": HEAD + b'x": [' + b'{"a":1},' * 490_000 + b"1]}\n",
}
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
    parser.add_argument("--messages", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--read", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--hostile", type=int, metavar="MEGABYTES")
    asked = parser.parse_args()
    if asked.read:
        print(json.dumps(read(asked.read[0], Path(asked.read[1]))))
        return 0
    if asked.hostile:
        return hostile(asked.hostile * 1_000_000)
    rows = 1_000_000 if asked.full else asked.rows
    small, large = (100, 2000) if asked.full else asked.megabytes
    with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as name:
        folder = Path(name)
        make(folder / "rows.jsonl", rows=rows, messages=asked.messages)
        speeds = compare(folder / "rows.jsonl")
        peaks = []
        for megabytes in (small, large):
            path = folder / "size.jsonl"
            make(path, size=megabytes * 1_000_000, messages=asked.messages)
            peaks.append(apart("ours", path)["peak"] / 1e6)
            path.unlink()
    return show(rows, speeds, (small, large), peaks, TARGET_MESSAGES if asked.messages else TARGET_RATIO)


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


def conversations() -> Iterator[str]:
    """Yield lines of one to four questions with answers each, without end."""
    dice, source = random.Random(8), map(json.loads, records())
    while True:
        turns = [{"role": "system", "content": "You are helpful."}]
        for record in itertools.islice(source, dice.randint(1, 4)):
            turns.append({"role": "user", "content": f"{record['instruction']}\n{record['input']}"})
            turns.append({"role": "assistant", "content": record["output"]})
        yield json.dumps({"messages": turns}) + "\n"


def make(path: Path, *, rows: int | None = None, size: int | None = None, messages: bool = False) -> None:
    """Write a file of `rows` rows, or of about `size` bytes (of the same 20,000 rows again and again)."""
    source = conversations() if messages else records()
    with path.open("w", encoding="utf-8") as file:
        if rows is not None:
            file.writelines(next(source) for _ in range(rows))
        if size is not None:
            block = "".join(next(source) for _ in range(20_000))
            for _ in range(max(1, round(size / len(block)))):
                file.write(block)


def read(way: str, path: Path) -> dict[str, float]:
    """Read a file in one way; return its rows, seconds by clock and processor, and this process's peak in bytes."""
    started, processor = time.perf_counter(), time.process_time()
    rows = {"ours": ours, "loop": loop, "any": whatever}[way](path)
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    # Not ru_maxrss, which begins at what the process that started this one had.
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return {"rows": rows, "seconds": seconds, "processor": processor, "peak": peak * 1024}


def ours(path: Path) -> int:
    """Validate as the intake does."""
    found = validate(path, Options(special_tokens=TOKENS))
    if not found.ok:
        sys.exit(found.reason)
    return found.good_rows


def whatever(path: Path) -> int:
    """Validate a file that may be refused."""
    return validate(path, Options(special_tokens=TOKENS)).rows


def loop(path: Path) -> int:
    """Validate as a script does."""
    rows = 0
    with path.open(encoding="utf-8") as file:
        form = "messages" if "messages" in json.loads(next(file)) else "alpaca"
        schema = json.loads((SCHEMAS / f"{form}-record.schema.json").read_text(encoding="utf-8"))
        validator = Draft202012Validator(schema)
        file.seek(0)
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


def compare(path: Path) -> dict[str, dict[str, float]]:
    """Return the median rows a second of both ways by "seconds" and "processor" time, measured in turns."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "loop": []}
    for _ in range(TURNS):
        for way, runs in found.items():
            runs.append(apart(way, path))
    clocks = ("seconds", "processor")
    return {
        way: {clock: statistics.median(run["rows"] / run[clock] for run in runs) for clock in clocks}
        for way, runs in found.items()
    }


def hostile(size: int) -> int:
    """Measure files of about `size` bytes that are made to cost much; return the exit code."""
    table = Table("", "MB", "s", "times a good one's byte", "peak MB", title="files made to cost much")
    missed = []
    with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as name:
        path = Path(name) / "good.jsonl"
        make(path, size=size)
        good = min(cost(path) for _ in range(TURNS))
        table.add_row("a good file", *cells(path, good, good))
        for kind, unit in {**HOSTILE, **UNUSUAL}.items():
            path = Path(name) / "drop.jsonl"
            with path.open("wb") as file:
                block = unit * max(1, 1_000_000 // len(unit))
                for _ in range(max(1, size // len(block))):
                    file.write(block)
            found = cost(path)
            table.add_row(kind, *cells(path, found, good), end_section=kind == list(HOSTILE)[-1])
            if kind in HOSTILE and found[0] > MOST_TIMES * good[0]:
                missed.append(kind)
    Console().print(table)
    print(f"refused at no more than {MOST_TIMES:g} times a byte of a good file: {', '.join(missed) or 'kept'}")
    return 1 if missed else 0


def cost(path: Path) -> tuple[float, float]:
    """Return the seconds a byte, and the peak memory, of validating a file in a process of its own."""
    once = apart("any", path)
    return once["seconds"] / path.stat().st_size, once["peak"]


def cells(path: Path, found: tuple[float, float], good: tuple[float, float]) -> tuple[str, ...]:
    """Word one measurement."""
    size = path.stat().st_size
    return f"{size / 1e6:.1f}", f"{found[0] * size:.2f}", f"{found[0] / good[0]:.1f}", f"{found[1] / 1e6:.0f}"


def show(
    rows: int, speeds: dict[str, dict[str, float]], sizes: tuple[int, int], peaks: list[float], target: float
) -> int:
    """Print one table; return the exit code."""
    ratio, growth = speeds["ours"]["seconds"] / speeds["loop"]["seconds"], peaks[1] - peaks[0]
    title = f"validation of {rows:,} rows, one core, median of {TURNS}; load {os.getloadavg()[0]:.1f}"
    table = Table("", "ours", "loop", title=title)
    for clock, words in {"seconds": "rows/s by the clock", "processor": "rows/s of processor time"}.items():
        table.add_row(words, f"{speeds['ours'][clock]:,.0f}", f"{speeds['loop'][clock]:,.0f}")
    table.add_row("ours / loop", f"{ratio:.1f}", "1")
    for size, peak in zip(sizes, peaks, strict=True):
        table.add_row(f"peak memory at {size:,} MB, MB", f"{peak:.1f}", "")
    console = Console()
    console.print(table)
    fast, flat = ratio >= target, growth <= MOST_GROWTH_MB
    console.print(f"at least {target:g} times the loop: {'kept' if fast else 'MISSED'}")
    console.print(f"at most {MOST_GROWTH_MB:g} MB more: {'kept' if flat else 'MISSED'}")
    return 0 if fast and flat else 1


if __name__ == "__main__":
    sys.exit(main())
