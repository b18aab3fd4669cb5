"""
Bytes → findings: never an exception, never a silent acceptance of what `json` at its strictest and `jsonschema` refuse.

Runs for DROPFORGE_FUZZ_SECONDS (20; `make fuzz`: 600) from DROPFORGE_CHAOS_SEED, which it prints, and goes on from seed
to seed. What it compares with reads a file the slow and simple way, and shares no code with the product.
"""

import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from pipeline.records.fast_path import PlainRows
from pipeline.records.records import Row, records_of
from pipeline.records.row_findings import row_findings
from pipeline.records.validate import Options, Validation, good_rows, validate
from tests.chaos.corpus import GOOD, TOKENS, bad_files, clean_files

SECONDS = float(os.environ.get("DROPFORGE_FUZZ_SECONDS") or 20)
SEED = int(os.environ.get("DROPFORGE_CHAOS_SEED") or random.SystemRandom().randrange(10**6))
EXAMPLES = 300
MOST_DIGITS = 4300
OPTIONS = Options(max_line_bytes=2000, special_tokens=TOKENS)
#: Without a token beyond ASCII, lines with escapes are judged by their bytes too.
PLAINER = replace(OPTIONS, special_tokens=TOKENS[:5])
SCHEMAS = {
    key: Draft202012Validator(
        json.loads((Path(__file__).parents[2] / "schemas" / f"{name}-record.schema.json").read_text())
    )
    for key, name in {"instruction": "alpaca", "messages": "messages", "conversations": "sharegpt"}.items()
}
#: Rules of ours beyond JSON and the schema: a row may be refused for these alone.
STRICTER = {"misnamed_key", "control_character", "special_token", "too_long", "unsupported", "role", "weight"}

SEEDS = [case.data for case in bad_files() if len(case.data) < 3000] + list(clean_files().values())
WORDS = [
    b'"',
    b"\\",
    b"\\u",
    b"\\ude00",
    b"\\n",
    b"{",
    b"}",
    b"[",
    b",",
    b":",
    b"\n",
    b"\r\n",
    b"\0",
    b" ",
    b"\xef\xbb\xbf",
    b"\xc3\x83",
    b"\xe2\x80\xa8",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xf0\x9f\x99\x82",
    b"NaN",
    b"null",
    b"0",
    b"</s>",
    b'"input"',
    b'"output"',
    b'"input": "", ',
    b'"output": "x", ',
    b', "group": "a"}',
    b'"instruct\\u0069on": "a", ',
    GOOD,
    b"\n" + GOOD,
]


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Bytes as they might come: a known kind with pieces cut out, put in and doubled; or words in any order."""
    if draw(st.integers(0, 9)) == 0:
        return b"".join(draw(st.lists(st.sampled_from(WORDS) | st.binary(max_size=5), max_size=30)))
    data = draw(st.sampled_from(SEEDS)) if draw(st.booleans()) else b"\n".join([GOOD] * draw(st.integers(1, 3)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 12)))
        new = draw(st.sampled_from(WORDS) | st.binary(max_size=3) | st.just(data[start:end] * 2))
        data = data[:start] + new + data[end:]
    return data


def strictly(text: str) -> Any:
    """Read JSON with `json` at its strictest. Raises `ValueError` or `RecursionError`."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in found}) != len(found):
            raise ValueError
        return dict(found)

    def refuse(_text: str) -> Any:
        raise ValueError

    def number(digits: str) -> float:
        if not math.isfinite(float(digits)):
            raise ValueError
        return float(digits)

    def integer(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            raise ValueError
        return int(digits)

    value = json.loads(text, object_pairs_hook=pairs, parse_constant=refuse, parse_float=number, parse_int=integer)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def acceptable(text: bytes) -> bool:
    """Say whether `json` and `jsonschema` accept a record."""
    try:
        value = strictly(text.decode())
        key = next((key for key in SCHEMAS if isinstance(value, dict) and key in value), "instruction")
        return SCHEMAS[key].is_valid(value)
    except (ValueError, RecursionError):
        return False


def lines_of(data: bytes) -> dict[int, bytes]:
    """Return the lines of a file that are not blank, by number."""
    numbered = enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
    return {number: line for number, line in numbered if line.strip(b" \t\r")}


def hold(path: Path, data: bytes) -> None:
    """Hold what is said of one file against the simple reader."""
    path.write_bytes(data)
    found = validate(path, OPTIONS)
    plainer = validate(path, PLAINER)
    assert (plainer.rows, plainer.complete) == (found.rows, found.complete)
    assert plainer.good_rows == len(list(good_rows(path, PLAINER))) >= found.good_rows
    rows = list(good_rows(path, OPTIONS))
    assert found.good_rows == len(rows)
    assert found.ok == (found.findings_total == 0)
    assert found.ok == (found.good_rows == found.rows > 0 and found.complete)
    for finding in found.findings:
        assert finding.message.isprintable()
        assert finding.remedy
    if not found.complete and not rows:
        return
    if data.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n").startswith(b"["):
        hold_array(data, found)
        return
    lines = lines_of(data)
    assert found.rows == len(lines)
    taken = {row.line for row in rows}
    accepted = {number for number, line in lines.items() if acceptable(line)}
    assert taken <= accepted
    refused = {finding.line for finding in found.findings if finding.rule in STRICTER}
    assert accepted - taken <= refused
    quick(lines)


def hold_array(data: bytes, found: Validation) -> None:
    """Hold what is said of an array against `json`, which reads it whole."""
    try:
        whole = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        assert not found.ok
    else:
        assert not found.complete or found.rows == len(whole)
        assert found.good_rows <= sum(acceptable(json.dumps(row).encode()) for row in whole)


def quick(lines: dict[int, bytes]) -> None:
    """Hold the quick road to taking nothing that the long one has a word to say about."""
    for plain, texts in ROADS:
        for line in filter(plain.take, lines.values()):
            row = Row(1, strictly(line.decode()))
            (record,) = records_of(row)
            assert not record.unknown
            assert row_findings(row, [record], texts) == []


ROADS = [(PlainRows(options.special_tokens), options.special_pattern) for options in (OPTIONS, PLAINER)]


def search(seed: int, path: Path) -> Callable[[], None]:
    """Return a search that begins at `seed`."""

    @hypothesis.seed(seed)
    @settings(max_examples=EXAMPLES, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=files())
    def run(data: bytes) -> None:
        hold(path, data)

    return run


@pytest.mark.timeout(SECONDS + 300)
def test_no_bytes_are_accepted_that_json_and_jsonschema_refuse_and_none_raise(tmp_path: Path) -> None:
    print(f"DROPFORGE_CHAOS_SEED={SEED}")
    path = tmp_path / "drop.jsonl"
    end, seed = time.monotonic() + SECONDS, SEED
    while True:
        search(seed, path)()
        seed += 1
        if time.monotonic() >= end:
            break
    print(f"{(seed - SEED) * EXAMPLES:,} files, seeds {SEED} to {seed - 1}")


def test_every_known_kind_stands_the_comparison(tmp_path: Path) -> None:
    for data in SEEDS:
        hold(tmp_path / "drop.jsonl", data)
