"""Rows of a file that repeat each other are counted as the split takes them for the same."""

import json
from pathlib import Path

import pytest

from pipeline.dataset import repeats
from pipeline.dataset.repeats import Repeats, count_pinned, find_repeats, likely_metric, repeat_lines
from pipeline.validation.records import Limits
from tests.snapshot import Snapshot, rows


def found(path: Path, *records: object) -> Repeats:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return find_repeats(path, Limits())


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


def test_a_line_over_the_limit_is_not_read_of_a_file_that_was_not_taken_in(tmp_path: Path) -> None:
    long = {"instruction": "say it", "output": "word " * 99}
    file = write(tmp_path / "raw", [long, {"instruction": "say no", "output": "no"}])
    assert (likely_metric(file), likely_metric(file, Limits(max_line_bytes=100))) == ("rougeL", "exact_match")
    pinned = [write(tmp_path / "pinned", [long])]
    assert (count_pinned(file, pinned), count_pinned(file, pinned, Limits(max_line_bytes=100))) == (1, 0)
