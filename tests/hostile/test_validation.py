"""Files made to cost much more than they weigh: `dropforge check` answers within its memory, and says little."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

#: What the process may take; an honest file needs a tenth.
MEMORY_KILOBYTES = 1_000_000
#: A line just under the longest that is read.
LINE = 3_999_000
GOOD = b'{"instruction": "a", "output": "b"}'
HEAD = GOOD[:-1] + b', "'


def filled(start: bytes, unit: bytes, end: bytes, size: int = LINE) -> bytes:
    """Return a line of `size` bytes that repeats `unit`."""
    return start + unit * ((size - len(start) - len(end)) // len(unit)) + end


def keys(number: int, key: Callable[[int], str]) -> bytes:
    return GOOD[:-1] + b"".join(b',"%s":1' % key(one).encode() for one in range(number)) + b"}\n"


def lines(number: int, line: Callable[[int], bytes]) -> bytes:
    return b"".join(line(one) for one in range(number))


TURNS = b'{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},'
TAGS = HEAD + b'tags": ['
STOPPED = "bad rows, read no further; "
#: What it is, what to write, the exit code, and what the answer says.
PROBES: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "two million tags": (lambda: filled(TAGS, b"1,", b"1]}\n"), 65, "at most 20 texts"),
    "a tag of 4 MB": (lambda: filled(TAGS + b'"', b"\xc3\xa9", b'"]}\n'), 65, "of 1 to 64 characters"),
    "20 bad tags a line": (lambda: (TAGS + b"1," * 19 + b"1]}\n") * 60_000, 65, STOPPED),
    "330,000 unknown keys": (lambda: keys(330_000, lambda one: f"k{one}"), 65, "more than 1,000 keys"),
    "another key on every line": (
        lambda: lines(60_000, lambda one: HEAD + b'key%d": 1}\n' % one),
        0,
        "key19, … (60,000 rows)",
    ),
    "a key of 4 MB": (lambda: filled(HEAD, b"k", b'": 1}\n') * 3, 0, "ignored: kkk"),
    "50 MB of empty lines": (lambda: b"\n" * 50_000_000, 65, "no records"),
    "2,000,000 lines of x": (lambda: b"x\n" * 2_000_000, 65, STOPPED),
    "one array of 50 MB": (lambda: b"[" + b"[]," * 16_000_000 + b"[]]", 65, STOPPED),
    "one string of 50 MB in an array": (lambda: b'["' + b"x" * 50_000_000, 65, "more than 4,000,000 bytes"),
    "60,000 turns a row": (
        lambda: filled(b'{"messages": [', TURNS, TURNS[:-1] + b"]}\n") * 3,
        65,
        "more than 300 turns",
    ),
    "300 turns a row": (
        lambda: (b'{"messages": [' + TURNS * 149 + TURNS[:-1] + b"]}\n") * 2000,
        0,
        " duplicates; it would be accepted",
    ),
    "long turns": (
        lambda: b'{"messages": [' + TURNS.replace(b'"a"', b'"' + b"a" * 20_000 + b'"') * 149 + TURNS[:-1] + b"]}\n",
        0,
        "would be accepted",
    ),
    "nested 4,000,000 deep": (lambda: filled(HEAD + b'x": ', b'{"a":', b"\n"), 65, "nested too deeply"),
    "1,300,000 lists in a value": (lambda: filled(HEAD + b'x": [', b"[],", b"0]}\n") * 2, 0, "would be accepted"),
    "a number of 4,000,000 digits": (lambda: filled(HEAD + b'x": ', b"7", b"}\n"), 65, "digits"),
    "800,000 keys that stand twice": (lambda: filled(HEAD + b'x": {', b'"a":1,', b'"a":1}}\n'), 65, "stands twice"),
    "660,000 half characters": (lambda: filled(HEAD + b'x": "', b"\\ud83d", b'"}\n'), 65, "half a character"),
    "666,000 control characters": (
        lambda: filled(b'{"instruction": "a", "output": "', b"\\u0001", b'"}\n'),
        65,
        "the control character U+0001",
    ),
    "4 MB lines, all bad": (lambda: filled(b'{"instruction": "', b"a", b"\n") * 12, 65, "12 bad rows"),
    "50 MB of NUL": (lambda: b"\0" * 50_000_000, 65, "longer than"),
    "a list where a text belongs": (lambda: filled(b'{"instruction": [', b"1,", b'1], "output": "b"}\n'), 65, "a list"),
}


def check(folder: Path, data: bytes, settings: str = "") -> subprocess.CompletedProcess[str]:
    """Let `dropforge check` look at a file, in so much memory."""
    (folder / "drop.jsonl").write_bytes(data)
    (folder / "dropforge.toml").write_text(settings, encoding="utf-8")
    limited = ["sh", "-c", f'ulimit -v {MEMORY_KILOBYTES}; exec "$@"', "sh"]
    command = [*limited, sys.executable, "-m", "daemon", "check", "drop.jsonl"]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **os.environ}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("probe", PROBES)
def test_a_file_costs_little_more_than_it_weighs(tmp_path: Path, probe: str) -> None:
    make, code, words = PROBES[probe]
    ended = check(tmp_path, make())
    assert (ended.returncode, ended.stderr) == (code, "")
    assert words in ended.stdout
    assert len(ended.stdout) < 20_000


def test_a_ceiling_on_bad_rows_is_held_where_reading_stops(tmp_path: Path) -> None:
    settings = '[intake]\non_bad_rows = "quarantine"\nmax_bad_percent = 100\nmax_bad_rows = {}\n'
    data = b"x\n" * 2500 + (GOOD + b"\n") * 10
    over = check(tmp_path, data, settings.format(2000))
    assert (over.returncode, over.stderr) == (65, "")
    told = next(line for line in over.stdout.splitlines() if "max_bad_rows" in line)
    assert "2,001 rows = 0 records + 2,001 bad rows, read no further; it would be rejected" in over.stdout
    assert told.endswith("intake.max_bad_rows allows 2,000")
    within = check(tmp_path, data, settings.format(2500))
    assert within.returncode == 0
    assert "2,510 rows = 1 record + 2,500 bad rows + 9 duplicates; it would be accepted without them" in within.stdout


def test_hundreds_of_special_tokens_are_not_tried_one_by_one(tmp_path: Path) -> None:
    tokens = [f"<|reserved_special_token_{number}|>" for number in range(1000)]
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({"additional_special_tokens": tokens}))
    for text, code in ((b"<", 0), (b"<|reserved_special_token_", 0), (b"<|reserved_special_token_999|>", 65)):
        ended = check(tmp_path, filled(b'{"instruction": "', text, b'", "output": "b"}\n'), 'base_model = "base"\n')
        assert (ended.returncode, ended.stderr) == (code, "")
    assert "holds <|reserved_special_token_999|>, a special token" in ended.stdout
