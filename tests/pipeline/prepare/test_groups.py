"""Held-out records that ask the same in other words are one group; rows of one form are not."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import GateConfig, SplitConfig
from pipeline.data_words import warning_words
from pipeline.errors import CannotTrain
from tests.snapshot import PINNED, Prepared, Rows, Snapshot, rows

ANSWER = "An answer that is long enough to be known again, of case"


def sizes(made: Prepared) -> Counter[int]:
    """Return how many groups have how many records."""
    return Counter(Counter(row["group"] for row in made.heldout).values())


def paraphrases(count: int) -> list[dict[str, str]]:
    """Return `count` questions in five ways: two words of 30 differ from the others', 40 % of shingles are shared."""
    found = []
    for case in range(count):
        for number in range(5):
            words = [f"w{case}x{place}" for place in range(30)]
            words[1 + 3 * number] = words[16 + 3 * number] = f"other{case}x{number}"
            found.append({"instruction": " ".join(words), "output": "yes"})
    return found


def families(count: int, size: int) -> list[dict[str, str]]:
    """Return `count` questions of 20 words, each asked in `size` ways, with a fifth of the words changed anywhere."""
    dice, found = random.Random(7), []
    for case in range(count):
        for number in range(size):
            words = [f"w{case}x{place}" for place in range(20)]
            for place in dice.sample(range(20), 4):
                words[place] = f"other{case}x{number}x{place}"
            found.append({"instruction": " ".join(words), "output": "yes"})
    return found


def pinned(tmp_path: Path, heldout: Rows, train: Rows | None = None, **config: Any) -> Prepared:
    return Snapshot(tmp_path, **config).drop(train or rows(100)).drop(heldout, "heldout").prepare()


def test_paraphrases_in_groups_of_five_are_groups_of_five(tmp_path: Path) -> None:
    made = pinned(tmp_path, [*paraphrases(120), *rows(60, start=5000)])
    assert sizes(made) == {5: 120, 1: 60}
    assert (made.dataset.heldout_rows, made.dataset.heldout_groups, made.dataset.heldout_duplicates) == (660, 180, 0)
    cases = {row["id"]: row["instruction"].split()[0] for row in made.heldout if row["group"] != row["id"]}
    names = {row["id"]: row["instruction"].split()[0] for row in made.heldout}
    assert len(cases) == 480
    assert all(names[row["group"]] == names[row["id"]] for row in made.heldout if row["id"] in cases)
    assert all(row["group"] <= row["id"] for row in made.heldout), "a group is named after the first of its ids"


def test_a_question_of_which_each_asking_changes_a_fifth_is_one_group(tmp_path: Path) -> None:
    made = pinned(tmp_path, families(50, 5), rows(500))
    assert made.dataset.heldout_rows > 240
    assert 50 <= made.dataset.heldout_groups <= 55


def test_a_question_that_is_asked_in_many_prompts_is_one_group_and_not_a_form(tmp_path: Path) -> None:
    made = pinned(tmp_path, families(5, 40))
    assert made.dataset.heldout_rows > 190
    assert 5 <= made.dataset.heldout_groups <= 8


def test_prompts_of_one_form_that_share_a_value_a_greeting_and_an_end_are_no_group(tmp_path: Path) -> None:
    heldout = []
    for form in range(5):
        for number in range(40):
            words = [f"f{form}x{place}" for place in range(16)]
            words[5], words[8] = f"city{number % 20}", f"amount{form}x{number}"
            greeting, end = ([f"{name}{number % 4}x{place}" for place in range(4)] for name in ("greeting", "end"))
            heldout.append({"instruction": " ".join([*greeting, *words, *end]), "output": "yes"})
    assert sizes(pinned(tmp_path, heldout)) == {1: 200}


@pytest.mark.parametrize(("count", "found"), [(5, {5: 40}), (12, {1: 480})])
def test_a_long_answer_links_what_few_records_share_and_is_a_label_where_many_do(
    tmp_path: Path, count: int, found: dict[int, int]
) -> None:
    heldout = [{**row, "output": f"{ANSWER} {number % 40}"} for number, row in enumerate(rows(40 * count, start=900))]
    made = pinned(tmp_path, heldout, rows(100))
    assert (sizes(made), made.dataset.heldout_duplicates) == (found, 0)


def test_a_task_of_one_form_is_no_group(tmp_path: Path) -> None:
    sums = [(number % 89 + 10, number // 89 + 10) for number in range(1000)]
    short = [{"instruction": f"What is {one} + {other}?", "output": str(one + other)} for one, other in sums]
    made = Snapshot(tmp_path).drop(short).prepare()
    assert sizes(made) == {1: len(made.heldout)}
    inputs = [{"instruction": "Add the two numbers.", "input": row["instruction"], "output": "1"} for row in short]
    made = Snapshot(tmp_path).drop(inputs).prepare()
    assert sizes(made) == {1: len(made.heldout)}


def test_groups_that_are_too_few_for_a_verdict_are_known_before_training(tmp_path: Path) -> None:
    def prepared(needed: int, **more: Any) -> Prepared:
        return pinned(tmp_path, paraphrases(120), gate=GateConfig(min_records=needed, **more))

    assert prepared(120, on="pinned").dataset.shortfall is None
    found = prepared(200, on="pinned").dataset
    assert found.shortfall is not None
    assert (found.shortfall.heldout_rows, found.shortfall.needed_rows) == (120, 400), "five of a kind count as one"
    (warning,) = warning_words(found)
    assert warning.startswith("600 held-out records or documents count as 120, since some ask the same in other words")
    none = Snapshot(tmp_path, gate=PINNED).drop(rows(50)).prepare().dataset
    assert (none.heldout_rows, none.heldout_groups) == (0, 0)
    assert none.shortfall is not None
    assert none.shortfall.needed_rows == 1


def test_only_what_is_scored_is_linked(tmp_path: Path) -> None:
    made = pinned(tmp_path, paraphrases(120), split=SplitConfig(scored_records=50))
    assert len(made.heldout) == 50
    assert {row["group"] for row in made.heldout} <= made.ids("heldout")


def test_a_cap_whose_records_are_too_few_groups_is_refused_with_one_that_would_do(tmp_path: Path) -> None:
    split = SplitConfig(scored_records=100)
    with pytest.raises(CannotTrain, match=r"split\.scored_records = 100 records count at most, \d+ different ones"):
        pinned(tmp_path, paraphrases(60), split=split, gate=GateConfig(on="pinned", min_records=100))
