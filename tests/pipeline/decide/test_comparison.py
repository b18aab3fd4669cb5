"""What the gate reads: the report's files, in any order, or a refusal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.artifacts import FormerScores, SuiteScores
from pipeline.decide.comparison import Comparison, compare, read_comparison
from pipeline.errors import StepFailed
from tests.records_made import evaluation_of, write_lines, yes_or_no

Read = Callable[..., Comparison]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Return a function that writes a report's files and reads the comparison from them."""

    def run(lines: list[dict[str, Any]], **more: Any) -> Comparison:
        folder = tmp_path / "report"
        suite, former = more.pop("suite", []), more.pop("former_lines", [])
        made = evaluation_of(folder, lines, **more)
        write_lines(folder / "suite-1.jsonl", suite)
        write_lines(folder / "former-2.jsonl", former)
        return read_comparison(tmp_path, made, None)

    return run


def test_records_are_read_in_the_order_of_their_ids_with_all_that_they_say(read: Read) -> None:
    lines = yes_or_no(1, 1, 1)
    lines[1].update(tags=["a", "b"], drop=4, pinned=True, group=lines[2]["group"])
    lines[1]["candidate"].update(nll_sum=9.0, nll_tokens=3, degenerate=["looping"])
    found = read(lines[::-1])
    assert found.ids == ("000000", "000001", "000002")
    assert found.scores["exact_match"].tolist() == [[1, 0], [0, 1], [1, 1]]
    assert found.drops.tolist() == [1, 4, 1]
    assert found.pinned.tolist() == [False, True, False]
    assert found.groups.tolist() == [0, 1, 1]
    assert {tag: flags.tolist() for tag, flags in found.tags.items()} == {key: [False, True, False] for key in "ab"}
    assert found.nll[0].tolist() == [[4, 4], [9, 4], [4, 4]]
    assert found.degenerate["looping"].tolist() == [[0, 0], [1, 0], [0, 0]]


def test_what_the_base_model_got_in_a_suite_is_read_where_it_was_measured(read: Read) -> None:
    suite = [
        {"id": name, "category": "c", "candidate": 1.0, "champion": 0.5, "base": score}
        for name, score in (("b", 0.25), ("a", 0.75))
    ]
    facts: dict[str, Any] = {"name": "builtin", "records": 2, "candidate": 100, "champion": 50, "file": "suite-1.jsonl"}
    found = read(yes_or_no(1, 1, 1), suite=suite, suites=(SuiteScores(**facts, base=50),))
    assert found.suites[0].base is not None
    assert found.suites[0].base.tolist() == [0.75, 0.25]
    without = [{name: value for name, value in line.items() if name != "base"} for line in suite]
    found = read(yes_or_no(1, 1, 1), suite=without, suites=(SuiteScores(**facts),))
    assert found.suites[0].base is None


def test_a_part_takes_every_column_along_and_keeps_suites(read: Read) -> None:
    former_lines = [{"id": "000000", "score": 0.1}, {"id": "000002", "score": 0.2}, {"id": "000003", "score": 0.3}]
    found = read(
        yes_or_no(2, 1, 1),
        former_lines=former_lines,
        former=(FormerScores(generation=2, model_id="m", records=3, score=20, file="former-2.jsonl"),),
    )
    part = found.part(np.array([False, True, True, True]))
    assert part.ids == ("000001", "000002", "000003")
    assert part.differences().tolist() == [1.0, -1.0, 0.0]
    np.testing.assert_array_equal(part.former[2], [np.nan, 0.2, 0.3])
    assert part.groups.tolist() == [1, 2, 3]
    assert {len(pair) for pair in (*part.scores.values(), *part.degenerate.values(), part.pinned)} == {3}
    assert found.part(np.ones(4, dtype=np.bool_)) is found


def test_a_metric_of_some_records_is_compared_on_them_and_a_part_takes_it_along() -> None:
    lines = yes_or_no(2, 1, 1)
    for place in (1, 3):
        lines[place]["candidate"]["scores"]["json_valid"] = 0.0
        lines[place]["champion"]["scores"]["json_valid"] = 1.0
    found = compare("exact_match", lines)
    assert list(found.scores) == ["exact_match", "json_valid"]
    assert found.pairs(metric="json_valid").tolist() == [[0, 1], [0, 1]]
    assert found.part(np.array([True, False, True, True])).pairs(metric="json_valid").tolist() == [[0, 1]]
    assert found.part(np.array([True, False, True, False])).pairs(metric="json_valid").shape == (0, 2)
    assert found.pairs(metric="rougeL").shape == (0, 2)


def test_a_record_twice_is_refused(read: Read) -> None:
    lines = yes_or_no(2, 0, 0)
    lines[1]["id"] = lines[0]["id"]
    with pytest.raises(StepFailed, match="speaks of 2 records"):
        read(lines)
