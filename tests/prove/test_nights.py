"""
Nine nights of one track: honest drops end in the champion, wrong ones suspended, and new answers wait for a person.

A person does nothing but accept the new answers of the correction. On SmolLM2-135M, by `make prove` alone.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from daemon.state.clauses import verdict_clauses
from pipeline import durable
from pipeline.artifacts import Verdict
from pipeline.decide.explain import sentence
from tests.demo_data import TEAMS, generate_messages
from tests.prove.conftest import Ground
from tests.prove.tasks import Row, Task, desk_task, topic_task

pytestmark = pytest.mark.timeout(14_400)
#: Rows of a drop, of which nearly half are held out, and how many records a verdict is to need: what was learned shows.
ROWS, LEAST = 200, 60
#: In one epoch a model half learns several tasks: then what it knows of one may really go with more rows of another.
EPOCHS = 2


def urgency_task(seed: int) -> Task:
    """Return a third question about messages of the same kind."""
    levels = dict(zip(TEAMS, ("level-one", "level-two", "level-three", "level-four", "level-five"), strict=True))
    texts = ((one.text, levels[one.topic]) for one in generate_messages(seed))
    return Task("How urgent is this message?", tuple(levels.values()), texts)


def colour_task(seed: int) -> Task:
    """Return a fourth one."""
    colours = dict(zip(TEAMS, ("olive", "amber", "violet", "crimson", "teal"), strict=True))
    texts = ((one.text, colours[one.topic]) for one in generate_messages(seed))
    return Task("Which label does this message get?", tuple(colours.values()), texts)


def reworded(rows: Sequence[Row]) -> list[Row]:
    """Return the same questions and answers in other words."""
    return [{**row, "input": f"A customer writes to us as follows. {row['input']} That is all."} for row in rows]


def general(seed: int, count: int) -> list[Row]:
    """Return short questions of general knowledge."""
    pairs = ((seed + one, one * 7 % 23) for one in range(count))
    return [{"instruction": f"What is {one} plus {two}?", "input": "", "output": str(one + two)} for one, two in pairs]


def corrected(rows: Sequence[Row]) -> list[Row]:
    """Return the same questions with other answers: what was right when the rows were written is right no more."""
    return [{**row, "output": f"{row['output']} points"} for row in rows]


@pytest.mark.parametrize("seed", [10, 20])
def test_nine_nights_with_a_correction(
    ground: Ground, tmp_path: Path, record_property: Callable[[str, Any], None], seed: int
) -> None:
    desk, shelf, urgency, colour = desk_task(seed), topic_task(seed + 1), urgency_task(seed + 2), colour_task(seed + 3)
    old, sums = desk.rows(ROWS), general(10 * seed, ROWS)
    nights: list[dict[str, Sequence[Row]]] = [
        {"honest.jsonl": old},
        {"new-kind.jsonl": shelf.rows(ROWS)},
        {"wrong.jsonl": desk.wrong(2 * ROWS)},
        # Wrong about what the champion has learned: what it never did, nobody can lose.
        {"right-of-two.jsonl": shelf.rows(ROWS), "wrong-of-two.jsonl": desk.wrong(2 * ROWS)},
        {"third-kind.jsonl": colour.rows(ROWS)},
        {"paraphrases.jsonl": reworded(old)},
        {"general.jsonl": sums},
        {"correction.jsonl": corrected(sums)},
        # Of all kinds, a new one among them: that last run is to win, so that its champion holds every honest drop.
        {"honest-last.jsonl": [*urgency.rows(ROWS), *colour.rows(ROWS // 4), *desk.rows(ROWS // 4)]},
    ]
    box = ground.box(tmp_path / "box", trials=7, least=LEAST, quantization="none", epochs=EPOCHS)
    asked: list[str] = []
    for drops in nights:
        # A drop queues its run at once.
        before = len(box.runs())
        for name, rows in drops.items():
            box.drop(name, rows)
        box.night()
        if accepted := box.accept_new_answers():
            asked += accepted
            box.night()
        for run in box.runs()[before:]:
            record_property(
                "table", f"{' and '.join(drops)}: run {run.id}, {run.purpose}: {sentence(verdict_clauses(run))}"
            )
    states = box.drop_states()
    wrong = {name for name in states if "wrong" in name}
    assert {name for name, state in states.items() if state == "suspended"} == wrong
    assert asked == ["correction.jsonl"], "of the other drops no question is old"
    promoted = [run for run in box.runs() if run.outcome == "promoted"]
    assert box.drops_of(promoted[-1]) == states.keys() - wrong
    # An honest drop may be blamed by the luck of a training: then its trial or the control clears it.
    for run in box.runs():
        if not wrong.isdisjoint(box.drops_of(run)):
            verdict = durable.read_json(box.daemon.root / f"runs/{run.id}/decide.json")
            assert Verdict.model_validate(verdict).blames_new_drops
