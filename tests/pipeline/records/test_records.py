"""Bytes become rows and records; whatever is wrong becomes a finding with line, rule and remedy."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.records.fast_path import PlainRows
from pipeline.records.records import (
    MOST_LINE_BYTES,
    Finding,
    Record,
    Row,
    read_records,
    read_rows,
    scan_rows,
)

GOOD = b'{"instruction": "a", "output": "b"}'


def rows(folder: Path, data: bytes, most: int = MOST_LINE_BYTES) -> list[Row | Finding]:
    path = folder / "drop.jsonl"
    path.write_bytes(data)
    return list(read_rows(path, most))


def only_finding(folder: Path, data: bytes, most: int = MOST_LINE_BYTES) -> Finding:
    findings = [row for row in rows(folder, data, most) if isinstance(row, Finding)]
    assert len(findings) == 1, findings
    assert findings[0].remedy
    return findings[0]


def values(found: list[Row | Finding]) -> list[Any]:
    assert all(isinstance(row, Row) for row in found), found
    return [row.value for row in found if isinstance(row, Row)]


class Counted(PlainRows):
    """Takes no line, and counts how many it was asked about."""

    asked = 0

    def take(self, _line: bytes) -> bool:
        self.asked += 1
        return False


@pytest.mark.parametrize("blank", [b"\n", b"\r\n", b" \t\n"])
def test_blank_lines_are_passed_many_at_once_and_counted(tmp_path: Path, blank: bytes) -> None:
    path = tmp_path / "drop.jsonl"
    path.write_bytes(blank * 100_000 + GOOD + b"\n" + blank + GOOD + blank * 3 + b" " + GOOD)
    plain = Counted(())
    found = list(scan_rows(path, MOST_LINE_BYTES, plain))
    assert [row.line for row in found if isinstance(row, Row)] == [100_001, 100_003, 100_006]
    assert plain.asked < 1000
    small = list(read_rows(path, 64))
    assert [row.line for row in small] == [100_001, 100_003, 100_006]


@pytest.mark.parametrize(
    ("line", "message", "remedy"),
    [
        (b'{"instruction": "a" "output": "b"}', "',' delimiter at column 21", "one complete JSON object"),
        (b'{"instruction": "a', "unterminated string at column 17", "one complete JSON object"),
        (b'{"x": {"a": 1, "a": 2}}', "'a' stands twice", "keep one"),
        (b'{"a": ' + b"7" * 5000 + b"}", "more digits", "in quotes"),
        (b'{"\\ud800": "a"}', "half a character", "both halves"),
        (b"[" * 501 + b'"["' + b"]" * 501, "too deeply", "flatten"),
        ('{"a": "é"}'.encode("latin-1"), "0xe9 at byte 8", "iconv"),
        (GOOD + b" " + GOOD, "more follows", "line break between two records"),
        (b"\0" * 100, "at column 1", "copied incompletely"),
    ],
)
def test_a_bad_line_is_a_finding_that_names_it_and_the_good_ones_are_read(
    tmp_path: Path, line: bytes, message: str, remedy: str
) -> None:
    data = GOOD + b"\n" + line + b"\n" + GOOD + b"\n"
    finding = only_finding(tmp_path, data)
    assert finding.line == 2
    assert message in finding.message
    assert remedy in finding.remedy
    assert len(rows(tmp_path, data)) == 3


def test_an_overlong_line_is_one_finding_and_the_next_line_is_read(tmp_path: Path) -> None:
    long = json.dumps({"instruction": "a" * 3_000_000, "output": "b"}).encode()
    data = long + b"\n" + GOOD + b"\n" + long
    found = rows(tmp_path, data, 100)
    assert [(row.line, getattr(row, "rule", "")) for row in found] == [(1, "too_long"), (2, ""), (3, "too_long")]
    exact = rows(tmp_path, GOOD + b"\n", len(GOOD))
    assert len(values(exact)) == 1


def test_records_carry_their_texts_and_the_names_of_other_keys(tmp_path: Path) -> None:
    path = tmp_path / "drop.jsonl"
    path.write_bytes(GOOD + b'\n{"instruction": "a", "input": "i", "output": "b", "id": 3}\n{"instruction": "a"}\n')
    found = list(read_records(path))
    assert found[0] == Record(1, "a", "", "b")
    assert found[1] == Record(2, "a", "i", "b", ("id",))
    assert isinstance(found[2], Finding)
    assert (found[2].line, found[2].rule) == (3, "schema")
