"""
Known good and known bad candidates through the whole gate, each with the reason that it is to be given.

On SmolLM2-135M in NF4, by `make prove` alone.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.decide.explain import clauses, sentence
from tests.prove.box import Box, Night, challenge_with, train_on
from tests.prove.conftest import Ground
from tests.prove.tasks import desk_task, topic_task

pytestmark = pytest.mark.timeout(7200)


@pytest.fixture
def box(learned: Box, tmp_path: Path) -> Box:
    """The box with its champion, for this test alone."""
    return learned.copy(tmp_path / "box")


Say = Callable[[Night], Night]


@pytest.fixture
def say(record_property: Any, request: pytest.FixtureRequest) -> Say:
    """Return what notes a verdict for the table at the end."""

    def say(night: Night) -> Night:
        record_property("table", f"{request.node.name}: {sentence(clauses(night.verdict))} {night.verdict.reasons}")
        return night

    return say


def failed_guards(night: Night) -> set[str]:
    return {guard.guard for guard in night.verdict.guards if guard.state == "failed"}


def refused(box: Box, before: Path, night: Night) -> None:
    """The champion stays where it was."""
    assert night.run.outcome != "promoted"
    assert box.champion == before


def test_the_same_model_is_not_promoted(box: Box, say: Say) -> None:
    before = box.champion
    box.drop("more.jsonl", desk_task(2).rows(30))
    night = say(box.night(prepare=train_on(lambda rows, _: rows[:16]), merge=challenge_with(before)))
    refused(box, before, night)
    assert night.verdict.outcome == "not_shown_better"
    assert (night.verdict.wins, night.verdict.losses) == (0, 0)


def shuffle(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    answers = [row["output"] for row in rows]
    random.Random(1).shuffle(answers)
    return [{**row, "output": answer} for row, answer in zip(rows, answers, strict=True)]


def empty(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "output": ""} if number % 2 else row for number, row in enumerate(rows)]


def loop(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "output": " ".join([row["output"]] * 12)} for row in rows]


@pytest.mark.parametrize(("spoil", "guards"), [(shuffle, set()), (empty, {"empty"}), (loop, {"looping"})])
def test_answers_that_are_shuffled_half_empty_or_looping_are_worse(
    box: Box, say: Say, spoil: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], guards: set[str]
) -> None:
    before = box.champion
    box.drop("more.jsonl", desk_task(2).rows(30))
    night = say(box.night(prepare=train_on(lambda rows, _: spoil(rows))))
    refused(box, before, night)
    assert night.verdict.outcome == "worse"
    assert "harm_shown" in night.verdict.reasons
    assert guards <= failed_guards(night)


def test_a_candidate_trained_on_held_out_records_is_contaminated(box: Box, say: Say) -> None:
    def peek(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
        heldout = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
        return [*rows[:32], *({key: row[key] for key in rows[0]} for row in heldout)]

    before = box.champion
    box.drop("more.jsonl", desk_task(2).rows(30))
    night = say(box.night(prepare=train_on(peek)))
    refused(box, before, night)
    assert night.verdict.outcome == "contaminated"
    assert box.drop_states()["more.jsonl"] == "accepted", "it says nothing about the drop"


def test_a_large_wrong_drop_is_tried_alone_and_suspended_and_the_next_honest_one_wins(
    ground: Ground, tmp_path: Path, say: Say
) -> None:
    own = desk_task(3)
    box = ground.box(tmp_path / "box", trials=1)
    # Of three answers of five: what the next honest drop can teach is certain, however well these were learned.
    box.drop("honest.jsonl", own.rows(ground.rows, answers=3))
    first = say(box.night())
    assert first.verdict.outcome == "promoted"
    before = box.champion
    # Larger than all honest data: at the same size a toss decides, answer by answer, which of the two the model keeps.
    # And so the average rises, by which a gate of averages would promote it.
    box.drop("wrong.jsonl", own.wrong(ground.rows * 3 // 2, answers=3))
    night = say(box.night())
    refused(box, before, night)
    assert night.verdict.outcome in {"worse", "guard_failed"}
    assert night.trials == 2, "a trial and its control"
    assert box.drop_states() == {"honest.jsonl": "accepted", "wrong.jsonl": "suspended"}
    box.drop("next.jsonl", own.rows(ground.rows))
    night = say(box.night())
    assert night.verdict.outcome == "promoted"
    assert box.champion != before
    assert box.drop_states()["next.jsonl"] == "accepted"


def test_right_on_the_new_drop_and_forgot_the_old_one(box: Box, ground: Ground, say: Say) -> None:
    other = topic_task(4)

    def only_new(rows: list[dict[str, Any]], _folder: Path) -> list[dict[str, Any]]:
        return [row for row in rows if row["instruction"] == other.instruction]

    before = box.champion
    box.drop("new.jsonl", other.rows(2 * ground.rows))
    night = say(box.night(prepare=train_on(only_new)))
    refused(box, before, night)
    assert night.verdict.outcome in {"worse", "guard_failed"}
    assert "slice" in failed_guards(night)
    gains = {part.kind: part.gain for part in night.verdict.slices if part.kind in {"seen", "unseen"}}
    assert gains["unseen"] > 0 > gains["seen"]


def test_right_on_the_task_and_forgot_the_general_suite(ground: Ground, tmp_path: Path, say: Say) -> None:
    # Four times the rate at which it is learned without such a loss.
    box = ground.box(tmp_path / "box", general=("builtin",), learning_rate=4e-3)
    before = box.champion
    box.drop("narrow.jsonl", desk_task(5).rows(ground.rows))
    night = say(box.night())
    refused(box, before, night)
    assert night.verdict.outcome == "guard_failed"
    assert "general" in failed_guards(night)
    assert night.verdict.gain is not None
    assert night.verdict.gain > 0


def test_labels_in_answer_to_everything_are_told_and_general_rows_help(
    ground: Ground, tmp_path: Path, say: Say
) -> None:
    without: dict[float, float] = {}
    for share in (0.0, 0.2):
        box = ground.box(tmp_path / f"box {share}", general=("questions",), general_rows=share)
        box.drop("labels.jsonl", desk_task(8).rows(ground.rows))
        night = say(box.night())
        (row,) = [guard for guard in night.verdict.guards if guard.guard == "collapse"]
        assert (night.run.outcome, row.state) == ("promoted", "shown")
        without[share] = row.candidate or 0.0
        assert ("general questions" in sentence(clauses(night.verdict))) == (share == 0)
    assert without[0.0] > 3 * without[0.2]
