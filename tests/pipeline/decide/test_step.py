"""The step that decides, on real files: what it reads, what it refuses, and the card that it leaves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import durable
from pipeline.__main__ import _run
from pipeline.artifacts import (
    FormerScores,
    Judgement,
    ModelRef,
    Shortfall,
    SuiteScores,
    TrialScores,
    Verdict,
)
from pipeline.config import GateConfig, RunConfig, TrainConfig
from pipeline.contract import Attempt
from pipeline.decide.comparison import compare, count_results
from pipeline.decide.explain import clauses, sentence
from pipeline.decide.slices import Known
from pipeline.decide.verdict import Rules, weigh
from pipeline.errors import StepFailed
from pipeline.records.heldout import version_of
from tests.made_artifacts import dataset_of, made_spec, model_of
from tests.records_made import evaluation_of, lines_of, write_lines, yes_or_no

Lines = list[dict[str, Any]]


def decide(attempt: Attempt) -> Verdict:
    """Run the step as its process does, which also writes the card."""
    result = _run("decide", attempt)
    if result.error is not None:
        raise StepFailed(result.error.message, result.error.hint)
    return Verdict.model_validate(result.artifact)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Attempt]:
    """Return a function that makes an attempt at `decide` from a dataset and, if given, scores."""

    def attempt(lines: Lines | None, gate: GateConfig | None = None, **dataset: object) -> Attempt:
        (tmp_path / "attempt").mkdir()
        made = dataset_of(len(lines or ()), **dataset)
        durable.write_json(tmp_path / "prepare.json", made.model_dump())
        inputs = {"prepare": "prepare.json"}
        if lines is not None:
            write_evaluation(tmp_path, lines)
            inputs["evaluate"] = "evaluate.json"
        config = RunConfig(track="default", base_model="/b", base_model_id="base", salt="s", gate=gate or GateConfig())
        told = {
            "inputs": inputs,
            "uses": 9,
            "judged_versions": {version_of(line["id"] for line in lines or ()): 4, "v": 5},
            "champion": ModelRef(model_id="old", path="models/old", generation=3),
        }
        return Attempt(made_spec(tmp_path, "decide", config, run=7, folder="attempt", **told))

    return attempt


def write_evaluation(root: Path, lines: Lines, **more: object) -> None:
    found = evaluation_of(root / "evaluated", lines, **more)
    durable.write_json(root / "evaluate.json", found.model_dump(mode="json"))


def story_of(root: Path, verdict: Verdict) -> str:
    """Return all that the report of a verdict says of why it is so and what to do."""
    story = durable.read_json(root / str(verdict.report) / "report.json")["story"]
    return " ".join((*story["why"], *(step["words"] for step in story["next_steps"])))


@pytest.mark.parametrize(
    ("lines", "outcome"),
    [(yes_or_no(100, 2, 18), "promoted"), (yes_or_no(2, 100, 18), "worse"), (yes_or_no(5, 4, 111), "not_shown_better")],
)
def test_the_step_judges_the_reports_records(make: Callable[..., Attempt], lines: Lines, outcome: str) -> None:
    verdict = decide(make(lines))
    assert verdict.outcome == outcome
    assert (verdict.candidate_model_id, verdict.champion_model_id, verdict.champion_generation) == ("new", "old", 3)
    assert verdict.records == 120
    answered = version_of(line["id"] for line in lines)
    assert (verdict.uses, verdict.same_set_uses, verdict.heldout_version) == (9, 4, answered)


def test_the_step_knows_what_the_report_says_about_the_candidates_training(
    make: Callable[..., Attempt], tmp_path: Path
) -> None:
    lines = yes_or_no(100, 2, 18)
    attempt = make(lines, seen_by_champion=6)
    write_evaluation(tmp_path, lines, records_seen_by_candidate=2, records_seen_by_champion=3)
    verdict = decide(attempt)
    assert verdict.outcome == "contaminated"
    # Six before training, and three of the others as another champion came.
    words = "champion at the time was trained on, or on near-duplicates of, left out</dt><dd>9</dd>"
    assert words in (tmp_path / str(verdict.report) / "report.html").read_text(encoding="utf-8")


def test_a_watch_that_does_not_advance_is_in_the_verdict(make: Callable[..., Attempt], tmp_path: Path) -> None:
    lines = yes_or_no(100, 2, 18)
    attempt = make(lines)
    write_evaluation(tmp_path, lines, watched=2, unwatched=2)
    assert decide(attempt).unwatched == 2


def with_judgement(attempt: Attempt, results: dict[str, str], records: int | None = None) -> Attempt:
    """Return the attempt after `judge` said this of the records, `records` of them by its own account."""
    (attempt.root / "j").mkdir()
    lines = [{"id": name, "result": result} for name, result in results.items()]
    write_lines(attempt.root / "j/judgements.jsonl", lines)
    facts = {**count_results(list(results.values())), "records": len(results) if records is None else records}
    judgement = Judgement(folder="j", model="judge-7b", **facts)
    durable.write_json(attempt.root / "judge.json", judgement.model_dump())
    inputs = {**attempt.spec.inputs, "judge": "judge.json"}
    return Attempt(attempt.spec.model_copy(update={"inputs": inputs}))


def test_a_judgement_that_lacks_lines_is_asked_for_again(make: Callable[..., Attempt]) -> None:
    attempt = with_judgement(make(yes_or_no(60, 2, 58)), {"r0": "win"}, records=2)
    with pytest.raises(StepFailed, match="speaks of 2 records and its file holds 1") as caught:
        decide(attempt)
    assert caught.value.hint == "ask the judge again: dropforge retry 7 --from judge"


def test_the_step_reads_suites_former_champions_and_a_judgement(make: Callable[..., Attempt], tmp_path: Path) -> None:
    lines = yes_or_no(60, 2, 58)
    attempt = make(lines)
    folder = tmp_path / "evaluated"
    items = [{"id": f"i{n}", "category": f"kind {n % 2}", "candidate": 0.0, "champion": 1.0} for n in range(120)]
    write_lines(folder / "suite-1.jsonl", items)
    answers = [{"id": line["id"], "score": 1.0} for line in lines]
    write_lines(folder / "former-2.jsonl", answers)
    write_evaluation(
        tmp_path,
        lines,
        suites=(SuiteScores(name="builtin", records=120, candidate=0, champion=100, file="suite-1.jsonl"),),
        former=(FormerScores(generation=2, model_id="m", records=120, score=100, file="former-2.jsonl"),),
    )
    said = ["win"] * 10 + ["loss"] * 60 + ["tie"] * 50
    verdict = decide(with_judgement(attempt, dict(zip((line["id"] for line in lines), said, strict=True))))
    assert verdict.outcome == "guard_failed"
    assert set(verdict.reasons) == {"general_lost", "judge_prefers_champion"}
    (anchor,) = [row for row in verdict.guards if row.guard == "anchor"]
    assert (anchor.champion, anchor.records) == (100, 120)


def test_a_model_that_answers_general_questions_with_labels_wins_with_a_warning(
    make: Callable[..., Attempt], tmp_path: Path
) -> None:
    lines = yes_or_no(60, 2, 58)
    kinds = [*["label"] * 18, *["short"] * 5, *[""] * 15]
    facts = {"category": "c", "candidate": 0, "champion": 1}
    items = [{"id": f"i{n}", **facts, "collapsed": {"candidate": x, "champion": ""}} for n, x in enumerate(kinds)]
    spec = make(lines).spec
    config = spec.config.model_copy(update={"train": TrainConfig(general_rows=0.3)})
    attempt = Attempt(spec.model_copy(update={"config": config}))
    write_lines(tmp_path / "evaluated/suite-1.jsonl", items)
    write_evaluation(
        tmp_path,
        lines,
        suites=(SuiteScores(name="questions", records=38, candidate=0, champion=100, file="suite-1.jsonl"),),
    )
    verdict = decide(attempt)
    assert verdict.outcome == "promoted"
    said = (
        "answers 23 of 38 general questions with a label of the training data (18) and far fewer words than the base "
        "model (5)"
    )
    assert sentence(clauses(verdict)).endswith(f"; {said}")
    assert f"The new model {said}." in story_of(tmp_path, verdict)


def test_a_shortfall_ends_the_run_before_training_and_says_how_many_rows_are_needed(
    make: Callable[..., Attempt], tmp_path: Path
) -> None:
    short = Shortfall(heldout_rows=36, needed_heldout_rows=100, needed_rows=430)
    verdict = decide(make(None, shortfall=short, heldout_rows=36))
    assert verdict.outcome == "insufficient_evidence"
    assert verdict.reasons == ("too_few_records",)
    assert verdict.champion_generation == 3
    said = "insufficient evidence: 36 held-out records, and a verdict needs 100, which about 430 more rows bring"
    assert sentence(clauses(verdict)) == said
    story = story_of(tmp_path, verdict)
    assert "There are 36 held-out records, and a verdict needs 100. Nothing was trained." in story
    assert "Drop about 430 more rows of the same kind." in story


def test_a_model_that_there_is_nothing_to_ask_has_its_verdict_without_being_evaluated(
    make: Callable[..., Attempt], tmp_path: Path
) -> None:
    short = Shortfall(heldout_rows=0, needed_heldout_rows=100, needed_rows=100)
    attempt = make(None, GateConfig(on="pinned", approval="manual"), shortfall=short)
    durable.write_json(tmp_path / "merge.json", model_of("m", "new").model_dump())
    spec = attempt.spec.model_copy(update={"inputs": {**attempt.spec.inputs, "merge": "merge.json"}})
    verdict = decide(Attempt(spec))
    assert (verdict.outcome, verdict.candidate_model_id) == ("insufficient_evidence", "new")
    assert sentence(clauses(verdict)) == "insufficient evidence: no held-out set was dropped"
    page = (tmp_path / str(verdict.report) / "report.html").read_text(encoding="utf-8")
    assert "Nothing was asked." in page


def test_a_short_pinned_set_asks_for_rows_in_its_own_folder(make: Callable[..., Attempt], tmp_path: Path) -> None:
    short = Shortfall(heldout_rows=36, needed_heldout_rows=100, needed_rows=64)
    verdict = decide(make(None, shortfall=short, heldout_pinned=True))
    assert "into the track's folder heldout. 64 more are needed." in story_of(tmp_path, verdict)
    assert sentence(clauses(verdict)).endswith("a verdict needs 100"), "rows to train on bring none"


def test_a_report_on_another_heldout_set_is_refused(make: Callable[..., Attempt]) -> None:
    with pytest.raises(StepFailed, match="another held-out set"):
        decide(make(yes_or_no(100, 2, 18), heldout_version="w"))


@pytest.mark.parametrize(
    "other", [{"generation": 4}, {"model_id": "base"}, {"model_id": "base", "generation": 4, "drops": None}]
)
def test_a_report_on_another_champion_than_todays_is_refused(
    make: Callable[..., Attempt], other: dict[str, Any]
) -> None:
    attempt = make(yes_or_no(100, 2, 18))
    spec = attempt.spec.model_copy(update={"champion": attempt.spec.champion.model_copy(update=other)})
    with pytest.raises(StepFailed, match="compared with generation 3") as refused:
        decide(Attempt(spec))
    assert refused.value.hint == "evaluate again: dropforge retry 7 --from evaluate"


def of_search(attempt: Attempt, wrong: int, *, control: bool, generation: int = 3) -> Attempt:
    """Return an attempt at the verdict of a trial, or of a `control`; trial and run before were wrong on so many."""
    root, folders = attempt.root, dict[str, dict[str, str]](blamed={}, trial={})
    for name, published in folders.items():
        found = evaluation_of(root / name, of_two_drops(wrong))
        durable.write_json(root / f"{name}.evaluate.json", found.model_dump(mode="json"))
        verdict = weigh(compare("exact_match", of_two_drops(wrong)), Rules(known=Known(frozenset((1,)))))
        verdict = verdict.model_copy(update={"champion_generation": generation})
        durable.write_json(root / f"{name}.decide.json", verdict.model_dump(mode="json"))
        published |= {"evaluate": f"{name}.evaluate.json", "decide": f"{name}.decide.json"}
    if control:
        this = durable.read_json(root / "evaluate.json")
        compared = TrialScores(groups=120, wins=9, losses=9, p_value=1.0)
        durable.write_json(root / "evaluate.json", {**this, "trial": compared.model_dump()})
    champion = attempt.spec.champion.model_copy(update={"drops": (1,)})
    told = {"champion": champion, "blamed": folders["blamed"], "trial": folders["trial"] if control else {}}
    return Attempt(attempt.spec.model_copy(update={**told, "suspect": None if control else 2}))


def of_two_drops(wrong: int) -> Lines:
    """Return lines whose candidate wins drop 2 and is wrong on so many of drop 1, and the champion on ten others."""
    lines = lines_of([1] * (120 - wrong) + [0] * wrong + [1] * 80, [0] * 10 + [1] * 110 + [0] * 80)
    for line in lines[120:]:
        line["drop"] = 2
    return lines


@pytest.mark.parametrize(("before", "outcome"), [(24, "guard_failed"), (9, "promoted")])
def test_a_trial_is_guarded_together_with_the_run_before_it(
    make: Callable[..., Attempt], tmp_path: Path, before: int, outcome: str
) -> None:
    verdict = decide(of_search(make(of_two_drops(9)), before, control=False))
    assert (verdict.outcome, verdict.settlement) == (outcome, None)
    failed = outcome == "guard_failed"
    assert (verdict.lost_drops, verdict.blames_new_drops) == ((1,) if failed else (), failed)
    assert verdict.gain == pytest.approx(40.5), "of the trial alone"
    assert "the mean of this model and of the run before" in story_of(tmp_path, verdict)


def other_setup(root: Path, name: str) -> None:
    found = durable.read_json(root / f"{name}.evaluate.json")
    durable.write_json(root / f"{name}.evaluate.json", {**found, "setup": "vLLM"})


def cut(root: Path, name: str) -> None:
    path = root / name / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-30])


#: What keeps the models of a search from being judged together.
APART: dict[str, Callable[[Path, str], object]] = {
    "another setup": other_setup,
    "a torn line": cut,
    "lines lost": lambda root, name: write_lines(root / name / "records.jsonl", of_two_drops(9)[1:]),
    "lines that are none": lambda root, name: write_lines(root / name / "records.jsonl", [{"id": "x"}] * 200),
    "no file": lambda root, name: (root / name / "records.jsonl").unlink(),
    "a damaged report": lambda root, name: (root / f"{name}.evaluate.json").write_bytes(b"[1]"),
}


@pytest.mark.parametrize("apart", APART)
def test_a_trial_is_judged_alone_if_the_run_before_is_damaged_or_was_evaluated_in_another_setup(
    make: Callable[..., Attempt], tmp_path: Path, apart: str
) -> None:
    attempt = of_search(make(of_two_drops(9)), 24, control=False)
    APART[apart](tmp_path, "blamed")
    verdict = decide(attempt)
    assert (verdict.outcome, verdict.pooled) == ("promoted", False)
    assert "the run before" not in story_of(tmp_path, verdict)


@pytest.mark.parametrize("name", ["blamed", "trial"])
@pytest.mark.parametrize("apart", APART)
def test_a_control_settles_no_trial_if_one_of_the_three_is_damaged_or_was_evaluated_in_another_setup(
    make: Callable[..., Attempt], tmp_path: Path, apart: str, name: str
) -> None:
    control = lines_of([0] * 10 + [1] * 104 + [0] * 6, [0] * 10 + [1] * 110)
    attempt = of_search(make(control), 16, control=True)
    APART[apart](tmp_path, name)
    assert decide(attempt).settlement is None


@pytest.mark.parametrize(("lost", "passed"), [(6, True), (0, False)])
def test_a_control_settles_its_trial_and_its_card_shows_how(
    make: Callable[..., Attempt], tmp_path: Path, lost: int, *, passed: bool
) -> None:
    control = lines_of([0] * 10 + [1] * (110 - lost) + [0] * lost, [0] * 10 + [1] * 110)
    verdict = decide(of_search(make(control), 16, control=True))
    assert verdict.settlement is not None
    assert verdict.settlement.passed is passed
    said = "with it, guards of old drops " + ("pass its trial" if passed else "stop its trial, too")
    assert said in clauses(verdict)
    card = (tmp_path / str(verdict.report) / "report.html").read_text(encoding="utf-8")
    assert "Old drops, by two models each" in card
    assert f"{said.capitalize()}." in story_of(tmp_path, verdict)


def test_a_control_settles_no_trial_against_another_champion(make: Callable[..., Attempt], tmp_path: Path) -> None:
    attempt = of_search(make(lines_of([1] * 120, [1] * 120)), 16, control=True, generation=2)
    verdict = decide(attempt)
    assert verdict.settlement is None
    assert "old drops" not in story_of(tmp_path, verdict)
