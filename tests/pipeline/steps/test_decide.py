"""The gate in both directions; scores are made, never measured, so each test says what is true of its candidate."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline import durable
from pipeline.artifacts import (
    Dataset,
    Evaluation,
    FormerScores,
    Judgement,
    Model,
    ModelRef,
    NoiseFloor,
    Scores,
    Shortfall,
    SuiteScores,
    Verdict,
)
from pipeline.config import GateConfig, GuardConfig, RunConfig
from pipeline.contract import Attempt, StepSpec
from pipeline.dataset.heldout import version_of
from pipeline.errors import StepFailed
from pipeline.gate.comparison import Comparison, Suite, compare, count_results
from pipeline.gate.reasons import REASONS
from pipeline.gate.slices import Known
from pipeline.gate.statistics import Floats
from pipeline.gate.verdict import Rules, judge, weigh
from pipeline.report.facts import Report
from pipeline.steps.decide import decide
from pipeline.wording import p_words
from pipeline.yardstick import YardstickBefore
from tests.records_made import lines_of, paired, story_text, yes_or_no

Lines = list[dict[str, Any]]
RULES = Rules()


def judged(lines: Lines, rules: Rules = RULES, metric: str = "exact_match") -> Verdict:
    return judge(compare(metric, lines), rules)


def by(**gate: Any) -> Rules:
    return Rules(gate=GateConfig(**gate))


def test_a_better_candidate_is_promoted_and_the_sentence_says_why() -> None:
    candidate = [1] * 117 + [0] * 3
    champion = [0] * 116 + [1, 0, 0, 0]
    verdict = judge(paired(candidate, champion), RULES)
    assert verdict.outcome == "promoted"
    assert verdict.reasons == ()
    assert (verdict.wins, verdict.losses, verdict.ties) == (116, 0, 4)
    assert verdict.gain == pytest.approx(100 * 116 / 120)
    assert verdict.test == "exact McNemar"
    assert verdict.interval is not None
    low, high = verdict.interval
    assert 88 < low < 100 * 116 / 120 < high <= 100
    assert verdict.sentence == f"promoted: +96.7 points (+{low:.1f} to +{high:.1f})"
    said = story_text(verdict)
    assert "The new model scored 97.5 of 100 points, the champion 0.8: a change of +96.7." in said
    assert "It answered 116 of them better, 0 worse and 4 equally well." in said
    assert "would look like this less than once in 10,000 times" in said


def test_a_better_candidate_is_promoted_on_a_continuous_metric() -> None:
    noise = np.random.default_rng(1)
    champion = noise.uniform(0.2, 0.6, 250)
    verdict = judge(paired(champion + noise.normal(0.05, 0.19, 250), champion, "rougeL"), RULES)
    assert verdict.outcome == "promoted"
    assert verdict.test == "sign flip, paired t and skewness-adjusted t"
    assert verdict.interval is not None
    assert verdict.interval[0] > 0


def test_the_same_answers_are_not_shown_better() -> None:
    verdict = judged(yes_or_no(0, 0, 120))
    assert verdict.outcome == "not_shown_better"
    assert verdict.reasons == ("p_above_limit", "gain_below_minimum")
    assert verdict.interval is not None
    assert verdict.interval[0] < 0 < verdict.interval[1]


@pytest.mark.parametrize(
    ("p_value", "limit", "gain", "said"),
    [
        (0.0312, 0.01, 0.4, ("p = 0.0312", "0.40 is below 1.")),
        (0.010004, 0.01, 0.996, ("p = 0.010004", "0.996 is below 1.")),
        (0.0100000001, 0.01, 1 - 1e-8, ("p = 0.0100000001", "0.99999999 is below 1.")),
        (0.101, 0.1, 0.4, ("p = 0.101", "0.40 is below 1.")),
        (0.31, 0.1, 0.4, ("p = 0.31", "0.40 is below 1.")),
    ],
)
def test_a_number_is_told_from_the_limit_that_it_missed(
    p_value: float, limit: float, gain: float, said: tuple[str, str]
) -> None:
    verdict = judged(yes_or_no(0, 0, 120)).model_copy(update={"p_value": p_value, "gain": gain})
    assert p_words(p_value, limit) == said[0]
    assert f"smaller than the settings ask for: {said[1]}" in story_text(verdict)


def test_noise_is_not_shown_better_and_says_how_many_records_would_tell() -> None:
    verdict = judged(yes_or_no(23, 17, 160))
    assert verdict.outcome == "not_shown_better"
    assert verdict.reasons == ("p_above_limit",)
    assert verdict.records_needed is not None
    assert verdict.records_needed == pytest.approx(2221 - 200, rel=0.06)
    assert f"about {verdict.records_needed:,} more held-out records would show this gain" in story_text(verdict)


def test_shuffled_answers_are_worse() -> None:
    noise = np.random.default_rng(3)
    answers = noise.choice(5, 120)
    verdict = judge(paired(noise.permutation(answers) == answers, [1] * 118 + [0] * 2), RULES)
    assert verdict.outcome == "worse"
    assert "harm_shown" in verdict.reasons
    assert verdict.sentence.startswith("worse: −")
    said = story_text(verdict)
    assert "The loss is larger than chance would explain. Read the answers that became worse" in said


def test_candidate_and_champion_changing_places_turns_promoted_into_worse() -> None:
    assert judged(yes_or_no(30, 5, 100)).outcome == "promoted"
    assert judged(yes_or_no(5, 30, 100)).outcome == "worse"


@pytest.mark.parametrize(("wins", "outcome"), [(21, "not_shown_better"), (22, "promoted")])
def test_the_p_value_limit_is_where_the_settings_say(wins: int, outcome: str) -> None:
    verdict = judged(yes_or_no(wins, 8, 171))
    assert verdict.p_value == pytest.approx(stats.binomtest(wins, wins + 8, alternative="greater").pvalue)
    assert verdict.outcome == outcome


@pytest.mark.parametrize(("ties", "outcome"), [(1990, "promoted"), (1991, "not_shown_better")])
def test_a_sure_gain_below_the_minimum_does_not_promote(ties: int, outcome: str) -> None:
    verdict = judged(yes_or_no(20, 0, ties - 10))
    assert verdict.p_value is not None
    assert verdict.p_value < 0.0001
    assert verdict.outcome == outcome
    assert ("gain_below_minimum" in verdict.reasons) == (outcome != "promoted")


def test_the_settings_move_the_limits() -> None:
    lines = yes_or_no(20, 8, 171)
    assert judged(lines, by(p_value=0.05)).outcome == "promoted"
    assert judged(lines, by(p_value=0.05, min_gain=10)).outcome == "not_shown_better"
    assert judged(lines, by(p_value=0.05, min_records=1000)).outcome == "insufficient_evidence"


@pytest.mark.parametrize(("confidence", "level"), [("strict", 0.05 / 30), ("balanced", 0.01), ("eager", 0.05)])
def test_a_preset_is_the_largest_p_value_that_promotes(confidence: str, level: float) -> None:
    least = next(wins for wins in range(40) if stats.binomtest(wins, wins + 8, alternative="greater").pvalue <= level)
    assert judged(yes_or_no(least, 8, 171), by(confidence=confidence)).outcome == "promoted"
    assert judged(yes_or_no(least - 1, 8, 171), by(confidence=confidence)).outcome == "not_shown_better"


@pytest.mark.parametrize(("metric", "least"), [("exact_match", 100), ("token_f1", 200)])
def test_too_few_records_promote_nothing_however_clear_they_are(metric: str, least: int) -> None:
    noise = np.random.default_rng(2)

    def clear(records: int) -> Verdict:
        if metric == "exact_match":
            return judged(yes_or_no(records - 1, 1, 0))
        champion = noise.uniform(0, 0.2, records)
        return judge(paired(champion + 0.5 + noise.normal(0, 0.01, records), champion, metric), RULES)

    short = clear(least - 1)
    assert short.outcome == "insufficient_evidence"
    assert short.reasons == ("too_few_records",)
    assert short.records_needed == 1
    assert short.sentence.endswith(f" held-out records, and a verdict needs {least}")
    assert "promoted" not in story_text(short), "on so few no gain is"
    assert (short.smallest_detectable_gain, short.detectable_power) == (None, None)
    assert clear(least).outcome == "promoted"


def test_a_likelihood_that_is_no_number_fails_a_candidate_that_would_win() -> None:
    lines = yes_or_no(100, 0, 20)
    assert judged(lines).outcome == "promoted"
    lines[7]["candidate"]["nll_sum"] = None
    broken = judged(lines)
    assert broken.outcome == "guard_failed"
    assert broken.reasons == ("nll_not_finite", "nll_rose")
    assert "likelihood of the expected answers is not a number: it is broken." in story_text(broken)


def test_without_the_pinned_set_that_was_asked_for_nothing_is_judged() -> None:
    verdict = judged(yes_or_no(100, 0, 20), by(on="pinned"))
    assert verdict.outcome == "insufficient_evidence"
    assert verdict.reasons == ("no_pinned_heldout",)
    assert verdict.sentence == "insufficient evidence: no held-out set was dropped"
    assert "Drop a file of records into the track's folder heldout." in story_text(verdict)


def test_a_candidate_that_was_trained_on_held_out_records_is_contaminated_however_good_it_looks() -> None:
    verdict = judged(yes_or_no(100, 0, 20), Rules(seen_by_candidate=3))
    assert verdict.outcome == "contaminated"
    assert verdict.reasons == ("trained_on_heldout",)
    # Such a run has succeeded: it cannot be retried.
    assert "dropforge retry" not in story_text(verdict)
    assert "drop a file of rows: the next run is prepared and trained anew" in story_text(verdict)


def test_how_often_the_set_was_used_is_kept() -> None:
    verdict = judge(compare("exact_match", yes_or_no(100, 0, 20)), RULES, used=(8, 3))
    assert (verdict.uses, verdict.same_set_uses) == (8, 3)


def test_a_set_that_can_show_no_gain_is_said_to_be_one_where_nothing_won() -> None:
    words = "no gain, however large, is promoted in 5 of 10 cases"
    verdict = judge(compare("exact_match", yes_or_no(3, 1, 0)), by(min_records=4))
    assert verdict.smallest_detectable_gain is None
    assert words in story_text(verdict)
    won = judge(compare("exact_match", yes_or_no(100, 0, 20)), RULES)
    nothing = {"smallest_detectable_gain": None, "detectable_power": None}
    assert words not in story_text(won.model_copy(update=nothing))


def test_a_change_that_rounds_to_nothing_has_no_sign_in_the_sentence() -> None:
    noise = np.random.default_rng(2).normal(0, 1, 300)
    tiny = -0.0002 + 1e-5 * noise
    said = judge(paired(0.5 + tiny, np.full(300, 0.5), "rougeL"), RULES).sentence
    assert said == "worse: 0.0 points (0.0 to 0.0)"


def test_where_guards_stop_too_many_by_chance_the_gain_of_fewer_cases_is_said_with_the_guards() -> None:
    # Half of the items changed: one good candidate of four loses more than the margin of 5 points on them by chance.
    items = np.array([[1.0, 0.0]] * 25 + [[0.0, 1.0]] * 25 + [[1.0, 1.0]] * 50)
    found = replace(compare("exact_match", yes_or_no(10, 10, 180)), suites=(Suite("general", items),))
    verdict = judge(found, RULES)
    assert verdict.detectable_power == 0.7
    assert verdict.smallest_detectable_gain is not None
    assert (
        f"a gain of {verdict.smallest_detectable_gain:.1f} points or more is promoted in 7 of 10 cases; the settings "
        "ask for 1.0. No gain is promoted much more surely: guards stop good candidates by chance, most of all those "
        "on general suites."
    ) in story_text(verdict)
    without = judge(replace(found, suites=()), RULES)
    assert without.detectable_power == 0.8
    assert "is promoted in 8 of 10 cases; the settings ask for 1.0. Drop more" in story_text(without)


def test_guards_with_more_noise_never_make_the_verdict_ask_for_fewer_records() -> None:
    needed, powers = [], []
    for changed in (20, 36, 48, 52, 56, 80):
        items = np.array([[1.0, 0.0], [0.0, 1.0]] * (changed // 2) + [[1.0, 1.0]] * (120 - changed))
        found = replace(compare("exact_match", yes_or_no(26, 17, 157)), suites=(Suite("general", items),))
        verdict = judge(found, RULES)
        needed.append(verdict.records_needed or 0)
        powers.append(verdict.detectable_power)
    assert needed == sorted(needed)
    assert powers[0] == 0.8
    assert powers[-1] != 0.8
    alone = judged(yes_or_no(26, 17, 157)).records_needed
    assert alone is not None
    assert alone < needed[0] < needed[-1] < 2 * alone + 200


def _resampled(differences: Floats, gain: float, times: int = 300) -> float:
    """Return how often the gate promotes as many of these records with this true gain, drawn again."""
    centred, random = differences - differences.mean(), np.random.default_rng(3)
    drawn = random.choice(centred + gain, (times, centred.size))
    return float(np.mean([weigh(paired(0.5 + one, np.full(one.size, 0.5), "rougeL"), RULES).outcome == "promoted"
                          for one in drawn]))  # fmt: skip


_NOISE = np.random.default_rng(11)
_EVEN = _NOISE.normal(0, 0.1, 200)
_LOST = np.r_[np.full(2, -0.9), _NOISE.normal(0.02, 0.02, 198)]
_SKEWED = np.r_[np.full(4, -0.45), _NOISE.normal(0.02, 0.02, 196)]
_CLUSTERED = _NOISE.choice([-0.4, 0.0, 0.4], 200, p=[0.1, 0.8, 0.1])
_UNLIKE = np.r_[_NOISE.normal(-0.3, 0.02, 40), _NOISE.normal(0.075, 0.02, 160)]


@pytest.mark.parametrize(
    "differences", [_EVEN, _LOST, _SKEWED, _CLUSTERED, _UNLIKE], ids=["even", "lost", "skewed", "clustered", "unlike"]
)
def test_the_stated_gain_of_a_continuous_metric_is_promoted_as_often_as_it_says(differences: Floats) -> None:
    verdict = judge(paired(0.5 + differences, np.full(200, 0.5), "rougeL"), RULES)
    assert verdict.smallest_detectable_gain is not None
    assert verdict.detectable_power == 0.8
    assert _resampled(differences, verdict.smallest_detectable_gain / 100) == pytest.approx(0.8, abs=0.06)


def test_the_guard_on_catastrophes_is_part_of_the_stated_gain() -> None:
    differences = np.r_[np.full(4, -0.7), np.random.default_rng(11).normal(0.03, 0.05, 196)]
    found = paired(0.5 + differences, np.full(200, 0.5), "rougeL")
    silent = Rules(guards=GuardConfig(show_only=("catastrophe",)))
    with_guard, without = judge(found, RULES), judge(found, silent)
    assert without.smallest_detectable_gain is not None
    assert with_guard.smallest_detectable_gain is not None
    # Four may be five or more by chance, so eight of ten pass only where an answer that loses .7 gains .2 as well.
    assert without.smallest_detectable_gain < 15 < with_guard.smallest_detectable_gain
    assert _resampled(differences, with_guard.smallest_detectable_gain / 100, 60) > 0.8


# The verdict does not depend on the order of the records.


@st.composite
def worlds(draw: st.DrawFn) -> Lines:
    """Records with two metrics, drops, tags, likelihoods and degenerate answers; some candidates win, some lose."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, shift = draw(st.integers(120, 260)), draw(st.sampled_from([-0.1, 0.0, 0.06, 0.3]))
    champion = random.random(count)
    lines = lines_of(champion + random.normal(shift, 0.19, count), champion, "rougeL")
    for line in lines:
        line["drop"] = int(random.integers(1, 5))
        line["tags"] = [tag for tag in ("short", "long") if random.random() < 0.4]
        for role in ("candidate", "champion"):
            line[role]["scores"]["token_f1"] = float(random.random())
            line[role]["nll_sum"] = float(random.gamma(4))
            line[role]["degenerate"] = ["empty"] if random.random() < 0.02 else []
    return lines


@settings(max_examples=15, deadline=None)
@given(worlds(), st.randoms(use_true_random=False))
def test_the_verdict_does_not_depend_on_the_order_of_the_records(lines: Lines, order: Any) -> None:
    rules = Rules(known=Known(frozenset({1, 2})))
    first = judged(lines, rules, "rougeL")
    order.shuffle(lines)
    assert judged(lines, rules, "rougeL") == first


@pytest.mark.parametrize("metric", ["exact_match", "rougeL"])
def test_what_decides_is_what_the_card_shows(metric: str) -> None:
    random = np.random.default_rng(31)
    for shift in (-0.1, 0.0, 0.03, 0.05, 0.1):
        champion = random.random(220)
        candidate = champion + random.normal(shift, 0.19, 220)
        made = paired(candidate, champion, metric) if metric == "rougeL" else paired(candidate > 0.5, champion > 0.5)
        found, verdict = weigh(made, RULES), judge(made, RULES)
        assert (found.outcome, found.reasons) == (verdict.outcome, verdict.reasons)
        assert verdict.p_value is not None
        assert ("p_above_limit" in verdict.reasons) == (verdict.p_value > 0.01)
        assert set(verdict.reasons) <= set(REASONS)


def test_no_records_at_all_are_insufficient_evidence() -> None:
    verdict = judged([])
    assert verdict.outcome == "insufficient_evidence"
    assert verdict.candidate_score is None
    assert verdict.sentence == "insufficient evidence: 0 held-out records, and a verdict needs 100"
    assert "promoted" not in story_text(verdict)


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(StepFailed, match="not a finite number"):
        paired([float("nan")] * 120, [0] * 120)


def test_answers_that_were_scored_by_different_metrics_are_refused() -> None:
    lines = yes_or_no(100, 0, 20)
    lines[3]["champion"]["scores"] = {"rougeL": 0.5}
    with pytest.raises(StepFailed, match="not all scored by the same metrics"):
        compare("exact_match", lines)


def test_signs_are_flipped_before_anything_is_promoted() -> None:
    # By t alone a gain of a third of the spread has a p-value near .000001; 9,999 flips of signs give at best .0001.
    sample = np.random.default_rng(7).normal(0, 1, 220)
    champion = np.full(220, 0.4)
    candidate = champion + 0.05 + 0.15 * (sample - sample.mean()) / sample.std()
    made = paired(candidate, champion, "rougeL")
    assert stats.ttest_rel(candidate, champion, alternative="greater").pvalue < 0.00001
    assert weigh(made, by(p_value=0.00011)).outcome == "promoted"
    # The settings refuse such a limit, for which nothing could be promoted.
    lower = GateConfig().model_copy(update={"p_value": 0.00009})
    assert weigh(made, Rules(gate=lower)).reasons == ("p_above_limit",)


# New drops bring their own held-out records, and so their own yardstick.


def of_drops(seen: tuple[int, int, int], new: tuple[int, int, int]) -> Lines:
    """Return records of drop 1 and of drop 2, each with so many won, lost and equal."""
    lines = [*yes_or_no(*seen), *yes_or_no(*new)]
    for place, line in enumerate(lines):
        line["id"] = f"{place:06x}"
        line["drop"] = 1 if place < sum(seen) else 2
    return lines


KNOWS_ONE = Known(frozenset({1}), {1: "old.jsonl", 2: "new.jsonl"})


def test_a_win_that_is_there_only_with_new_records_counts_and_says_so() -> None:
    verdict = judged(of_drops((4, 4, 142), (60, 2, 88)), Rules(known=KNOWS_ONE))
    assert verdict.outcome == "promoted"
    assert verdict.reasons == ("gain_from_new_data",)
    gains = {row.kind: (row.records, row.gain) for row in verdict.slices if row.kind != "drop"}
    assert gains == {"seen": (150, 0.0), "unseen": (150, pytest.approx(100 * 58 / 150))}
    assert (
        "The gain is shown only with the records of new drops: +38.7 on 150 records of new drops and 0.0 on 150 "
        "records of older drops."
    ) in story_text(verdict)


def test_a_win_that_is_there_without_new_records_needs_no_such_reason() -> None:
    verdict = judged(of_drops((40, 4, 106), (60, 2, 88)), Rules(known=KNOWS_ONE))
    assert (verdict.outcome, verdict.reasons) == ("promoted", ())


def test_a_base_model_knows_no_drops_so_nothing_is_new_to_it() -> None:
    verdict = judged(of_drops((4, 4, 142), (60, 2, 88)))
    assert (verdict.outcome, verdict.reasons) == ("promoted", ())
    assert {row.kind for row in verdict.slices} == {"drop"}


def test_a_win_on_new_records_that_costs_established_ones_is_refused_and_names_them() -> None:
    verdict = judged(of_drops((2, 16, 132), (70, 2, 78)), Rules(known=KNOWS_ONE))
    assert verdict.outcome == "guard_failed"
    assert {"slice_lost", "seen_lost", "gain_from_new_data"} <= set(verdict.reasons)
    assert "What it loses: drop 1 (old.jsonl) −9.3 points (the limit is 5.0 points)." in story_text(verdict)


def test_settings_that_only_show_slices_do_not_buy_a_win_on_new_records_with_established_ones() -> None:
    rules = Rules(known=KNOWS_ONE, guards=GuardConfig(show_only=("slice",)))
    verdict = judged(of_drops((2, 16, 132), (70, 2, 78)), rules)
    assert verdict.outcome == "not_shown_better"
    assert "seen_lost" in verdict.reasons


def test_pinned_records_are_never_new() -> None:
    lines = of_drops((4, 4, 142), (60, 2, 88))
    for line in lines:
        line["pinned"] = True
    verdict = judged(lines, Rules(known=KNOWS_ONE))
    assert (verdict.outcome, verdict.reasons) == ("promoted", ())


def pinned(kept: tuple[int, int, int], replaced: tuple[int, int, int], new: tuple[int, int, int] = (0, 0, 0)) -> Lines:
    """Return pinned records of drop 1 that are as they were, and those that drop 2 replaced and that it brought."""
    known = [{**line, "pinned": True, "replaced": line["drop"] == 2} for line in of_drops(kept, replaced)]
    return known + [{**line, "id": f"n{line['id']}", "drop": 2, "pinned": True} for line in yes_or_no(*new)]


REPLACED = replace(RULES, known=KNOWS_ONE, repinned={2: 40})


def test_a_loss_on_replaced_references_alone_holds_nothing_and_names_the_drop() -> None:
    lines = pinned((8, 6, 130), (0, 40, 0))
    verdict = judged(lines, REPLACED)
    assert (verdict.outcome, verdict.references_changed) == ("worse", 40)
    said = story_text(verdict, pins_changed={2: 40})
    assert "But 40 pinned references were replaced since the champion was judged, and without them this would" in said
    assert "Look at the pinned drop 2 (new.jsonl) first" in said
    assert "No drop is suspended for this" in said
    before = judged(lines, Rules(known=KNOWS_ONE))
    assert (before.outcome, before.references_changed) == ("worse", 0)
    assert "inned references" not in story_text(before)
    assert ("a drop is to blame" in story_text(before), "a drop is to blame" in said) == (True, False)


def test_a_loss_that_the_other_references_show_too_holds_drops_all_the_same() -> None:
    verdict = judged(pinned((2, 60, 80), (0, 40, 0)), REPLACED)
    assert (verdict.outcome, verdict.references_changed) == ("worse", 0)
    said = story_text(verdict, pins_changed={2: 40})
    assert "Pinned references were replaced since the champion was judged: 40 by drop 2 (new.jsonl)." in said


@pytest.mark.parametrize("kept", [(0, 0, 0), (0, 10, 10), (0, 0, 60)])
def test_where_all_references_were_replaced_or_the_others_show_nothing_a_loss_says_nothing_of_the_drops(
    kept: tuple[int, int, int],
) -> None:
    verdict = judged(pinned(kept, (0, 40, 100)), REPLACED)
    assert (verdict.outcome, verdict.references_changed) == ("worse", 40)


def test_one_corrected_reference_excuses_no_loss_on_those_that_its_drop_brought() -> None:
    verdict = judged(pinned((0, 0, 40), (0, 1, 0), (6, 40, 113)), replace(REPLACED, repinned={2: 1}))
    assert (verdict.outcome, verdict.references_changed) == ("worse", 0)
    assert "was judged: 1 by drop 2 (new.jsonl)." in story_text(verdict, pins_changed={2: 1})


def test_a_loss_on_the_other_records_counts_though_they_are_too_few_for_a_verdict() -> None:
    verdict = judged(pinned((0, 30, 30), (0, 40, 100)), REPLACED)
    assert (verdict.outcome, verdict.references_changed) == ("worse", 0)


def with_suite(lines: Lines, lost: int) -> Comparison:
    """Return the comparison of these lines, with a suite of 120 items of which so many were lost."""
    items = np.column_stack(([0.0] * lost + [1.0] * (120 - lost), [1.0] * 120))
    return replace(compare("exact_match", lines), suites=(Suite("builtin", items),))


ALL_REPLACED = (0, 40, 100)


def test_general_abilities_that_are_lost_are_not_excused_by_references() -> None:
    verdict = judge(with_suite(pinned((0, 0, 0), ALL_REPLACED), 100), REPLACED)
    assert (verdict.outcome, verdict.references_changed) == ("worse", 0)
    # What would hold no drops by itself, held beside a loss, leaves them free as well.
    chance = judge(with_suite(pinned((0, 0, 0), ALL_REPLACED), 6), REPLACED)
    assert ("general_lost" in chance.reasons, chance.references_changed) == (True, 40)
    # Beside a win it does.
    won = judge(with_suite(pinned((0, 0, 0), (40, 0, 100)), 6), REPLACED)
    assert (won.outcome, won.references_changed) == ("guard_failed", 0)


@pytest.mark.parametrize("kind", ["empty", "truncated", "looping"])
def test_answers_that_are_none_are_not_excused_by_references(kind: str) -> None:
    lines = pinned((0, 0, 0), ALL_REPLACED)
    for line in lines[:40]:
        line["candidate"]["degenerate"] = [kind]
    assert judged(lines, REPLACED).references_changed == 0


def test_a_likelihood_that_fell_is_that_of_the_references_and_one_that_is_none_is_the_models_own() -> None:
    lines = pinned((0, 0, 130), (0, 40, 0))
    for line in lines[130:]:
        line["candidate"]["nll_sum"] = 40.0
    fell = judged(lines, REPLACED)
    assert ("nll_rose" in fell.reasons, fell.references_changed) == (True, 40)
    lines[-1]["candidate"]["nll_sum"] = None
    assert judged(lines, REPLACED).references_changed == 0


def test_a_guard_that_failed_on_replaced_references_alone_names_no_remedy_against_the_drops() -> None:
    lines = pinned((2, 1, 130), (30, 0, 10))
    for line in lines[133:]:
        line["candidate"]["nll_sum"] = 40.0
    verdict = judged(lines, REPLACED)
    assert (verdict.outcome, verdict.references_changed) == ("guard_failed", 40)
    assert "guards.nll" not in story_text(verdict, pins_changed={2: 40})
    assert "guards.nll" in story_text(judged(lines))


def test_the_step_counts_what_was_replaced_since_the_champion_was_judged(make: Callable[..., Attempt]) -> None:
    lines = pinned((8, 6, 130), (0, 40, 0))
    assert decide(make(lines, heldout_pinned=True, pins_changed={2: 40})).references_changed == 40


def test_the_step_leaves_out_what_the_champion_was_judged_by(make: Callable[..., Attempt]) -> None:
    attempt = make(pinned((8, 6, 130), (0, 40, 0)), heldout_pinned=True, pins_changed={2: 40})
    champion = attempt.spec.champion.model_copy(update={"drops": (1, 2)})
    known = Attempt(attempt.spec.model_copy(update={"champion": champion}))
    assert decide(known).references_changed == 0


def test_the_gate_on_established_records_is_not_moved_by_new_ones() -> None:
    rules = Rules(gate=GateConfig(on="seen"), known=KNOWS_ONE)
    odd = judged(of_drops((4, 4, 142), (60, 2, 88)), rules)
    assert odd.outcome == "not_shown_better"
    assert odd.records == 150
    good = judged(of_drops((40, 4, 106), (2, 60, 88)), rules)
    assert (good.outcome, good.reasons) == ("promoted", ())
    assert {row.label for row in good.slices if row.kind == "drop"} == {"drop 1 (old.jsonl)", "drop 2 (new.jsonl)"}


def test_the_gate_on_established_records_wants_enough_of_them() -> None:
    verdict = judged(of_drops((60, 0, 30), (60, 2, 88)), Rules(gate=GateConfig(on="seen"), known=KNOWS_ONE))
    assert verdict.outcome == "insufficient_evidence"
    assert verdict.reasons == ("too_few_seen",)
    assert 'set gate.on = "all"' in story_text(verdict)


def test_the_gate_on_pinned_records_leaves_the_others_out() -> None:
    lines = of_drops((40, 4, 106), (2, 60, 88))
    for line in lines:
        line["pinned"] = line["drop"] == 1
    verdict = judged(lines, by(on="pinned"))
    assert (verdict.outcome, verdict.records) == ("promoted", 150)


# Nights on which nobody is better than anybody, on new records each night. bench/gate.py has whole months of them.


@pytest.mark.parametrize("metric", ["exact_match", "rougeL"])
def test_equal_challengers_are_promoted_no_more_often_than_the_p_value_allows(metric: str) -> None:
    random = np.random.default_rng(20)
    outcomes, naive = [], 0
    for _ in range(600):
        ability = random.beta(0.43, 0.29, 300)
        noisy = ability + random.normal(0, 0.134, (2, 300))
        draws = random.random((2, 300)) < ability if metric == "exact_match" else noisy
        found = weigh(paired(draws[0], draws[1], metric), RULES)
        outcomes.append(found.outcome)
        naive += found.gain > 0
    for wrong in ("promoted", "worse"):
        assert stats.binomtest(outcomes.count(wrong), 600, 0.01, alternative="greater").pvalue > 0.001
    # Whoever promotes by the mean alone promotes every other one of them.
    assert naive > 240


# The step itself, on real files.


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Attempt]:
    """Return a function that makes an attempt at `decide` from a dataset and, if given, scores."""

    def attempt(lines: Lines | None, gate: GateConfig | None = None, **dataset: object) -> Attempt:
        (tmp_path / "attempt").mkdir()
        (tmp_path / "evaluated").mkdir()
        facts = {
            "folder": "dataset", "train_rows": 1, "dev_rows": 0, "heldout_rows": len(lines or ()),
            "heldout_groups": len(lines or ()),
            "heldout_pinned": False, "heldout_version": "v", "dataset_sha256": "d", "duplicates": 0, "replaced": 0,
            "removed_heldout": 0, "metric": "exact_match", "max_new_tokens": 8,
        }  # fmt: skip
        durable.write_json(tmp_path / "prepare.json", Dataset.model_validate({**facts, **dataset}).model_dump())
        inputs = {"prepare": "prepare.json"}
        if lines is not None:
            write_evaluation(tmp_path, lines)
            inputs["evaluate"] = "evaluate.json"
        spec = StepSpec(
            run=7, step="decide", attempt=1, fence="f", root=str(tmp_path), folder="attempt", checkpoints="c",
            predictions="p", argv=(), env={}, inputs=inputs, drops=(), uses=9,
            judged_versions={version_of(line["id"] for line in lines or ()): 4, "v": 5},
            champion=ModelRef(model_id="old", path="models/old", generation=3),
            config=RunConfig(
                track="default", base_model="/b", base_model_id="base", salt="s", gate=gate or GateConfig()
            ),
        )  # fmt: skip
        return Attempt(spec)

    return attempt


def write_evaluation(root: Path, lines: Lines, **more: object) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "evaluated/records.jsonl").write_text(text, encoding="utf-8")
    numbers = {"metrics": {}, "nll": 1.0, "generated": 0, "cached": 0, "seconds": 0.0}
    facts: dict[str, Any] = {
        "folder": "evaluated", "metric": "exact_match", "heldout_version": "v", "records": len(lines),
        "candidate": Scores.model_validate({"model_id": "new", **numbers}),
        "champion": Scores.model_validate({"model_id": "old", **numbers}),
        "champion_generation": 3, "prediction_keys": {},
    }  # fmt: skip
    durable.write_json(root / "evaluate.json", Evaluation.model_validate({**facts, **more}).model_dump(mode="json"))


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


def test_another_yardstick_than_the_last_verdicts_is_told_by_verdict_and_card(
    make: Callable[..., Attempt], tmp_path: Path
) -> None:
    before = YardstickBefore(run=6, records=100, champion_score=71.0, added=("drop 3 (e.jsonl, 20 rows)",))
    attempt = make(yes_or_no(10, 40, 70))
    verdict = decide(Attempt(attempt.spec.model_copy(update={"yardstick": before})))
    said = (
        "The yardstick changed since run 6. Added: drop 3 (e.jsonl, 20 rows). Records: 100 before, 120 now. "
        f"The champion scored 71.0 points on the old one and scores {verdict.champion_score:.1f} on this one."
    )
    assert verdict.yardstick == said
    folder = tmp_path / str(verdict.report)
    assert said in (folder / "report.html").read_text(encoding="utf-8")
    assert said in durable.read_json(folder / "report.json")["story"]["why"]


def test_nothing_is_said_of_the_yardstick_where_it_is_the_same_or_nothing_was_judged(
    make: Callable[..., Attempt],
) -> None:
    attempt = make(yes_or_no(10, 4, 6))
    assert decide(attempt).outcome == "insufficient_evidence"
    before = YardstickBefore(run=6, records=None, champion_score=None)
    few = Attempt(attempt.spec.model_copy(update={"yardstick": before, "folder": "again"}))
    few.folder.mkdir()
    assert decide(few).yardstick is None


def test_the_step_knows_what_the_report_says_about_the_candidates_training(
    make: Callable[..., Attempt], tmp_path: Path
) -> None:
    lines = yes_or_no(100, 2, 18)
    attempt = make(lines, seen_by_champion=6)
    write_evaluation(tmp_path, lines, records_seen_by_candidate=2, records_seen_by_champion=3)
    verdict = decide(attempt)
    assert verdict.outcome == "contaminated"
    # Six before training, and three of the others as another champion came.
    words = (
        "Held-out records that the champion at the time was trained on, or on near copies of, left out</dt><dd>9</dd>"
    )
    assert words in (tmp_path / str(verdict.report) / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("lines", [None, yes_or_no(5, 4, 111)])
def test_every_verdict_has_its_card(
    make: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch, lines: Lines | None
) -> None:
    written: list[Verdict] = []

    def write_report(attempt: Attempt, verdict: Verdict, _judgement: object) -> str:
        written.append(verdict)
        return attempt.relative(attempt.folder / "card")

    monkeypatch.setattr("pipeline.report.write.write_report", write_report)
    shortfall = None if lines else Shortfall(heldout_rows=36, needed_heldout_rows=100, needed_rows=430)
    verdict = decide(make(lines, shortfall=shortfall))
    assert verdict.report == "attempt/card"
    assert [verdict.model_copy(update={"report": None})] == written


def with_judgement(attempt: Attempt, results: dict[str, str], records: int | None = None) -> Attempt:
    """Return the attempt after `judge` said this of the records, `records` of them by its own account."""
    text = "".join(json.dumps({"id": name, "result": result}) + "\n" for name, result in results.items())
    (attempt.root / "j").mkdir()
    (attempt.root / "j/judgements.jsonl").write_text(text, encoding="utf-8")
    facts = {**count_results(list(results.values())), "records": len(results) if records is None else records}
    judgement = Judgement(folder="j", model="judge-7b", prompt_sha256="p", **facts)
    durable.write_json(attempt.root / "judge.json", judgement.model_dump())
    inputs = {**attempt.spec.inputs, "judge": "judge.json"}
    return Attempt(attempt.spec.model_copy(update={"inputs": inputs}))


def test_the_card_says_of_the_judge_what_the_gate_counted(make: Callable[..., Attempt]) -> None:
    lines = yes_or_no(60, 2, 178)
    for place, line in enumerate(lines):
        line["pinned"] = place % 2 == 0
    attempt = make(lines, GateConfig(on="pinned"))
    results = {line["id"]: "win" if line["pinned"] else "loss" for line in lines[:160]}
    verdict = decide(with_judgement(attempt, results))
    card = Report.model_validate_json((attempt.root / (verdict.report or "") / "report.json").read_bytes())
    (row,) = [row for row in verdict.guards if row.guard == "judge"]
    assert (row.candidate, row.champion, row.state) == (80, 0, "passed")
    assert card.judgement is not None
    assert (card.judgement.records, card.judgement.wins, card.judgement.losses) == (80, 80, 0)


def test_a_judgement_that_lacks_lines_is_asked_for_again(make: Callable[..., Attempt]) -> None:
    attempt = with_judgement(make(yes_or_no(60, 2, 58)), {"r0": "win"}, records=2)
    with pytest.raises(StepFailed, match="speaks of 2 records and its file holds 1") as caught:
        decide(attempt)
    assert caught.value.hint == "ask the judge again: dropforge retry RUN --from judge"


def test_the_step_reads_suites_former_champions_a_judgement_and_the_noise_floor(
    make: Callable[..., Attempt], tmp_path: Path
) -> None:
    lines = yes_or_no(60, 2, 58)
    attempt = make(lines)
    folder = tmp_path / "evaluated"
    items = [{"id": f"i{n}", "category": "c", "candidate": 0.0, "champion": 1.0} for n in range(120)]
    (folder / "suite-1.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    answers = [{"id": line["id"], "score": 1.0} for line in lines]
    (folder / "former-2.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers), encoding="utf-8")
    noise = NoiseFloor(records=120, changed=3, points=0.4)
    write_evaluation(
        tmp_path, lines, noise=noise,
        suites=(SuiteScores(name="builtin", records=120, candidate=0, champion=100, file="suite-1.jsonl"),),
        former=(FormerScores(generation=2, model_id="m", records=120, score=100, file="former-2.jsonl"),),
    )  # fmt: skip
    said = ["win"] * 10 + ["loss"] * 60 + ["tie"] * 50
    verdict = decide(with_judgement(attempt, dict(zip((line["id"] for line in lines), said, strict=True))))
    assert verdict.outcome == "guard_failed"
    assert set(verdict.reasons) == {"general_lost", "former_better", "judge_prefers_champion"}
    assert verdict.noise == noise


def test_a_shortfall_ends_the_run_before_training_and_says_how_many_rows_are_needed(
    make: Callable[..., Attempt], tmp_path: Path
) -> None:
    short = Shortfall(heldout_rows=36, needed_heldout_rows=100, needed_rows=430)
    verdict = decide(make(None, shortfall=short))
    assert verdict.outcome == "insufficient_evidence"
    assert verdict.reasons == ("too_few_records",)
    assert verdict.champion_generation == 3
    assert verdict.sentence == "insufficient evidence: 36 held-out records, and a verdict needs 100"
    story = story_of(tmp_path, verdict)
    assert "There are 36 held-out records, and a verdict needs 100. Nothing was trained." in story
    assert "Drop about 430 more rows of the same kind." in story


def test_a_model_that_there_is_nothing_to_ask_has_its_verdict_without_being_evaluated(
    make: Callable[..., Attempt], tmp_path: Path
) -> None:
    short = Shortfall(heldout_rows=0, needed_heldout_rows=100, needed_rows=100)
    attempt = make(None, GateConfig(on="pinned", approval="manual"), shortfall=short)
    model = Model(
        folder="models/new", model_id="new", base_model_id="base", dtype="float32", size_bytes=1, logits_difference=0,
        logits_tolerance=1, format="chat", seconds=1,
    )  # fmt: skip
    durable.write_json(tmp_path / "merge.json", model.model_dump())
    spec = attempt.spec.model_copy(update={"inputs": {**attempt.spec.inputs, "merge": "merge.json"}})
    verdict = decide(Attempt(spec))
    assert (verdict.outcome, verdict.candidate_model_id) == ("insufficient_evidence", "new")
    assert verdict.sentence == "insufficient evidence: no held-out set was dropped"
    page = (tmp_path / str(verdict.report) / "report.html").read_text(encoding="utf-8")
    assert "Nothing was asked." in page


def test_a_shortfall_says_what_is_left_out_since_the_champion_was_trained_on_it(
    make: Callable[..., Attempt], tmp_path: Path
) -> None:
    short = Shortfall(heldout_rows=36, needed_heldout_rows=100, needed_rows=430)
    verdict = decide(make(None, shortfall=short, seen_by_champion=25))
    assert "25 more are left out: the champion was trained on them or near copies." in story_of(tmp_path, verdict)


def test_a_short_pinned_set_asks_for_rows_in_its_own_folder(make: Callable[..., Attempt], tmp_path: Path) -> None:
    short = Shortfall(heldout_rows=36, needed_heldout_rows=100, needed_rows=64)
    verdict = decide(make(None, shortfall=short, heldout_pinned=True))
    assert "into the track's folder heldout. 64 more are needed." in story_of(tmp_path, verdict)


def test_the_gate_on_pinned_wants_a_pinned_set_before_and_after_training(make: Callable[..., Attempt]) -> None:
    verdict = decide(make(yes_or_no(100, 2, 18), GateConfig(on="pinned")))
    assert (verdict.outcome, verdict.reasons) == ("insufficient_evidence", ("no_pinned_heldout",))


def test_the_gate_on_pinned_says_so_before_training(make: Callable[..., Attempt], tmp_path: Path) -> None:
    short = Shortfall(heldout_rows=150, needed_heldout_rows=100, needed_rows=0)
    verdict = decide(make(None, GateConfig(on="pinned"), shortfall=short))
    assert verdict.reasons == ("no_pinned_heldout",)
    assert "Drop a file of records into the track's folder heldout." in story_of(tmp_path, verdict)


def test_the_gate_on_pinned_judges_where_there_is_a_pinned_set(make: Callable[..., Attempt]) -> None:
    lines = [{**line, "pinned": True} for line in yes_or_no(100, 2, 18)]
    assert decide(make(lines, GateConfig(on="pinned"), heldout_pinned=True)).outcome == "promoted"


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


def test_a_report_that_lost_a_record_is_refused(make: Callable[..., Attempt], tmp_path: Path) -> None:
    attempt = make(yes_or_no(100, 2, 18))
    path = tmp_path / "evaluated/records.jsonl"
    path.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[1:]), encoding="utf-8")
    with pytest.raises(StepFailed, match="120 records and its file holds 119"):
        decide(attempt)
