"""Bytes become rows and records; whatever is wrong becomes a finding with line, rule and remedy."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.records import records, strict_json
from pipeline.records.fast_path import PlainRows
from pipeline.records.records import (
    MOST_LINE_BYTES,
    Finding,
    Record,
    Row,
    nearest_key,
    read_records,
    read_rows,
    record_of,
    scan_rows,
)
from pipeline.words import printable

GOOD = b'{"instruction": "a", "output": "b"}'
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


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


def test_an_array_is_read_as_records_with_their_lines(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf\n [\n" + GOOD + b",\n\n" + GOOD + b" ,\n" + GOOD + b"]\n"
    found = rows(tmp_path, data)
    assert [(row.line, row.record) for row in found] == [(3, 1), (5, 2), (6, 3)]
    assert rows(tmp_path, b"[ ]") == []


def test_a_bad_element_of_an_array_does_not_hide_the_later_ones(tmp_path: Path) -> None:
    data = b'[{"a": 1, "a": 2},\n{"a": NaN},\n{"a": "\\udc00"},\n' + GOOD + b"]"
    found = rows(tmp_path, data)
    assert [getattr(row, "rule", "") for row in found] == ["duplicate_key", "number", "surrogate", ""]
    assert [row.line for row in found] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("data", "line", "record", "words"),
    [
        (b"[" + GOOD + b",\n" + b'{"a": tru}]', 2, 2, "expecting value at character 7 of the element"),
        (b"[" + GOOD + b",\n" + b'{"a": "x', 2, 2, "unterminated string at character 7 of the element"),
        (b"[" + GOOD + b"\n " + GOOD + b"]", 2, None, "expecting ',' or ']' after an element"),
        (b"[" + GOOD + b"]\n\nx", 3, None, "more follows the end of the array"),
        (b"[" + GOOD, 1, None, "expecting ',' or ']' after an element, found the end of the file"),
        (b"[" + GOOD + b",", 1, 2, "expecting value at character 1 of the element"),
    ],
)
def test_a_broken_array_is_a_finding_with_line_and_element(
    tmp_path: Path, data: bytes, line: int, record: int | None, words: str
) -> None:
    found = rows(tmp_path, data)
    finding = found[-1]
    assert isinstance(finding, Finding)
    assert (finding.line, finding.record) == (line, record)
    assert finding.message == f"not JSON: {words}"
    assert isinstance(found[0], Row)


def test_an_overlong_element_of_an_array_is_a_finding(tmp_path: Path) -> None:
    data = b"[" + GOOD + b"," + json.dumps("x" * 200).encode() + b"," + GOOD + b"]"
    found = rows(tmp_path, data, 100)
    assert [getattr(row, "rule", "") for row in found] == ["", "too_long", ""]
    endless = rows(tmp_path, b'["' + b"x" * 3_000_000, 100)
    assert [getattr(row, "rule", "") for row in endless] == ["too_long"]


@given(
    items=st.lists(JSON, max_size=5),
    indent=st.sampled_from([None, 1]),
    chunk=st.integers(1, 40),
    ascii_only=st.booleans(),
)
def test_an_array_reads_the_same_however_it_falls_into_chunks(
    tmp_path_factory: pytest.TempPathFactory, items: list[Any], indent: int | None, chunk: int, ascii_only: bool
) -> None:
    text = json.dumps(items, indent=indent, ensure_ascii=ascii_only)
    path = tmp_path_factory.getbasetemp() / "array.json"
    path.write_bytes(text.encode())
    whole = strict_json._CHUNK
    strict_json._CHUNK = chunk
    try:
        found = list(read_rows(path, 10_000))
    finally:
        strict_json._CHUNK = whole
    assert values(found) == items
    assert [row.record for row in found] == list(range(1, len(items) + 1))
    assert [row.line for row in found] == sorted(row.line or 0 for row in found)


def test_records_carry_their_texts_and_the_names_of_other_keys(tmp_path: Path) -> None:
    path = tmp_path / "drop.jsonl"
    path.write_bytes(GOOD + b'\n{"instruction": "a", "input": "i", "output": "b", "id": 3}\n{"instruction": "a"}\n')
    found = list(read_records(path))
    assert found[0] == Record(1, "a", "", "b")
    assert found[1] == Record(2, "a", "i", "b", ("id",))
    assert isinstance(found[2], Finding)
    assert (found[2].line, found[2].rule) == (3, "schema")


def test_labels_become_tags_and_none_of_them_is_an_unknown_key() -> None:
    value = {"instruction": "a", "output": "b", "tags": ["x", "y"], "category": "news", "id": 1}
    assert record_of(Row(1, None, value)) == Record(1, "a", "", "b", ("id",), ("x", "y", "category:news"))
    assert record_of(Row(1, None, {**value, "tags": "x"})) is None


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("instructions", "instruction"),
        ("Output", "output"),
        (" response", "output"),
        ("inputs", "input"),
        ("ouput", "output"),
        ("imput", "input"),
        ("instruct", "instruction"),
        ("id", None),
        ("text", None),
        ("input_type", None),
        ("x" * 1_000_000, None),
    ],
)
def test_a_misnamed_key_is_known_by_its_likeness(key: str, known: str | None) -> None:
    assert nearest_key(key) == known


def test_no_key_as_long_as_a_line_is_remembered() -> None:
    before = records._nearest_key.cache_info().currsize
    for number in range(10):
        assert nearest_key(f"{number}" * 1_000_000) is None
    assert records._nearest_key.cache_info().currsize == before


def test_a_key_that_is_probably_input_is_not_lost_without_a_word() -> None:
    assert record_of(Row(1, None, {"instruction": "a", "output": "b", "Input": "c"})) is None
    assert record_of(Row(1, None, {"instruction": "a", "output": "b", "input": "", "Input": "c"})) is not None


def test_unprintable_characters_are_escaped() -> None:
    assert printable("a\x1b[31m\n\udce9\u202eé b") == "a\\x1b[31m\\n\\udce9\\u202eé b"
