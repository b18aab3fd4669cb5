"""The gate in both directions; scores are made, never measured, so each test says what is true of its candidate."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from pipeline import durable
from pipeline.artifacts import Dataset, ModelRef, Report, Scores, Shortfall, Verdict
from pipeline.config import GateConfig, RunConfig
from pipeline.contract import Attempt, StepSpec
from pipeline.decide import Paired, decide, judge
from pipeline.errors import StepFailed

GATE = GateConfig()


def paired(candidate: object, champion: object, metric: str = "exact_match", nll: float = 1.0) -> Paired:
    columns = np.asarray(candidate, dtype=float), np.asarray(champion, dtype=float)
    scores = {f"{place:06x}": (float(a), float(b)) for place, (a, b) in enumerate(zip(*columns, strict=True))}
    return Paired(metric, scores, nll)


def yes_or_no(wins: int, losses: int, ties: int) -> Paired:
    return paired([1] * wins + [0] * losses + [1] * ties, [0] * wins + [1] * losses + [1] * ties)


def test_a_better_candidate_is_promoted_and_the_sentence_says_why() -> None:
    candidate = [1] * 117 + [0] * 3
    champion = [0] * 116 + [1, 0, 0, 0]
    verdict = judge(paired(candidate, champion), GATE)
    assert verdict.outcome == "promoted"
    assert verdict.reasons == ()
    assert (verdict.wins, verdict.losses, verdict.ties) == (116, 0, 4)
    assert verdict.gain == pytest.approx(100 * 116 / 120)
    assert verdict.test == "exact McNemar"
    assert verdict.interval is not None
    low, high = verdict.interval
    assert 88 < low < 100 * 116 / 120 < high <= 100
    assert verdict.sentence == (
        "promoted: exact match 97.5 against the champion's 0.8 on 120 held-out records (gain 96.7 points, "
        f"98 % interval {low:.1f} to {high:.1f}, p < 0.0001; 116 better, 0 worse, 4 equal)"
    )


def test_a_better_candidate_is_promoted_on_a_continuous_metric() -> None:
    noise = np.random.default_rng(1)
    champion = noise.uniform(0.2, 0.6, 250)
    verdict = judge(paired(champion + noise.normal(0.05, 0.19, 250), champion, "rougeL"), GATE)
    assert verdict.outcome == "promoted"
    assert verdict.test == "sign flip and paired t"
    assert verdict.interval is not None
    assert verdict.interval[0] > 0


def test_the_same_answers_are_not_shown_better() -> None:
    verdict = judge(yes_or_no(0, 0, 120), GATE)
    assert verdict.outcome == "not_shown_better"
    assert verdict.reasons == ("p_above_limit", "gain_below_minimum")
    assert verdict.interval is not None
    assert verdict.interval[0] < 0 < verdict.interval[1]


def test_noise_is_not_shown_better_and_says_how_many_records_would_tell() -> None:
    verdict = judge(yes_or_no(23, 17, 160), GATE)
    assert verdict.outcome == "not_shown_better"
    assert verdict.reasons == ("p_above_limit",)
    assert verdict.records_needed is not None
    assert verdict.records_needed == pytest.approx(2221 - 200, rel=0.06)
    assert f"about {verdict.records_needed} more held-out records" in verdict.sentence


def test_shuffled_answers_are_worse() -> None:
    noise = np.random.default_rng(3)
    answers = noise.choice(5, 120)
    verdict = judge(paired(noise.permutation(answers) == answers, [1] * 118 + [0] * 2), GATE)
    assert verdict.outcome == "worse"
    assert "harm_shown" in verdict.reasons
    assert verdict.sentence.startswith("worse: exact match ")
    assert verdict.sentence.endswith(": a loss like this by chance has p < 0.0001")


def test_candidate_and_champion_changing_places_turns_promoted_into_worse() -> None:
    better = yes_or_no(30, 5, 100)
    turned = Paired(better.metric, {key: (b, a) for key, (a, b) in better.scores.items()}, 1.0)
    assert judge(better, GATE).outcome == "promoted"
    assert judge(turned, GATE).outcome == "worse"


@pytest.mark.parametrize(("wins", "outcome"), [(21, "not_shown_better"), (22, "promoted")])
def test_the_p_value_limit_is_where_the_settings_say(wins: int, outcome: str) -> None:
    verdict = judge(yes_or_no(wins, 8, 171), GATE)
    assert verdict.p_value == pytest.approx(stats.binomtest(wins, wins + 8, alternative="greater").pvalue)
    assert verdict.outcome == outcome


@pytest.mark.parametrize(("ties", "outcome"), [(1990, "promoted"), (1991, "not_shown_better")])
def test_a_sure_gain_below_the_minimum_does_not_promote(ties: int, outcome: str) -> None:
    verdict = judge(yes_or_no(20, 0, ties - 10), GATE)
    assert verdict.p_value is not None
    assert verdict.p_value < 0.0001
    assert verdict.outcome == outcome
    assert ("gain_below_minimum" in verdict.reasons) == (outcome != "promoted")


def test_the_settings_move_the_limits() -> None:
    scores = yes_or_no(20, 8, 171)
    assert judge(scores, GateConfig(p_value=0.05)).outcome == "promoted"
    assert judge(scores, GateConfig(p_value=0.05, min_gain=10)).outcome == "not_shown_better"
    assert judge(scores, GateConfig(p_value=0.05, min_records=1000)).outcome == "insufficient_evidence"


@pytest.mark.parametrize(("metric", "least"), [("exact_match", 100), ("token_f1", 200)])
def test_too_few_records_promote_nothing_however_clear_they_are(metric: str, least: int) -> None:
    noise = np.random.default_rng(2)

    def clear(records: int) -> Verdict:
        if metric == "exact_match":
            return judge(yes_or_no(records - 1, 1, 0), GATE)
        champion = noise.uniform(0, 0.2, records)
        return judge(paired(champion + 0.5 + noise.normal(0, 0.01, records), champion, metric), GATE)

    short = clear(least - 1)
    assert short.outcome == "insufficient_evidence"
    assert short.reasons == ("too_few_records",)
    assert short.records_needed == 1
    assert f"a verdict needs {least} held-out records" in short.sentence
    assert clear(least).outcome == "promoted"


def test_a_likelihood_that_is_no_number_fails_a_candidate_that_would_win() -> None:
    scores = yes_or_no(100, 0, 20)
    assert judge(scores, GATE).outcome == "promoted"
    broken = judge(Paired(scores.metric, scores.scores, float("nan")), GATE)
    assert broken.outcome == "guard_failed"
    assert broken.reasons == ("nll_not_finite",)


def test_without_the_pinned_set_that_was_asked_for_nothing_is_judged() -> None:
    verdict = judge(yes_or_no(100, 0, 20), GateConfig(on="pinned"), heldout_pinned=False)
    assert verdict.outcome == "insufficient_evidence"
    assert verdict.reasons == ("no_pinned_heldout",)


@pytest.mark.parametrize("metric", ["exact_match", "rougeL"])
def test_the_verdict_does_not_depend_on_the_order_of_the_records(metric: str) -> None:
    noise = np.random.default_rng(6)
    champion = noise.random(210)
    candidate = champion + noise.normal(0.03, 0.19, 210)
    scores = paired(candidate, champion, metric) if metric == "rougeL" else paired(candidate > 0.4, champion > 0.5)
    mixed = {key: scores.scores[key] for key in noise.permutation(list(scores.scores)).tolist()}
    assert list(mixed) != list(scores.scores)
    assert judge(Paired(metric, mixed, 1.0), GATE) == judge(scores, GATE)


def test_no_records_at_all_are_insufficient_evidence() -> None:
    verdict = judge(paired([], []), GATE)
    assert verdict.outcome == "insufficient_evidence"
    assert verdict.candidate_score is None
    assert verdict.sentence == "insufficient evidence: no held-out records, and a verdict by exact match needs 100"


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(StepFailed, match="not a finite number"):
        judge(paired([float("nan")] * 120, [0] * 120), GATE)


def equal_challengers(metric: str, nights: int, records: int) -> list[Paired]:
    """Make challengers that are exactly as good as their champions; each night with new records."""
    random_source = np.random.default_rng(20)
    draws: npt.NDArray[Any]
    found = []
    for _ in range(nights):
        ability = random_source.beta(0.43, 0.29, records)
        if metric == "exact_match":
            draws = random_source.random((2, records)) < ability
        else:
            draws = ability + random_source.normal(0, 0.134, (2, records))
        found.append(paired(draws[0], draws[1], metric))
    return found


@pytest.mark.parametrize("metric", ["exact_match", "rougeL"])
def test_equal_challengers_are_promoted_no_more_often_than_the_p_value_allows(metric: str) -> None:
    nights = equal_challengers(metric, nights=300, records=300)
    verdicts = [judge(night, GATE) for night in nights]
    promoted = sum(verdict.outcome == "promoted" for verdict in verdicts)
    called_worse = sum(verdict.outcome == "worse" for verdict in verdicts)
    naive = sum(verdict.gain is not None and verdict.gain > 0 for verdict in verdicts)
    for wrong in (promoted, called_worse):
        assert stats.binomtest(wrong, 300, 0.01, alternative="greater").pvalue > 0.001
    # Whoever promotes by the mean alone promotes every other one of them.
    assert stats.binomtest(naive, 300, 0.5).pvalue > 0.001


# The step itself, on real files.


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Attempt]:
    """Return a function that makes an attempt at `decide` from a dataset and, if given, scores."""

    def attempt(scores: Paired | None, gate: GateConfig = GATE, **dataset: object) -> Attempt:
        (tmp_path / "attempt").mkdir()
        (tmp_path / "evaluated").mkdir()
        records = len(scores.scores) if scores else 0
        facts = {
            "folder": "dataset", "train_rows": 1, "dev_rows": 0, "heldout_rows": records, "heldout_pinned": False,
            "heldout_version": "v", "dataset_sha256": "d", "duplicates": 0, "replaced": 0, "removed_heldout": 0,
            "metric": "exact_match", "max_new_tokens": 8,
        }  # fmt: skip
        durable.write_json(tmp_path / "prepare.json", Dataset.model_validate({**facts, **dataset}).model_dump())
        inputs = {"prepare": "prepare.json"}
        if scores is not None:
            write_report(tmp_path, scores)
            inputs["evaluate"] = "evaluate.json"
        spec = StepSpec(
            run=7, step="decide", attempt=1, fence="f", root=str(tmp_path), folder="attempt", checkpoints="c",
            predictions="p", argv=(), env={}, inputs=inputs, drops=(),
            champion=ModelRef(model_id="old", path="models/old", generation=3),
            config=RunConfig(track="default", base_model="/b", base_model_id="base", salt="s", gate=gate),
        )  # fmt: skip
        return Attempt(spec)

    return attempt


def write_report(root: Path, scores: Paired) -> None:
    lines = [
        {
            "id": record,
            "drop": 1,
            "candidate": {"text": "x", "scores": {scores.metric: pair[0]}},
            "champion": {"text": "y", "scores": {scores.metric: pair[1]}},
        }
        for record, pair in scores.scores.items()
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "evaluated/records.jsonl").write_text(text, encoding="utf-8")
    numbers = {"metrics": {}, "nll": 1.0, "generated": 0, "cached": 0, "seconds": 0.0}
    report = Report(
        folder="evaluated", metric=scores.metric, heldout_version="v", records=len(lines),
        candidate=Scores.model_validate({"model_id": "new", **numbers}),
        champion=Scores.model_validate({"model_id": "old", **numbers}),
        champion_generation=3, prediction_keys={},
    )  # fmt: skip
    durable.write_json(root / "evaluate.json", report.model_dump())


@pytest.mark.parametrize(
    ("scores", "outcome"),
    [(yes_or_no(100, 2, 18), "promoted"), (yes_or_no(2, 100, 18), "worse"), (yes_or_no(5, 4, 111), "not_shown_better")],
)
def test_the_step_judges_the_reports_records(make: Callable[..., Attempt], scores: Paired, outcome: str) -> None:
    verdict = decide(make(scores))
    assert verdict.outcome == outcome
    assert (verdict.candidate_model_id, verdict.champion_model_id, verdict.champion_generation) == ("new", "old", 3)
    assert verdict.records == 120


def test_a_shortfall_ends_the_run_before_training_and_says_how_many_rows_are_needed(
    make: Callable[..., Attempt],
) -> None:
    short = Shortfall(heldout_rows=36, needed_heldout_rows=100, needed_rows=430)
    verdict = decide(make(None, shortfall=short))
    assert verdict.outcome == "insufficient_evidence"
    assert verdict.reasons == ("too_few_records",)
    assert verdict.champion_generation == 3
    assert verdict.sentence == (
        "insufficient evidence, nothing was trained: 36 held-out records, and a verdict by exact match needs 100; "
        "about 430 more rows of the same kind would do"
    )


def test_a_short_pinned_set_asks_for_rows_in_its_own_folder(make: Callable[..., Attempt]) -> None:
    short = Shortfall(heldout_rows=36, needed_heldout_rows=100, needed_rows=64)
    verdict = decide(make(None, shortfall=short, heldout_pinned=True))
    assert verdict.sentence.endswith("drop at least 64 more into the track's heldout folder")


def test_the_gate_on_pinned_wants_a_pinned_set_before_and_after_training(make: Callable[..., Attempt]) -> None:
    verdict = decide(make(yes_or_no(100, 2, 18), GateConfig(on="pinned")))
    assert (verdict.outcome, verdict.reasons) == ("insufficient_evidence", ("no_pinned_heldout",))


def test_the_gate_on_pinned_says_so_before_training(make: Callable[..., Attempt]) -> None:
    short = Shortfall(heldout_rows=150, needed_heldout_rows=100, needed_rows=0)
    verdict = decide(make(None, GateConfig(on="pinned"), shortfall=short))
    assert verdict.reasons == ("no_pinned_heldout",)
    assert 'gate.on is "pinned"; drop at least 100 rows' in verdict.sentence


def test_the_gate_on_pinned_judges_where_there_is_a_pinned_set(make: Callable[..., Attempt]) -> None:
    assert decide(make(yes_or_no(100, 2, 18), GateConfig(on="pinned"), heldout_pinned=True)).outcome == "promoted"


def test_a_report_on_another_heldout_set_is_refused(make: Callable[..., Attempt]) -> None:
    with pytest.raises(StepFailed, match="another held-out set"):
        decide(make(yes_or_no(100, 2, 18), heldout_version="w"))


def test_a_report_that_lost_a_record_is_refused(make: Callable[..., Attempt], tmp_path: Path) -> None:
    attempt = make(yes_or_no(100, 2, 18))
    path = tmp_path / "evaluated/records.jsonl"
    path.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[1:]), encoding="utf-8")
    with pytest.raises(StepFailed, match="120 records and its file holds 119"):
        decide(attempt)
