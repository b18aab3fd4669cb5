"""Rows with the tag `selected`, chosen by what a champion answered, are trained on and judge nothing."""

from pathlib import Path

import pytest

from tests.snapshot import Snapshot, rows

CHOSEN = [{**row, "tags": ["mistakes", "selected"]} for row in rows(400)]


def test_chosen_rows_are_all_trained_on_and_none_is_held_out_or_a_dev_row(tmp_path: Path) -> None:
    made = Snapshot(tmp_path).drop(CHOSEN).drop(rows(400, start=400)).prepare()
    assert {row["drop"] for row in [*made.heldout, *made.dev]} == {2}
    assert {row["instruction"] for row in CHOSEN} <= {row["instruction"] for row in made.train}


def test_the_tag_takes_no_prompt_out_of_the_held_out_ones(tmp_path: Path) -> None:
    world = Snapshot(tmp_path).drop(rows(400))
    before = world.prepare()
    after = world.drop(CHOSEN).drop(rows(1, start=900)).prepare()
    assert after.ids("heldout") == before.ids("heldout") != set()


@pytest.mark.parametrize("aside", [set(), {2}])
def test_chosen_rows_whose_answers_a_person_accepted_judge_nothing(tmp_path: Path, aside: set[int]) -> None:
    new = [{**row, "output": "no"} for row in CHOSEN]
    world = Snapshot(tmp_path).drop(rows(400)).drop(new, accepted=True).drop(rows(400, answer="no"))
    world.drop(rows(40, start=400)).aside = aside
    made = world.prepare()
    assert {row["drop"] for row in [*made.heldout, *made.dev]} == {4}
    assert {row["instruction"] for row in CHOSEN} <= {row["instruction"] for row in made.train}


def test_a_prompt_that_was_first_dropped_with_the_tag_judges_nothing_without_it_either(tmp_path: Path) -> None:
    made = Snapshot(tmp_path).drop(CHOSEN).drop([*rows(400), *rows(40, start=400)]).prepare()
    assert {row["instruction"] for row in made.heldout} <= {row["instruction"] for row in rows(40, start=400)}


def test_a_chosen_row_about_a_document_that_judges_is_not_trained_on(tmp_path: Path) -> None:
    tags = (["untold"], ["selected"])
    content = [{**row, "group": f"text {n // 2}", "tags": tags[n % 2]} for n, row in enumerate(rows(400))]
    made = Snapshot(tmp_path).drop(content).prepare()
    group_of = {row["instruction"]: row["group"] for row in content}
    judging, trained = ({group_of[row["instruction"]] for row in side} for side in (made.heldout, made.train))
    assert judging
    assert not judging & trained
