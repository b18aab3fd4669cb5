"""What the card says in plain words, where a number alone would mislead."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import durable
from pipeline.artifacts import Scores, Trial, Verdict
from pipeline.config import TrainConfig
from pipeline.contract import TwinRun
from pipeline.report.story import tell
from pipeline.report.write import write_report
from tests.records_made import story_text


def why(made_reports: Any, folder: Path, metric: str, exact: float | None) -> str:
    """Return what is said under Why of a win by `metric` where both models' exact match is `exact`."""
    attempt, verdict = made_reports.case(folder, "promoted")
    lines = made_reports.rows(52, 26, 322)
    evaluation = made_reports.report(lines)
    metrics = {"token_f1": 50.0, **({} if exact is None else {"exact_match": exact})}
    sides: dict[str, Scores] = {
        role: getattr(evaluation, role).model_copy(update={"metrics": metrics}) for role in ("candidate", "champion")
    }
    found = tell(
        verdict.model_copy(update={"metric": metric}),
        made_reports.dataset(),
        evaluation.model_copy(update=sides),
        attempt.spec,
    )
    return found.why[0]


LIKENESS = "Neither model gave one right answer to the 400 records, word for word: what is compared is likeness alone."


def test_the_first_sentence_under_why_says_where_no_answer_is_right(made_reports: Any, tmp_path: Path) -> None:
    assert why(made_reports, tmp_path / "a", "rougeL", 0.0) == LIKENESS
    for number, (metric, exact) in enumerate([("rougeL", 0.25), ("rougeL", None), ("exact_match", 0.0)]):
        assert "likeness" not in why(made_reports, tmp_path / f"{number}", metric, exact)


@pytest.fixture
def unproven(made_reports: Any) -> Verdict:
    found: Verdict = made_reports.verdict("not_shown_better", made_reports.rows(40, 33, 327))
    return found


def test_up_to_ten_times_the_set_the_advice_is_more_data(unproven: Verdict) -> None:
    said = story_text(unproven.model_copy(update={"records_needed": 4000}))
    assert "Drop more data: about 4,000 more held-out records would show this gain if it is real" in said
    assert "Wait for more drops" not in said


def test_beyond_ten_times_the_set_the_advice_is_another_one_with_its_price(unproven: Verdict) -> None:
    said = story_text(unproven.model_copy(update={"records_needed": 4001}))
    assert "more held-out record" not in said
    assert "Wait for more drops: held-out records alone will not show a gain as small as this" in said
    assert "the price is that nothing but you says that it is better. dropforge promote 7 --force --reason TEXT" in said
    assert "at gate.p_value = 0.05 one candidate in 20 that is no better is promoted, not one in 100" in said
    # Ten times of what counts, which is groups.
    assert "Wait for more drops" in story_text(unproven.model_copy(update={"groups": 100, "records_needed": 1001}))


def steps_of(made_reports: Any, folder: Path, outcome: str, train: TrainConfig, *tried: Trial, **spec: Any) -> str:
    """Return what is to be done after a verdict, of a run with other settings, told other things, after a search."""
    attempt, verdict = made_reports.case(folder, outcome)
    config = attempt.config.model_copy(update={"train": train})
    adapter = made_reports.adapter().model_copy(update={"candidates": tried})
    told = attempt.spec.model_copy(update={"config": config, **spec})
    found = tell(verdict, made_reports.dataset(), None, told, adapter)
    return " ".join(f"{step.words} {step.command or ''}" for step in found.next_steps)


def test_an_unproven_gain_sends_to_other_settings_and_beyond_the_edge_of_what_was_tried(
    made_reports: Any, tmp_path: Path
) -> None:
    def said(rate: float, **space: Any) -> str:
        train = TrainConfig.model_validate({"search": {"space": {"learning_rate": (1e-4, 2e-4, 4e-4), **space}}})
        settings = {"learning_rate": rate, **{name: values[0] for name, values in space.items()}}
        chosen = Trial(number=3, settings=settings, outcome="finished", seconds=1.0, chosen=True)
        return steps_of(made_reports, tmp_path / str(len(list(tmp_path.iterdir()))), "not_shown_better", train, chosen)

    edge = "trial 3 was the best, at the edge of what was tried: the largest learning_rate (0.0004). Add values beyond"
    assert edge in said(4e-4)
    assert "the largest learning_rate (0.0004) and the smallest rank (8). Add" in said(4e-4, rank=(8, 32))
    assert "dropforge search" in said(4e-4)
    assert "dropforge search" not in said(2e-4)
    alone = steps_of(made_reports, tmp_path / "alone", "not_shown_better", TrainConfig())
    assert "Name them in [train.search], as space = { learning_rate = [1e-4, 2e-4, 4e-4], rank = [8, 32] }" in alone
    assert "dropforge search" not in steps_of(
        made_reports, tmp_path / "b", "not_shown_better", TrainConfig(method="full")
    )


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
    assert "This run tried drop 3 alone, and made the model worse once more. The drop is suspended" in said
    assert "dropforge drops restore 3 --reason TEXT" in said
    assert "now tried alone" not in said


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
        "Both models answered the same 400 records in 100 groups of alike ones, each of which counts once;"
    )
    assert story["why"][1] == "It did better on 20 of the groups, worse on 5, equally well on 75."
    assert "What became of the 100 groups of alike records" in (folder / "report.html").read_text(encoding="utf-8")
    assert "group" not in story_text(verdict)


def test_a_run_that_repeats_another_under_another_seed_says_how_far_they_differ(
    made_reports: Any, tmp_path: Path
) -> None:
    attempt, verdict = made_reports.case(tmp_path, "worse")
    gain = verdict.gain or 0.0
    spec = attempt.spec.model_copy(update={"twin": TwinRun(run=3, gain=gain + 2.5)})
    told = tell(verdict, made_reports.dataset(), None, spec).why
    (said,) = [words for words in told if "another seed" in words]
    assert said.startswith("Run 3 trained on the same drops under another seed, and its change was ")
    assert said.endswith("the two differ by 2.5, which is the luck of training alone.")
    assert not any("another seed" in words for words in tell(verdict, made_reports.dataset(), None, attempt.spec).why)
