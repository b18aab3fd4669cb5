"""Rows of a file that repeat each other are counted as the split takes them for the same."""

import json
from pathlib import Path

import pytest

from pipeline.records import repeats
from pipeline.records.repeats import Repeats, RowCounts, repeat_lines
from pipeline.records.validate import Options, validate
from tests.snapshot import Snapshot, rows


def found(path: Path, *records: object) -> Repeats:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    counts = RowCounts()
    validate(path, Options(), counts.add)
    return counts.repeats


def test_a_file_that_does_not_repeat_itself_has_nothing_to_tell(tmp_path: Path) -> None:
    none = found(tmp_path / "a.jsonl", *rows(50))
    assert (none, repeat_lines(tmp_path / "a.jsonl", none)) == (Repeats(), [])


def test_prompts_are_the_same_where_the_split_takes_them_for_the_same(tmp_path: Path) -> None:
    folded = {"instruction": "Add\n### Input:\n1 2", "output": "3"}
    made = found(tmp_path / "a.jsonl", {"instruction": "add", "input": "1  2", "output": "3"}, folded, [], folded)
    assert made == Repeats(rows=2, first_row=2)


def test_what_is_counted_is_what_preparing_finds(tmp_path: Path) -> None:
    content = rows(40) + rows(10) + [{**row, "output": "another"} for row in rows(7)]
    made = found(tmp_path / "a.jsonl", *content)
    assert (made.rows, made.prompts) == (10, 7)
    assert Snapshot(tmp_path).drop(content).prepare().dataset.duplicates == 10


def test_no_more_than_so_many_rows_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "MOST_ROWS", 3)
    assert found(tmp_path / "a.jsonl", *rows(2), *rows(2)) == Repeats(rows=1, first_row=3)


def count_pinned(path: Path, pinned: list[Path]) -> int:
    counts = RowCounts(pinned)
    validate(path, Options(), counts.add)
    return counts.pinned


def write(path: Path, content: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def test_a_prompt_is_the_same_folded_or_not_in_any_case_and_with_any_answer(tmp_path: Path) -> None:
    pinned = [{"instruction": "Say it.", "input": "One  line", "output": "x"}, *rows(3)]
    one, other = write(tmp_path / "one", pinned), write(tmp_path / "other", rows(2, start=50))
    same = [{"instruction": "SAY it.\n\n### Input:\none line", "output": "y"}, *rows(2, start=51), *rows(2, start=90)]
    assert count_pinned(write(tmp_path / "new", same), [one]) == 1
    assert count_pinned(write(tmp_path / "new", [*rows(5), *rows(4, start=50)]), [one, other]) == 3 + 2
    assert count_pinned(tmp_path / "new", []) == 0
    assert count_pinned(tmp_path / "new", [tmp_path / "gone", other]) == 2


@pytest.mark.parametrize("spread", [{}, {"id": 7}], ids=["plain rows", "rows with another key"])
def test_all_rows_are_counted_however_they_are_read(tmp_path: Path, spread: dict[str, int]) -> None:
    accented = [{"instruction": "CAF\u00c9", "output": "a"}, {"instruction": "caf\u00e9", "output": "\u00e9"}]
    content = [{**row, **spread} for row in (*rows(400), *accented, *rows(1), accented[1], *rows(400, start=7))]
    path = tmp_path / "a.jsonl"
    # Spelled in both ways, and without an end in the last line.
    lines = [json.dumps(row, ensure_ascii=number % 3 == 0) for number, row in enumerate(content)]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    counts = RowCounts([write(tmp_path / "pinned", rows(5, start=3))])
    found = validate(path, Options(), counts.add)
    assert (found.good_rows, counts.pinned, counts.metric) == (804, 5 + 1, "exact_match")
    assert counts.repeats == Repeats(rows=1 + 1 + 393, first_row=403, prompts=1, first_prompt=402)
