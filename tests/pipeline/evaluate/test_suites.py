import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from pipeline import durable
from pipeline.errors import CannotTrain
from pipeline.evaluate.suites import Item, read_suite, read_suites
from pipeline.prepare.start import GENERAL_ROWS
from pipeline.records.heldout import prompt_id

#: Share of their pieces of four characters that two items may have in common.
MOST_ALIKE = 0.5
ITEM = {"id": "a", "category": "sums", "question": "1 + 1?", "choices": ["2", "3"], "answer": 0}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_the_suite_that_ships_has_as_many_items_of_each_ability() -> None:
    items = read_suite("builtin").items
    counts = Counter(item.category for item in items)
    assert len(counts) == 10
    assert set(counts.values()) == {30}
    assert all(len(set(item.choices)) == 4 for item in items)
    languages = Counter(match[1] for item in items if (match := re.search(r"-([a-z]{2})$", item.id)))
    assert 60 <= languages.total() <= 120
    assert len(languages) >= 9


def test_the_suite_that_ships_asks_nothing_twice() -> None:
    def pieces(item: Item) -> set[str]:
        text = " ".join((item.question, *sorted(item.choices))).lower()
        return {text[start : start + 4] for start in range(len(text) - 3)}

    items = read_suite("builtin").items
    cut = [(item.id, pieces(item)) for item in items]
    alike = [(one, other) for (one, a), (other, b) in combinations(cut, 2) if len(a & b) > MOST_ALIKE * len(a | b)]
    assert alike == []


def test_place_and_length_of_the_right_choice_give_it_away_nowhere() -> None:
    """Guessing by place, or the longest or the shortest choice, is right in three cases of ten at most."""
    items = read_suite("builtin").items
    assert set(Counter(item.answer for item in items).values()) == {75}
    for category in {item.category for item in items}:
        places = Counter(item.answer for item in items if item.category == category)
        assert set(places.values()) == {7, 8}, category
    for extreme in (min, max):
        lengths = [[len(choice) for choice in item.choices] for item in items]
        found = sum(
            extreme(range(4), key=one.__getitem__) == item.answer for one, item in zip(lengths, items, strict=True)
        )
        assert found <= len(items) * 0.3, extreme


def test_the_questions_that_ship_come_with_the_built_in_suite_and_are_scored_by_words() -> None:
    _, suite = read_suites(("builtin",), 7)
    assert suite.name == "questions"
    assert 30 <= len(suite.items) <= 40
    assert len({item.question for item in suite.items}) == len(suite.items)
    by_question = {item.question: item for item in suite.items}
    capital, sea = by_question["What is the capital of France?"], by_question["Write one sentence about the sea."]
    said = ["It is **PARIS**.", "Parisian", "", "capital"]
    assert [capital.score_text(text) for text in said] == [1, 0, 0, 0]
    assert [sea.score_text(text) for text in ("The sea is blue.", "sea", "A label of four words")] == [1, 0, 0]
    assert all(item.score_text(" ".join(item.answers * 4)) for item in suite.items)


def test_no_general_row_that_is_trained_on_is_asked() -> None:
    suites = read_suites(("builtin",), 7)
    asked = {prompt_id(item.question, "") for suite in suites for item in suite.items}
    rows = list(durable.read_jsonl(GENERAL_ROWS))
    assert len({prompt_id(row["instruction"], "") for row in rows} - asked) == len(rows) > 300
    outputs = Counter(row["output"] for row in rows)
    assert max(outputs.values()) == 1, "an answer that comes again and again would be a label"


def test_a_file_of_questions_or_records_is_read_with_its_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", ITEM, "", {"question": "q", "choices": ["x", "y"], "answer": 1})
    suite = read_suite(str(path))
    assert suite.name == str(path)
    assert suite.items == (
        Item(id="a", category="sums", question="1 + 1?", choices=("2", "3"), answer=0),
        Item(id="3", question="q", choices=("x", "y"), answer=1),
    )
    path = write(tmp_path / "free.jsonl", {"question": "q", "answers": ["x", "y"]})
    assert read_suite(str(path)).items == (Item(id="1", question="q", answers=("x", "y")),)
    path = write(tmp_path / "records.jsonl", {"instruction": "Add.", "input": "1 1", "output": "2"})
    assert read_suite(str(path)).items == (Item(id="1", question="Add.\n### Input:\n1 1", answers=("2",), words=0),)


@pytest.mark.parametrize("lines", [[ITEM, {**ITEM, "id": "b"}], [{"instruction": "Add.", "output": "2"}]])
@pytest.mark.parametrize(("before", "end"), [("\ufeff", "\r\n"), ("\ufeff\r\n", "\r\n")])
def test_what_editors_elsewhere_write_is_the_same_suite(
    tmp_path: Path, lines: list[Any], before: str, end: str
) -> None:
    plain = read_suite(str(write(tmp_path / "plain.jsonl", *lines)))
    text = before + "".join(json.dumps(line) + end for line in lines)
    (tmp_path / "own.jsonl").write_bytes(text.encode())
    found = read_suite(str(tmp_path / "own.jsonl"))
    if before.endswith("\n"):
        assert len(found.items) == len(plain.items)
    else:
        assert found.items == plain.items


def test_a_suite_that_is_wrong_in_a_run_says_how_the_run_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", ITEM, "{")
    with pytest.raises(CannotTrain) as caught:
        read_suites(("builtin", str(path)), 7)
    assert f"suite {path}, line 2: " in caught.value.message
    assert caught.value.hint.endswith("; then: dropforge retry 7")
    assert [suite.name for suite in read_suites(("questions", "builtin", "builtin"), 7)] == ["questions", "builtin"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (ITEM, "id: 'a' is already the id of line 2"),
        ({**ITEM, "answer": 2}, "answer: 2 is not an index of the 2 choices"),
        ({**ITEM, "choices": ["2"]}, "choices: must be two or more"),
        ({**ITEM, "choices": ["2", "2"]}, "choices: must be two or more, and not be empty or repeat"),
        ({"question": "q", "choices": ["x", "y"]}, "answer: None is not an index"),
        ({**ITEM, "hint": "x"}, "hint: Extra inputs are not permitted"),
        ({**ITEM, "answers": ["2"]}, "it needs either choices and answer, or answers"),
        ({"question": "q", "answers": ["x", "?"]}, "answers: each must have a letter or digit"),
        ('{"question": "q", "question": "r"}', "stands twice"),
        ("{", "JSON"),
        ({"instruction": "Add.", "output": "2", "system": "Be brief."}, "a question of a suite has no turns before it"),
        ({"instruction": "a"}, "output"),
    ],
)
def test_a_wrong_line_is_named_with_its_field(tmp_path: Path, line: Any, words: str) -> None:
    path = write(
        tmp_path / "own.jsonl", "", {"instruction": "Add.", "output": "2"} if "instruction" in line else ITEM, line
    )
    with pytest.raises(CannotTrain) as caught:
        read_suite(str(path))
    assert f"suite {path}, line 3: " in caught.value.message
    assert words in caught.value.message
    assert '"choices"' in caught.value.hint


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_a_suite_that_is_not_there_or_empty_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "own.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CannotTrain, match=r"is empty|there is no suite") as caught:
        read_suite(str(path))
    assert "evaluate.general" in caught.value.hint
