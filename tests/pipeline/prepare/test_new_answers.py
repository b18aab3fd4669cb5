"""New answers to questions of earlier drops are neither trained on nor judged by until a person accepts them."""

from pathlib import Path

import pytest

from pipeline.config import TrainConfig
from pipeline.decide.comparison import compare
from pipeline.decide.slices import Known
from pipeline.decide.verdict import Rules, weigh
from pipeline.errors import CannotTrain
from pipeline.metrics.registry import METRICS
from tests.records_made import lines_of
from tests.snapshot import Prepared, Rows, Snapshot, rows

OLD = rows(800, answer="old")


def answers(made: Prepared) -> dict[str, set[str]]:
    """Return the answers of each question that are trained on or judged by."""
    found: dict[str, set[str]] = {}
    for side in (made.train, made.dev, made.heldout):
        for row in side:
            found.setdefault(row["instruction"], set()).update([row["output"], *row.get("references", ())])
    return found


def wrong(count: int, *, start: int = 0) -> list[dict[str, str]]:
    return rows(count, start=start, answer="wrong")


def outcome(made: Prepared, learned: str, known: tuple[int, ...] | None = None) -> str:
    """Return the gate's verdict on a model that gives one answer to all; the champion knows most old ones."""
    references = [tuple(row["references"]) for row in made.heldout]
    texts = ["wrong" if number % 5 == 0 else "old" for number in range(len(references))]
    score = METRICS["exact_match"].scores
    lines = lines_of(score([learned] * len(texts), references), score(texts, references))
    for line, row in zip(lines, made.heldout, strict=True):
        line["drop"] = row["drop"]
    return weigh(compare("exact_match", lines), Rules(known=Known(known))).outcome


#: Later drops that once brought a wrong model through the gate, each in its own way; `OLD` came first.
ATTACKS: dict[str, list[Rows]] = {
    "the old answer behind the wrong one": [[row for pair in zip(wrong(800), OLD, strict=True) for row in pair]],
    "the old answer before the wrong one": [[row for pair in zip(OLD, wrong(800), strict=True) for row in pair]],
    "three spellings of it": [
        [{**row, "output": text} for row in OLD for text in ("wrong", "wrong ", " WRONG", "ｗｒｏｎｇ")]
    ],
    "a second drop that sends the old answers back": [wrong(800), OLD],
    "a small drop beside large ones": [rows(8000, start=2000, answer="old"), wrong(40)],
    "a twelfth each night": [wrong(33, start=33 * night) for night in range(12)],
    "the same drop twice": [wrong(800), [*wrong(800), *wrong(1, start=1999)]],
}


@pytest.mark.parametrize("known", [None, (1,), (1, 2)])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_wrong_answer_replaces_no_old_one(tmp_path: Path, attack: str, known: tuple[int, ...] | None) -> None:
    world = Snapshot(tmp_path).drop(OLD)
    for drop in ATTACKS[attack]:
        world.drop(drop)
    world.champion = world.champion.model_copy(update={"drops": known})
    made = world.prepare()
    assert outcome(made, "wrong", known) == "worse"
    asked = answers(made)
    # Not every held-out row of the largest one is scored.
    assert {text for row in OLD for text in asked.get(row["instruction"], ())} == {"old"}
    assert made.dataset.proposed >= 33
    assert made.dataset.replaced == 0


def test_proposed_answers_are_counted_by_their_drops_and_shown_beside_those_that_count(tmp_path: Path) -> None:
    long = "new <b>" + "x" * 9000
    made = Snapshot(tmp_path).drop(OLD).drop(rows(100, answer=long)).drop([*OLD[:7], *wrong(30, start=790)]).prepare()
    data = made.dataset
    assert data.proposed == 100 + 10
    assert [(one.old, one.new, one.rows) for one in data.proposals] == [(1, 2, 100), (1, 3, 10)]
    assert data.duplicates == 7
    assert [pair.new_drop for pair in data.proposed_answers] == [3] * 10 + [2] * 20
    pair = data.proposed_answers[-1]
    assert (pair.old_drop, pair.old_answer, pair.new_answer, pair.new_prompt) == (1, "old", long[:300], "")
    assert pair.old_prompt.startswith("Question ")
    assert {tuple(found) for found in answers(made).values()} == {("old",), ("wrong",)}, "new questions are used"


def test_accepted_answers_replace_the_old_ones_and_go_with_their_drop(tmp_path: Path) -> None:
    corrected = rows(100, answer="corrected")
    late = Snapshot(tmp_path).drop(OLD).drop(corrected, accepted=True).drop(wrong(50)).drop(rows(800, answer="Old "))
    made = late.prepare()
    asked = answers(made)
    assert {text for row in corrected for text in asked[row["instruction"]]} == {"corrected"}
    assert {text for row in OLD[100:] for text in asked[row["instruction"]]} == {"old"}
    data = made.dataset
    assert (data.replaced, data.proposed, data.duplicates) == (100, 50 + 100, 700)
    assert (
        outcome(Snapshot(tmp_path).drop(OLD).drop(rows(800, answer="now"), accepted=True).prepare(), "now")
        == "promoted"
    )
    assert [(one.old, one.new, one.rows) for one in data.replacements] == [(1, 2, 100)]
    assert [(one.old, one.new, one.rows) for one in data.proposals] == [(2, 3, 50), (2, 4, 100)]
    del late.drops[1]
    asked = answers(late.prepare())
    assert {text for row in OLD for text in asked[row["instruction"]]} == {"old"}


@pytest.mark.parametrize("role", ["train", "heldout"])
def test_the_same_answer_again_is_nothing_new(tmp_path: Path, role: str) -> None:
    again = [{**row, "output": text} for row in OLD for text in ("  OLD", "ｏｌｄ\n")]
    data = Snapshot(tmp_path).drop(rows(300, start=2000)).drop(OLD, role).drop(again, role).prepare().dataset
    assert (data.proposed, data.replaced, data.duplicates) == (0, 0, 1600)


def test_a_correction_is_worse_until_it_is_accepted_however_late(tmp_path: Path) -> None:
    world = Snapshot(tmp_path).drop(OLD).drop(rows(800, answer="now"))
    world.champion = world.champion.model_copy(update={"drops": (1, 2)})
    assert outcome(world.prepare(), "now", (1, 2)) == "worse"
    world.drop(rows(300, start=2000))
    world.drops[1] = world.drops[1].model_copy(update={"answers_accepted": True})
    made = world.prepare()
    asked = answers(made)
    assert {text for row in OLD for text in asked.get(row["instruction"], ())} == {"now"}
    # Those of the third drop have answers of their own.
    made.heldout = [row for row in made.heldout if row["drop"] == 2]
    assert outcome(made, "now", (1,)) == "promoted"


def test_a_second_reference_for_all_prompts_counts_once_it_is_accepted(tmp_path: Path) -> None:
    both = [{**row, "output": text} for row in OLD for text in ("old", "ancient")]
    asked = Snapshot(tmp_path).drop(OLD).drop(both).prepare()
    assert {tuple(row["references"]) for row in asked.heldout} == {("old",)}
    assert asked.dataset.proposed == 800
    assert outcome(asked, "old") == "promoted"
    made = Snapshot(tmp_path).drop(OLD).drop(both, accepted=True).prepare()
    assert outcome(made, "ancient") == "promoted"
    assert {tuple(row["references"]) for row in made.heldout} == {("old", "ancient")}
    assert {row["drop"] for row in made.heldout} == {2}
    assert (made.dataset.proposed, made.dataset.replaced) == (0, 0)


@pytest.mark.parametrize("repeated", [True, False])
def test_an_answer_counts_though_its_drop_is_on_trial_or_left_out(tmp_path: Path, *, repeated: bool) -> None:
    world = Snapshot(tmp_path).drop(rows(400, start=2000)).drop(OLD).drop([*wrong(800), *rows(90, start=3000)])
    if repeated:
        world.drop(rows(50, answer="old"))
    world.aside = {2}
    made = world.prepare()
    asked = answers(made)
    assert {text for row in OLD for text in asked.get(row["instruction"], ())} == ({"old"} if repeated else set())
    assert len(asked) == 400 + 90 + 50 * repeated
    assert [(one.old, one.new, one.rows) for one in made.dataset.proposals] == [(2, 3, 800)]
    assert made.dataset.proposed_answers[0].old_answer == "old"


def test_where_all_rows_have_new_answers_the_refusal_says_so(tmp_path: Path) -> None:
    world = Snapshot(tmp_path).drop(OLD).drop(wrong(800))
    world.aside = {1}
    with pytest.raises(CannotTrain, match=r"records are left of 800: 800 records with new answers to old questions$"):
        world.prepare()


def test_a_row_that_is_left_out_protects_no_answer_and_is_not_counted_for_a_drop_that_is_not_used(
    tmp_path: Path, tiny_llama: Path
) -> None:
    world = Snapshot(tmp_path, base_model=str(tiny_llama), train=TrainConfig(max_length=64))
    world.drop(rows(90, answer="word-" * 100_000)).drop(wrong(90))
    assert world.prepare().dataset.rows_too_long == 90
    world.aside = {1}
    made = world.prepare()
    assert (made.dataset.rows_too_long, made.dataset.proposed, len(answers(made))) == (0, 0, 90)


def test_what_an_accepted_answer_overtook_is_not_proposed_again(tmp_path: Path) -> None:
    world = Snapshot(tmp_path).drop(OLD).drop(OLD).drop(wrong(800)).drop(rows(800, answer="new"), accepted=True)
    data = world.prepare().dataset
    assert (data.proposed, data.replaced) == (0, 2400)


def test_an_accepted_correction_may_change_the_case_or_take_an_answer_away(tmp_path: Path) -> None:
    both = [{**row, "output": text} for row in OLD for text in ("paris", "Rome")]
    made = Snapshot(tmp_path).drop(both).drop(rows(800, answer="Paris"), accepted=True).prepare()
    assert {tuple(row["references"]) for row in made.heldout} == {("Paris",)}


def test_a_question_with_an_invisible_sign_is_an_old_one(tmp_path: Path) -> None:
    again = [{"instruction": f"{row['instruction']}\u200b\u00ad", "output": "wrong"} for row in OLD]
    data = Snapshot(tmp_path).drop(OLD).drop(again).prepare().dataset
    assert data.proposed == 800
