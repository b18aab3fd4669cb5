"""What the card says in plain words, where a number alone would mislead."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import durable
from pipeline.artifacts import GuardResult, ModelRef, Trial, Verdict
from pipeline.config import TrainConfig
from pipeline.report.story import tell
from pipeline.report.write import write_report
from pipeline.words import worth_words
from tests.records_made import story_text


@pytest.fixture
def unproven(made_reports: Any) -> Verdict:
    found: Verdict = made_reports.verdict("not_shown_better", made_reports.rows(40, 33, 327))
    return found


def test_up_to_ten_times_the_set_the_advice_is_more_data(unproven: Verdict) -> None:
    said = story_text(unproven.model_copy(update={"records_needed": 4000}))
    assert "Drop more data: about 4,000 more held-out records would show this gain if it is real" in said
    few = unproven.model_copy(update={"outcome": "insufficient_evidence", "records_needed": 50})
    assert "Drop more rows: 50 more held-out records are needed." in story_text(few)
    assert "Wait for more drops" not in said


def test_beyond_ten_times_the_set_the_advice_is_to_wait(unproven: Verdict) -> None:
    said = story_text(unproven.model_copy(update={"records_needed": 4001}))
    assert "more held-out record" not in said
    assert "Wait for more drops, whose gains add up: held-out records alone will not show a gain as small" in said
    # Ten times of what counts, which is groups.
    assert "Wait for more drops" in story_text(unproven.model_copy(update={"groups": 100, "records_needed": 1001}))


def test_an_evaluation_in_nf4_is_told(made_reports: Any, tmp_path: Path) -> None:
    attempt, verdict = made_reports.case(tmp_path, "promoted")
    words = "Both models were evaluated in NF4: their unquantised weights do not fit on the GPU."
    for quantization in ("none", "nf4"):
        evaluation = made_reports.report([], quantization=quantization)
        story = tell(verdict, made_reports.dataset(), evaluation, attempt.spec)
        assert (words in story.why) == (quantization == "nf4")


def steps_of(made_reports: Any, folder: Path, outcome: str, train: TrainConfig, *tried: Trial, **spec: Any) -> str:
    """Return what is to be done after a verdict, of a run with other settings, told other things, after a search."""
    attempt, verdict = made_reports.case(folder, outcome)
    config = attempt.config.model_copy(update={"train": train})
    adapter = made_reports.adapter().model_copy(update={"candidates": tried})
    told = attempt.spec.model_copy(update={"config": config, **spec})
    found = tell(verdict, made_reports.dataset(), None, told, adapter)
    return " ".join(f"{step.words} {step.command or ''}" for step in found.next_steps)


def test_an_unproven_gain_sends_to_other_settings_unless_a_search_has_tried_them(
    made_reports: Any, tmp_path: Path
) -> None:
    alone = steps_of(made_reports, tmp_path / "a", "not_shown_better", TrainConfig())
    assert "Name them in [train.search], as space = { learning_rate = [2e-4, 5e-4, 1e-3], rank = [8, 32] }" in alone
    full = steps_of(made_reports, tmp_path / "b", "not_shown_better", TrainConfig(method="full"))
    tried = Trial(number=3, settings={"rank": 8}, outcome="finished", seconds=1.0, chosen=True)
    searched = steps_of(made_reports, tmp_path / "c", "not_shown_better", TrainConfig(), tried)
    assert ["dropforge search" in said for said in (alone, full, searched)] == [True, False, False]


@pytest.mark.parametrize("outcome", ["not_shown_better", "early"])
def test_heldout_records_that_wait_for_approval_are_told_where_records_are_missing(
    made_reports: Any, tmp_path: Path, outcome: str
) -> None:
    said = steps_of(made_reports, tmp_path / "a", outcome, TrainConfig(), proposed_rows=500)
    assert said.startswith("500 held-out records wait for your approval: look at the records, then let them count")
    assert "dropforge drops --state proposed" in said
    assert "approval" not in steps_of(made_reports, tmp_path / "b", outcome, TrainConfig())


def test_the_card_of_a_trial_speaks_of_the_drop_that_it_tried(made_reports: Any, tmp_path: Path) -> None:
    said = steps_of(made_reports, tmp_path, "worse", TrainConfig(), suspect=3)
    assert "This run tried drop 3. A control, a run without new drops, follows. If this model is worse" in said
    assert "dropforge drops restore 3 --reason TEXT" in said
    assert "tried in turn" not in said


@pytest.mark.parametrize(
    ("guards", "blames", "may"),
    [(("slice",), True, True), (("slice",), False, False), (("slice", "general"), True, False)],
    ids=["an old drop", "a tag, which blames none", "general abilities, too"],
)
def test_only_a_trial_that_its_control_can_settle_is_said_to_wait_for_it(
    made_reports: Any, tmp_path: Path, guards: tuple[str, ...], *, blames: bool, may: bool
) -> None:
    attempt, verdict = made_reports.case(tmp_path, "guard_failed")
    failed = tuple(GuardResult(guard=guard, about=("x", 1), unit="points", state="failed") for guard in guards)
    verdict = verdict.model_copy(update={"guards": failed, "reasons": (), "blames_new_drops": blames, "pooled": True})
    spec = attempt.spec.model_copy(update={"suspect": 3})
    story = tell(verdict, made_reports.dataset(), None, spec, made_reports.adapter())
    assert ("until a control has run" in story.headline) is may
    assert ("this model serves" in " ".join(step.words for step in story.next_steps)) is may


@pytest.mark.parametrize(("outcome", "guard"), [("worse", ""), ("guard_failed", "slice"), ("guard_failed", "looping")])
def test_a_loss_of_a_model_that_went_on_from_the_champion_names_its_settings_first(
    made_reports: Any, tmp_path: Path, outcome: str, guard: str
) -> None:
    attempt, verdict = made_reports.case(tmp_path, outcome)
    lost = GuardResult(guard=guard or "slice", about=("drop 1", 1), unit="points", change=-9.0, state="failed")
    verdict = verdict.model_copy(update={"guards": (lost,)} if guard else {})
    config = attempt.config.model_copy(update={"train": TrainConfig(start="champion", replay=0.3)})
    spec = attempt.spec.model_copy(update={"config": config})
    steps = []
    for start in (None, ModelRef(model_id="c", path="models/c", generation=1)):
        found = tell(verdict, made_reports.dataset(start=start), None, spec, made_reports.adapter())
        steps.append(found.next_steps[0].words)
    went_on = "raise train.replay (it was 0.3) or lower train.learning_rate (it was 0.001)."
    assert [words.endswith(went_on) for words in steps] == [False, guard != "looping"]


def test_the_only_new_drop_is_named_in_the_command_that_takes_it_out(made_reports: Any, tmp_path: Path) -> None:
    attempt, verdict = made_reports.case(tmp_path, "worse")
    drops = [one for one in attempt.spec.drops if one.role == "train"]
    for known, named in ((drops[:-1], str(drops[-1].id)), ((), "DROP" if len(drops) > 1 else str(drops[0].id))):
        champion = ModelRef(model_id="c", path="models/c", generation=1, drops=tuple(drop.id for drop in known))
        spec = attempt.spec.model_copy(update={"champion": champion})
        steps = tell(verdict, made_reports.dataset(), None, spec).next_steps
        assert f"dropforge drops withdraw {named} --reason TEXT" in [step.command for step in steps]


def test_a_loss_says_what_the_new_drops_gained(made_reports: Any, tmp_path: Path) -> None:
    attempt, verdict = made_reports.case(tmp_path, "worse")
    said = "Its change is \u22124.5 on 100 records of new drops and +6.0 on 300 records of older drops."
    assert tell(verdict, made_reports.dataset(), None, attempt.spec).why[2] == said
    alone = verdict.model_copy(update={"slices": verdict.slices[1:2]})
    assert "of new drops" not in " ".join(tell(alone, made_reports.dataset(), None, attempt.spec).why)


def test_the_card_of_a_control_puts_no_drop_under_suspicion(made_reports: Any, tmp_path: Path) -> None:
    said = steps_of(made_reports, tmp_path, "worse", TrainConfig(), trial={"evaluate": "runs/3/evaluate.json"})
    assert said.startswith("This run is a control")
    assert "tried in turn" not in said


@pytest.mark.parametrize("outcome", ["worse", "promoted"])
def test_the_card_of_a_run_that_left_out_a_drop_says_what_it_is_worth(
    made_reports: Any, tmp_path: Path, outcome: str
) -> None:
    said = steps_of(made_reports, tmp_path, outcome, TrainConfig(), left_out=3)
    worth = made_reports.case(tmp_path / "same", outcome)[1].worth
    told = f"This run left out drop 3. The drop is worth {worth_words(*worth)}, measured on the held-out"
    assert said.startswith(told)
    assert "tried in turn" not in said
    won = (
        "Once the model without it serves, the drop counts as new: a run tries it again. dropforge drops The new model"
    )
    assert (won if outcome == "promoted" else "The champion and all drops stay. dropforge drops") in said


def test_under_worse_stands_the_p_value_of_the_loss(made_reports: Any, tmp_path: Path) -> None:
    attempt, verdict = made_reports.case(tmp_path, "worse")
    source = (tmp_path / write_report(attempt, verdict) / "report.html").read_text(encoding="utf-8")
    assert "p &lt; 0.0001 for a loss (exact McNemar, one-sided); the limit is 0.01." in source
    assert "chance would explain: a model that is no worse would look like this less than once in 10,000" in source
    assert "One training is one draw: another seed would give another model, and another gain." in source


def test_paraphrases_are_said_to_count_once(made_reports: Any, tmp_path: Path) -> None:
    attempt, verdict = made_reports.case(tmp_path, "promoted")
    grouped = verdict.model_copy(update={"groups": 100, "wins": 20, "losses": 5, "ties": 75})
    folder = tmp_path / write_report(attempt, grouped)
    story = durable.read_json(folder / "report.json")["story"]
    assert story["why"][0].startswith(
        "Both models answered the same 400 records in 100 groups (near-duplicates, or of one document), each of which "
        "counts once;"
    )
    assert story["why"][1] == "It did better on 20 of the groups, worse on 5, equally well on 75."
    assert "What became of the 100 groups of records" in (folder / "report.html").read_text(encoding="utf-8")
    assert "group" not in story_text(verdict)
