"""Each guard lets a good candidate pass, fails the one that it is there for, and is quiet where it was told to be."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.artifacts import GuardResult, Judgement, Verdict
from pipeline.config import GateConfig, GuardConfig, MetricName
from pipeline.gate import statistics
from pipeline.gate.comparison import Comparison, Former, Opinion, Suite, compare
from pipeline.gate.guards import check, watched
from pipeline.gate.reasons import GUARD_REASONS, REASONS
from pipeline.gate.slices import LEAST_TESTED, Known, find_slices
from pipeline.gate.statistics import Floats
from pipeline.gate.verdict import Rules, judge, weigh
from pipeline.metrics.registry import METRICS
from pipeline.report.story import guard_words as card_words
from tests.records_made import lines_of, story_text, yes_or_no

Lines = list[dict[str, Any]]
#: Wins the gate's test by far, with nothing against it.
GOOD = (40, 4, 156)


def good() -> Lines:
    """Return 200 records of which a candidate wins 40 and loses 4, spread evenly."""
    lines = yes_or_no(*GOOD)
    order = np.random.default_rng(1).permutation(len(lines))
    for place, line in zip(order.tolist(), lines, strict=True):
        line["id"] = f"{place:06x}"
    return sorted(lines, key=lambda line: str(line["id"]))


def verdict_on(found: Lines | Comparison, known: frozenset[int] | None = None, **guards: Any) -> Verdict:
    comparison = found if isinstance(found, Comparison) else compare("exact_match", found)
    return judge(comparison, Rules(guards=GuardConfig(**guards), known=Known(known)))


def row_of(verdict: Verdict, guard: str, label: str = "") -> GuardResult:
    (row,) = [row for row in verdict.guards if row.guard == guard and label in row.label]
    return row


def of_good(**more: Any) -> Comparison:
    return replace(compare("exact_match", good()), **more)


def test_a_good_candidate_passes_every_guard_and_each_is_a_row_with_its_numbers() -> None:
    found = of_good(
        suites=(Suite("general", np.tile([0.6, 0.6], (120, 1)), np.full(120, 0.6)),),
        held_to_base=True,
        former=(Former(2, np.arange(150), np.zeros(150)),),
        seconds_per_answer=(0.4, 0.4),
        size_bytes=(2_000_000, 2_000_000),
        opinion=opinion(40, 20),
    )
    verdict = verdict_on(found, floors={"exact_match": 10})
    assert (verdict.outcome, verdict.reasons) == ("promoted", ())
    guards = {row.guard: row.state for row in verdict.guards}
    assert guards == dict.fromkeys(
        ("general", "general_base", "former", "floor", "nll", "empty", "truncated", "looping", "latency", "size",
         "judge"), "passed",
    )  # fmt: skip


def another_metric(lost: float, spread: float, records: int = 200) -> Lines:
    lines = good()[:records] if records < 200 else good()
    noise = np.random.default_rng(2).normal(0, spread, len(lines))
    for line, change in zip(lines, noise - noise.mean() - lost, strict=True):
        line["candidate"]["scores"]["rougeL"] = 0.5 + change
        line["champion"]["scores"]["rougeL"] = 0.5
    return lines


@pytest.mark.parametrize(
    ("lost", "spread", "state"),
    [
        (0.0, 0.2, "passed"),
        (0.015, 0.05, "failed"),  # within the margin of 2 points, and shown
        (0.015, 0.3, "passed"),  # within it, and nothing is shown
        (0.03, 0.6, "failed"),  # not shown, and beyond it
    ],
)
def test_another_metric_fails_on_harm_that_is_shown_or_beyond_its_margin(
    lost: float, spread: float, state: str
) -> None:
    verdict = verdict_on(another_metric(lost, spread))
    row = row_of(verdict, "metric")
    assert (row.label, row.state, row.margin, row.records) == ("ROUGE-L", state, 2.0, 200)
    assert row.change == pytest.approx(-100 * lost)
    assert (verdict.outcome == "promoted") == (state == "passed")
    if state == "failed":
        assert (verdict.outcome, verdict.reasons) == ("guard_failed", ("metric_lost",))
        assert verdict.sentence.startswith("guard failed (ROUGE-L): +")
        said = story_text(verdict)
        assert f"What it loses: ROUGE-L −{100 * lost:.1f} points (the limit is 2.0 points)." in said
        assert "guards.metrics is the margin" in said


def test_the_tests_of_one_kind_share_their_level() -> None:
    alone = another_metric(0.015, 0.115)
    raw = stats.ttest_1samp(
        [line["candidate"]["scores"]["rougeL"] - 0.5 for line in alone], 0, alternative="less"
    ).pvalue
    assert 0.025 < raw < 0.05
    assert row_of(verdict_on(alone), "metric").state == "failed"
    with_another = another_metric(0.015, 0.115)
    for line in with_another:
        for role in ("candidate", "champion"):
            line[role]["scores"]["token_f1"] = 0.5
    both = verdict_on(with_another)
    row = row_of(both, "metric", "ROUGE-L")
    assert row.state == "passed"
    assert row.p_value == pytest.approx(2 * raw)


def with_drops(lost: int, size: int) -> Lines:
    """Return records of drop 1 that are won, and `size` of drop 2 of which `lost` are."""
    lines = [*yes_or_no(60, 2, 138), *yes_or_no(0, lost, size - lost)]
    for place, line in enumerate(lines):
        line["id"], line["drop"] = f"{place:06x}", 1 if place < 200 else 2
    return lines


@pytest.mark.parametrize(
    ("lost", "size", "state"),
    [
        (4, 120, "passed"),
        (6, 120, "failed"),  # shown, at the margin of 5 points: p = 1 / 64, twice that by Holm
        (5, 90, "passed"),  # p = 1 / 32, over two slices 1 / 16, and too few for the margin
        (6, 90, "failed"),  # shown on fewer than 100
        (29, 29, "shown"),  # all lost, on fewer than are tested
    ],
)
def test_a_slice_fails_where_its_loss_is_shown(lost: int, size: int, state: str) -> None:
    verdict = verdict_on(with_drops(lost, size))
    row = row_of(verdict, "slice", "drop 2")
    assert (row.state, row.records) == (state, size)
    assert row_of(verdict, "slice", "drop 1").state == "passed"
    assert verdict.outcome == ("guard_failed" if state == "failed" else "promoted")
    if state == "failed":
        assert f"What it loses: drop 2 −{100 * lost / size:.1f} points" in story_text(verdict)


def test_a_loss_beyond_the_margin_counts_from_a_hundred_records_on() -> None:
    def lose_and_win(size: int) -> Lines:
        lines = [*yes_or_no(60, 2, 138), *yes_or_no(20, 27, size - 47)]
        for place, line in enumerate(lines):
            line["id"], line["drop"] = f"{place:06x}", 1 if place < 200 else 2
        return lines

    small, large = verdict_on(lose_and_win(99)), verdict_on(lose_and_win(100))
    assert row_of(small, "slice", "drop 2").state == "passed"
    row = row_of(large, "slice", "drop 2")
    assert row.state == "failed"
    assert row.p_value is not None
    assert row.p_value > 0.05
    assert verdict_on(lose_and_win(100), slices=7.0).outcome == "promoted"


def test_a_tag_is_a_slice_too() -> None:
    lines = with_drops(8, 60)
    for line in lines:
        line["tags"] = ["category:maths"] if line["drop"] == 2 else []
        line["drop"] = 1
    verdict = verdict_on(lines)
    row = row_of(verdict, "slice")
    assert (row.label, row.state) == ("tag category:maths", "failed")
    (shown,) = [row for row in verdict.slices if row.kind == "tag"]
    assert shown.records == 60
    assert shown.gain == pytest.approx(-100 * 8 / 60)
    assert shown.interval is not None
    assert shown.interval[0] < shown.gain < shown.interval[1]


def nll(rise: float) -> Lines:
    lines = good()
    random = np.random.default_rng(3)
    for line in lines:
        line["champion"].update(nll_sum=8.0, nll_tokens=8)
        line["candidate"].update(nll_sum=8 * (1 + rise) + float(random.normal(0, 0.1)), nll_tokens=8)
    return lines


@pytest.mark.parametrize(("rise", "state"), [(0.09, "passed"), (0.12, "failed")])
def test_the_likelihood_may_fall_within_its_margin_however_surely(rise: float, state: str) -> None:
    verdict = verdict_on(nll(rise))
    row = row_of(verdict, "nll")
    assert (row.state, row.unit, row.margin) == (state, "nats", 0.1)
    assert row.change == pytest.approx(rise, abs=0.005)
    assert row.bound is not None
    assert row.p_value is not None
    assert rise - 0.01 < row.bound < rise
    assert row.p_value < 1e-9
    assert verdict.outcome == ("promoted" if state == "passed" else "guard_failed")
    if state == "failed":
        assert verdict.reasons == ("nll_rose",)
        assert "nats (the limit is 0.10 nats)" in story_text(verdict)


def test_the_likelihood_is_weighted_by_tokens() -> None:
    lines = good()
    lines[0]["candidate"].update(nll_sum=4000.0, nll_tokens=2000)
    lines[0]["champion"].update(nll_sum=2000.0, nll_tokens=2000)
    row = row_of(verdict_on(lines), "nll")
    tokens = 2000 + 199 * 4
    assert row.change == pytest.approx(2000 / tokens)


@pytest.mark.parametrize("kind", ["empty", "truncated", "looping"])
@pytest.mark.parametrize(("more", "state"), [(4, "passed"), (5, "failed")])
def test_degenerate_answers_may_grow_within_their_margin(kind: str, more: int, state: str) -> None:
    lines = good()
    for line in lines[:more]:
        line["candidate"]["degenerate"] = [kind]
    verdict = verdict_on(lines)
    row = row_of(verdict, kind)
    assert (row.state, row.candidate, row.champion) == (state, 100 * more / 200, 0.0)
    if state == "failed":
        assert (verdict.outcome, verdict.reasons) == ("guard_failed", (f"{kind}_rose",))
        assert f"{kind} answers +2.5 per cent (the limit is 2.0 per cent)" in story_text(verdict)


@pytest.mark.parametrize("kind", ["empty", "truncated", "looping"])
def test_half_the_answers_degenerate_is_a_loss_and_the_guard_says_of_which_kind(kind: str) -> None:
    lines = yes_or_no(0, 60, 60)
    for line in lines[:60]:
        line["candidate"]["degenerate"] = [kind]
    verdict = verdict_on(lines)
    assert verdict.outcome == "worse"
    assert {"harm_shown", f"{kind}_rose"} <= set(verdict.reasons)
    assert [row.guard for row in verdict.guards if row.state == "failed" and row.guard != "slice"] == [kind]


@pytest.mark.parametrize(("lost", "state"), [(0, "passed"), (5, "passed"), (12, "failed")])
def test_forgetting_fails_a_candidate_that_wins_its_own_task(lost: int, state: str) -> None:
    scores = np.ones((150, 2))
    scores[:lost, 0] = 0
    scores[lost : lost + 1, 1] = 0
    verdict = verdict_on(of_good(suites=(Suite("builtin", scores),)))
    row = row_of(verdict, "general")
    assert (row.label, row.state, row.records) == ("builtin", state, 150)
    if state == "failed":
        assert (verdict.outcome, verdict.reasons) == ("guard_failed", ("general_lost",))
        assert "What it loses: builtin −7.3 points" in story_text(verdict)


def against_base(lost: int, items: int = 120, champion_lost: int | None = None) -> Comparison:
    """Return a candidate that wins and lost so many of the items that the base model knows, the champion one less."""
    scores = np.ones((items, 2))
    scores[:lost, 0] = 0
    scores[: lost - 1 if champion_lost is None else champion_lost, 1] = 0
    return of_good(suites=(Suite("builtin", scores, np.ones(items)),), held_to_base=True)


@pytest.mark.parametrize(
    ("lost", "items", "state"),
    [
        (12, 120, "passed"),  # 10 points, at the margin: however surely they are lost
        (13, 120, "failed"),
        (9, 60, "failed"),  # 15 points of fewer items, and shown
        (4, 35, "passed"),  # 11.4 points, and p = 1 / 16
        (29, 29, "shown"),
    ],
)
def test_a_suite_may_lose_little_against_the_base_model(lost: int, items: int, state: str) -> None:
    verdict = verdict_on(against_base(lost, items))
    row = row_of(verdict, "general_base")
    assert (row.label, row.state, row.records) == ("builtin against the base model", state, items)
    assert (row.champion, row.margin) == (100, 10)
    assert (row.candidate, row.change) == pytest.approx((100 * (1 - lost / items), -100 * lost / items))
    assert row_of(verdict, "general").change == pytest.approx(-100 / items)
    assert (verdict.outcome == "promoted") == (state != "failed")
    if state == "failed":
        assert verdict.reasons == ("general_below_base",)
        said = story_text(verdict)
        assert f"builtin against the base model −{100 * lost / items:.1f} points" in said
        assert "dropforge rollback --reason TEXT" in said
        assert "guards.general_base" in said
        assert "dropforge rollback --track jokes --reason TEXT" in story_text(verdict, "jokes")
        assert verdict_on(against_base(lost, items), general_base=50).outcome == "promoted"


def test_answers_that_are_scored_by_degrees_are_held_against_the_base_model_too() -> None:
    def fallen(by: float, below: float = 0.001) -> Comparison:
        scores = np.full((40, 2), 0.8)
        scores[:, 0] = 0.8 - by + np.tile([0.01, -0.01], 20)
        scores[:, 1] = scores[:, 0] + below
        return of_good(suites=(Suite("mine", scores, np.full(40, 0.8)),))

    assert row_of(verdict_on(fallen(0.09)), "general_base").state == "passed"
    assert row_of(verdict_on(fallen(0.11)), "general_base").state == "failed"
    # The same points, added up in another order.
    assert row_of(verdict_on(fallen(0.11, below=1e-13)), "general_base").state == "passed"


def test_a_base_model_that_was_not_measured_is_said_and_one_that_serves_is_left_out() -> None:
    suite = Suite("builtin", np.tile([0.6, 0.6], (120, 1)))
    row = row_of(verdict_on(of_good(suites=(suite,), held_to_base=True)), "general_base")
    assert (row.label, row.state) == ("builtin against the base model, which was not measured", "shown")
    assert row.candidate == pytest.approx(60)
    assert (row.champion, row.change, row.margin) == (None, None, 10)
    assert {row.guard for row in verdict_on(of_good(suites=(suite,))).guards} & {"general", "general_base"} == {
        "general"
    }


def one_night(candidate: Floats, champion: Floats, base: Floats) -> Verdict:
    """Return the verdict on a candidate that wins its own task, whatever it knows of the suite."""
    suite = Suite("builtin", np.column_stack((candidate, champion)), base)
    return verdict_on(of_good(suites=(suite,), held_to_base=champion is not base))


def test_a_line_of_champions_cannot_walk_away_from_the_base_model() -> None:
    """Each night gains 14 points on the task and loses 4 of 120 items: too few for a guard against the champion."""
    base = champion = np.ones(120)
    outcomes = []
    for _ in range(12):
        candidate = champion.copy()
        candidate[np.flatnonzero(champion)[:4]] = 0
        verdict = one_night(candidate, champion, base)
        assert row_of(verdict, "general").state == "passed"
        outcomes.append((verdict.outcome, verdict.reasons))
        if verdict.outcome == "promoted":
            champion = candidate
    assert outcomes == [("promoted", ())] * 3 + [("guard_failed", ("general_below_base",))] * 9
    assert champion.mean() == pytest.approx(0.9)


@pytest.mark.parametrize("start", [0, 12, 30])
def test_no_line_of_candidates_ends_below_the_margin_or_below_where_it_stood_beyond_it(start: int) -> None:
    """Candidates that lose some items by luck and find others again, and mostly lose, from anywhere."""
    random = np.random.default_rng(start)
    base = np.ones(120)
    champion = base.copy()
    champion[:start] = 0
    lowest, promoted = min(champion.sum(), 108), 0
    for _ in range(30):
        candidate = champion.copy()
        candidate[random.choice(np.flatnonzero(champion), int(random.integers(0, 5)), replace=False)] = 0
        lost = np.flatnonzero(candidate == 0)
        candidate[random.choice(lost, min(lost.size, int(random.integers(0, 4))), replace=False)] = 1
        if one_night(candidate, champion, base).outcome == "promoted":
            champion, promoted = candidate, promoted + 1
        assert champion.sum() >= lowest
        lowest = min(108, max(lowest, champion.sum()))
    assert promoted > 2


@pytest.mark.parametrize(("lost", "state"), [(29, "passed"), (30, "passed"), (31, "failed")])
def test_a_champion_that_is_far_below_the_base_model_gives_way_to_who_loses_no_more(lost: int, state: str) -> None:
    verdict = verdict_on(against_base(lost, champion_lost=30))
    row = row_of(verdict, "general_base", "builtin against the base model")
    assert row.state == state
    assert row.change == pytest.approx(-100 * lost / 120)
    assert ("no further below it than the champion" in row.label) == (state == "passed")
    assert (verdict.outcome, verdict.reasons) == (
        ("promoted", ()) if state == "passed" else ("guard_failed", ("general_below_base",))
    )


def test_other_items_than_the_champions_are_no_further_step_down() -> None:
    scores = np.ones((120, 2))
    scores[:30, 1] = scores[10:40, 0] = 0
    suite = Suite("builtin", scores, np.ones(120))
    assert row_of(verdict_on(of_good(suites=(suite,), held_to_base=True)), "general_base").state == "passed"


@pytest.mark.parametrize(("lost", "reasons"), [(60, ()), (61, ("general_below_base",))])
def test_a_candidate_that_does_not_win_is_no_worse_for_a_champion_that_is_far_from_the_base_already(
    lost: int, reasons: tuple[str, ...]
) -> None:
    far = against_base(lost, champion_lost=60)
    even = replace(compare("exact_match", yes_or_no(5, 4, 111)), suites=far.suites, held_to_base=True)
    verdict = verdict_on(even)
    assert verdict.outcome == "not_shown_better"
    assert verdict.reasons == (*reasons, "p_above_limit", "gain_below_minimum")


def test_the_smallest_gain_knows_what_the_champion_has_left_of_the_margin_against_the_base_model() -> None:
    def suites(lost: int, items: int = 120, other: int = 4) -> tuple[Suite, ...]:
        """Return a suite of which both models lost so many items, and so many `other` ones each."""
        scores = np.ones((items, 2))
        scores[:lost, 1] = scores[other : lost + other, 0] = 0
        return (Suite("builtin", scores, np.ones(items)),)

    def noisy(lost: int, items: int = 120, other: int = 4) -> Verdict:
        return verdict_on(of_good(suites=suites(lost, items, other)))

    found = [noisy(lost) for lost in (4, 8, 11, 12, 40)]
    gains = [verdict.smallest_detectable_gain or 100 for verdict in found]
    assert [verdict.detectable_power for verdict in found] == [0.8, 0.8, 0.6, 0.5, 0.5]
    assert gains[0] < gains[1], "less and less is left"
    assert gains[3] == gains[4], "nothing is left: what falls below the champion fails, which is every second one"
    assert noisy(40, other=0).detectable_power == 0.8, "nothing is left, and nothing changes"
    even = verdict_on(replace(compare("exact_match", yes_or_no(10, 4, 186)), suites=suites(11)))
    assert "most of all those against the base model" in story_text(even)
    few = noisy(8, LEAST_TESTED - 1)
    assert (row_of(few, "general_base").state, few.detectable_power) == ("shown", 0.8)


def test_a_small_suite_of_ones_own_is_displayed_only() -> None:
    scores = np.tile([0.0, 1.0], (LEAST_TESTED - 1, 1))
    verdict = verdict_on(of_good(suites=(Suite("mine", scores),)))
    assert row_of(verdict, "general").state == "shown"
    assert verdict.outcome == "promoted"


def test_the_best_former_champion_is_the_one_that_stands() -> None:
    won = compare("exact_match", good()).scores["exact_match"][:, 0]
    worse, better = won.copy(), won.copy()
    worse[np.flatnonzero(won)[:20]] = 0
    better[np.flatnonzero(won == 0)] = 1
    formers = (Former(1, np.arange(200), worse), Former(2, np.arange(200), better))
    assert verdict_on(of_good(former=formers[:1])).outcome == "promoted"
    verdict = verdict_on(of_good(former=formers))
    row = row_of(verdict, "former")
    assert (row.label, row.state) == ("champion of generation 2", "failed")
    assert verdict.reasons == ("former_better",)
    assert "What it falls behind: champion of generation 2 −2.0 points" in story_text(verdict)
    assert verdict_on(of_good(former=formers), former=3.0).outcome == "promoted"


def test_a_former_champion_is_compared_on_the_records_that_it_answered() -> None:
    own = compare("exact_match", good()).scores["exact_match"][:, 0]
    places = np.flatnonzero(own)[:60]
    row = row_of(verdict_on(of_good(former=(Former(4, places, np.ones(60)),))), "former")
    assert (row.records, row.change, row.state) == (60, 0.0, "passed")


def continuous(lost: int, gained: int) -> Lines:
    random = np.random.default_rng(4)
    champion = np.full(300, 0.5)
    candidate = champion + 0.06 + random.normal(0, 0.05, 300)
    champion[:lost], candidate[:lost] = 0.9, 0.1
    champion[lost : lost + gained], candidate[lost : lost + gained] = 0.1, 0.9
    return lines_of(candidate, champion, "rougeL")


@pytest.mark.parametrize(
    ("lost", "gained", "state"), [(0, 0, "passed"), (5, 1, "passed"), (7, 1, "failed"), (7, 4, "passed")]
)
def test_catastrophes_are_no_price_for_many_small_gains(lost: int, gained: int, state: str) -> None:
    verdict = judge(compare("rougeL", continuous(lost, gained)), Rules())
    row = row_of(verdict, "catastrophe")
    assert (row.candidate, row.champion, row.state) == (lost, gained, state)
    assert verdict.outcome == ("promoted" if state == "passed" else "guard_failed")
    if state == "failed":
        assert verdict.reasons == ("catastrophes",)
        assert f"What it loses: {row.label} −{lost - gained} records." in story_text(verdict)


@pytest.mark.parametrize(("records", "state"), [(LEAST_TESTED - 1, "shown"), (LEAST_TESTED, "failed")])
def test_catastrophes_among_few_records_are_displayed_only(records: int, state: str) -> None:
    verdict = judge(compare("rougeL", continuous(7, 0)[:records]), Rules())
    assert row_of(verdict, "catastrophe").state == state


@pytest.mark.parametrize(("floor", "state"), [(90.0, "passed"), (99.0, "failed")])
def test_a_score_below_its_floor_is_not_promoted(floor: float, state: str) -> None:
    verdict = verdict_on(good(), floors={"exact_match": floor})
    assert row_of(verdict, "floor").state == state
    assert (verdict.reasons == ("below_floor",)) == (state == "failed")
    if state == "failed":
        assert "What is not reached: exact match, at least 99: 98.0 points." in story_text(verdict)


def test_a_floor_for_a_metric_that_nothing_was_scored_by_fails_and_says_so() -> None:
    verdict = verdict_on(good(), floors={"json_valid": 99})
    row = row_of(verdict, "floor")
    assert (row.state, row.records, row.candidate, row.change) == ("failed", 0, None, None)
    assert (verdict.outcome, verdict.reasons) == ("guard_failed", ("below_floor",))
    assert "Take the floor out, or drop rows that it can be scored by (guards.floors)" in story_text(verdict)
    assert card_words(row) == "valid JSON, at least 99: scored on none of these records"
    assert verdict_on(good(), floors={"json_valid": 99}, show_only=("floor",)).outcome == "promoted"


def test_a_floor_without_any_record_to_judge_on_is_no_reason_of_its_own() -> None:
    verdict = verdict_on([], floors={"exact_match": 10})
    assert (verdict.reasons[0], row_of(verdict, "floor").state) == ("too_few_records", "shown")
    assert "below_floor" not in verdict.reasons


def partly_json(invalid: int, size: int, worse: int = 0) -> Lines:
    """Return records that a candidate wins, JSON asked of `size`; it fails on `invalid`, the champion on `worse`."""
    lines = good()
    for place, line in enumerate(lines[:size]):
        line["candidate"]["scores"]["json_valid"] = float(place >= invalid)
        line["champion"]["scores"]["json_valid"] = float(place >= worse)
    return lines


@pytest.mark.parametrize(
    ("invalid", "size", "state"),
    [
        (0, 199, "passed"),
        (9, 199, "passed"),
        (10, 199, "failed"),
        (199, 199, "failed"),
        (LEAST_TESTED, LEAST_TESTED, "failed"),
        (1, 1, "shown"),
        (LEAST_TESTED - 1, LEAST_TESTED - 1, "shown"),
    ],
)
def test_a_floor_is_held_against_the_records_that_its_metric_says_something_about(
    invalid: int, size: int, state: str
) -> None:
    verdict = verdict_on(partly_json(invalid, size, invalid), floors={"json_valid": 95})
    row = row_of(verdict, "floor")
    assert (row.state, row.records) == (state, size)
    assert row.candidate == pytest.approx(100 * (size - invalid) / size)
    assert (verdict.outcome == "promoted") == (state != "failed")
    few = ", on too few records to decide" if state == "shown" else ""
    assert row.label == f"valid JSON, at least 95{few}"


def test_a_floor_of_a_metric_of_every_record_is_held_on_as_few_as_a_verdict_needs() -> None:
    rules = Rules(gate=GateConfig(min_records=20), guards=GuardConfig(floors={"exact_match": 90}))
    verdict = judge(compare("exact_match", yes_or_no(14, 0, 0) + lines_of([0] * 6, [0] * 6)), rules)
    assert (verdict.outcome, verdict.reasons) == ("guard_failed", ("below_floor",))
    assert row_of(verdict, "floor").label == "exact match, at least 90"


def test_a_metric_of_some_records_is_guarded_on_them() -> None:
    verdict = verdict_on(partly_json(6, 60))
    row = row_of(verdict, "metric")
    assert (row.label, row.state, row.records) == ("valid JSON", "failed", 60)
    assert row.change == pytest.approx(-10)
    assert "valid JSON −10.0 points" in story_text(verdict)
    assert row_of(verdict_on(partly_json(0, 60)), "metric").state == "passed"
    assert row_of(verdict_on(partly_json(20, LEAST_TESTED - 1)), "metric").state == "shown"


def test_a_metric_of_some_records_is_no_metric_where_none_of_those_is_judged() -> None:
    lines = partly_json(40, 40)
    for place, line in enumerate(lines):
        line["drop"] = 1 if place < 60 else 2
    rules = Rules(
        gate=GateConfig(on="seen"), known=Known(frozenset({2})),
        guards=GuardConfig(floors={"json_valid": 95}),
    )  # fmt: skip
    verdict = judge(compare("exact_match", lines), rules)
    assert verdict.records == 140
    assert {row.guard for row in verdict.guards if row.label.startswith("valid JSON")} == {"floor"}
    assert (row_of(verdict, "floor").state, row_of(verdict, "floor").records) == ("failed", 0)


def test_the_smallest_gain_counts_a_guard_on_some_records() -> None:
    noisy = partly_json(0, 120)
    for place, line in enumerate(noisy[:120]):
        line["candidate"]["scores"]["json_valid"] = float(place % 4 > 0)
        line["champion"]["scores"]["json_valid"] = float(place % 4 < 3)
    with_guard, without = verdict_on(noisy), verdict_on(noisy, show_only=("metric",))
    assert without.smallest_detectable_gain is not None
    assert with_guard.detectable_power != without.detectable_power


def test_a_metric_of_some_records_moves_with_the_gain_on_these_records() -> None:
    random = np.random.default_rng(0)
    gains, own = random.normal(0, 0.01, 300), random.normal(0, 0.005, 60)
    # On these the primary metric gains much; the other one only moves with what is more or less than that.
    gains[:60] += 0.4
    own += 2 * (gains[:60] - 0.4)
    lines = lines_of(0.5 + gains, np.full(300, 0.5), "rougeL")
    for line, change in zip(lines, own + 0.3, strict=False):
        line["candidate"]["scores"]["json_f1"], line["champion"]["scores"]["json_f1"] = 0.5 + change, 0.5
    expected = np.polyfit(gains[:60], own, 1)[0]
    assert expected == pytest.approx(2, rel=0.1)
    (found,) = [one for one in watched(compare("rougeL", lines), (), GuardConfig()) if one.family == "metric"]
    assert found.slope == pytest.approx(expected)


def test_the_sign_flips_of_a_guard_grow_with_its_tests_and_not_with_their_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flips: list[int] = []
    tilted, fair = statistics.tilted_sign_flip, statistics.sign_flip

    def count_tilted(values: Any, seed: int, level: float, permutations: int = statistics.PERMUTATIONS) -> float:
        flips.append(permutations)
        return tilted(values, seed, level, permutations)

    def count_fair(values: Any, seed: int, permutations: int = statistics.PERMUTATIONS) -> float:
        flips.append(permutations)
        return fair(values, seed, permutations)

    monkeypatch.setattr(statistics, "tilted_sign_flip", count_tilted)
    monkeypatch.setattr(statistics, "sign_flip", count_fair)
    lines = lines_of(0.4 + np.random.default_rng(1).normal(0, 0.2, 400), np.full(400, 0.5), "rougeL")
    for place, line in enumerate(lines):
        line["tags"] = [f"tag {number}" for number in range(60) if (place + number) % 4 == 0]
    found = compare("rougeL", lines)
    checked = check(found, find_slices(found, Known()), GuardConfig(), seed=1)
    assert len(flips) == 60, "each is tested"
    assert sum(flips) <= 60 * statistics.PERMUTATIONS
    tags = [row for row in checked.rows if row.guard == "slice"]
    assert {row.state for row in tags} == {"failed"}
    # What `worse` asks for is told, though all sixty share it.
    assert min(row.p_value or 1.0 for row in tags) < 1e-4


def test_a_floor_can_be_set_for_every_metric_and_for_nothing_else() -> None:
    assert set(get_args(MetricName)) == set(METRICS)


@pytest.mark.parametrize(
    ("seconds", "state"),
    [((2.9, 1.0), "passed"), ((3.1, 1.0), "failed"), ((0.05, 0.01), "passed"), ((0.61, 0.1), "failed")],
)
def test_a_slower_model_fails_if_anybody_would_notice(seconds: tuple[float, float], state: str) -> None:
    verdict = verdict_on(of_good(seconds_per_answer=seconds))
    row = row_of(verdict, "latency")
    assert (row.state, row.unit) == (state, "times")
    assert row.change == pytest.approx(seconds[0] / seconds[1])
    assert (verdict.reasons == ("slower",)) == (state == "failed")


@pytest.mark.parametrize(("size", "state"), [(1_400_000, "passed"), (1_600_000, "failed")])
def test_a_larger_model_fails_beyond_its_multiple(size: int, state: str) -> None:
    verdict = verdict_on(of_good(size_bytes=(size, 1_000_000)))
    assert row_of(verdict, "size").state == state
    assert (verdict.reasons == ("larger",)) == (state == "failed")


def opinion(wins: int, losses: int) -> Opinion:
    said = ["win"] * wins + ["loss"] * losses
    names = compare("exact_match", good()).ids
    made = Judgement(
        folder="j", model="judge-7b", prompt_sha256="p", records=len(said), wins=wins, losses=losses, ties=0,
        inconsistent=0, failed=0,
    )  # fmt: skip
    return Opinion(made, dict(zip(names, said, strict=False)))


@pytest.mark.parametrize(
    ("wins", "losses", "state"),
    [(60, 10, "passed"), (30, 40, "passed"), (20, 40, "failed"), (0, 29, "shown"), (0, 30, "failed")],
)
def test_a_judge_can_only_stand_against_a_promotion(wins: int, losses: int, state: str) -> None:
    verdict = verdict_on(of_good(opinion=opinion(wins, losses)))
    row = row_of(verdict, "judge")
    assert (row.state, row.records) == (state, wins + losses)
    assert row.p_value == pytest.approx(stats.binomtest(losses, wins + losses, alternative="greater").pvalue)
    assert (verdict.reasons == ("judge_prefers_champion",)) == (state == "failed")
    assert card_words(row) == f"answers that judge-7b prefers: {wins} of the new model's, {losses} of the champion's"


def test_a_judge_counts_on_the_records_that_the_gate_judges_on_alone() -> None:
    found = of_good()
    # Of the pinned records it prefers the candidate's answers, of the others the champion's.
    pinned = np.arange(len(found.ids)) % 2 == 0
    said = dict(zip(found.ids, np.where(pinned, "win", "loss").tolist(), strict=True))
    found = replace(found, pinned=pinned, opinion=Opinion(opinion(0, 0).judgement, said))
    everywhere = judge(found, Rules())
    row = row_of(everywhere, "judge")
    assert (row.candidate, row.champion) == (pinned.sum(), (~pinned).sum())
    there = row_of(judge(found, Rules(gate=GateConfig(on="pinned"))), "judge")
    assert (there.candidate, there.champion, there.records) == (pinned.sum(), 0, pinned.sum())


def test_a_judge_never_makes_a_promotion() -> None:
    found = replace(compare("exact_match", yes_or_no(5, 4, 111)), opinion=opinion(100, 0))
    assert verdict_on(found).outcome == "not_shown_better"


@pytest.mark.parametrize(
    ("guard", "found"),
    [
        ("metric", another_metric(0.03, 0.05)),
        ("slice", with_drops(30, 120)),
        ("nll", nll(0.5)),
        ("general", of_good(suites=(Suite("builtin", np.tile([0.0, 1.0], (150, 1))),))),
        ("general_base", against_base(40)),
        ("former", of_good(former=(Former(1, np.arange(200), np.full(200, 1.5)),))),
        ("latency", of_good(seconds_per_answer=(9.0, 1.0))),
        ("size", of_good(size_bytes=(9, 1))),
        ("judge", of_good(opinion=opinion(0, 90))),
    ],
)
def test_a_guard_that_is_only_shown_cannot_fail(guard: str, found: Lines | Comparison) -> None:
    assert verdict_on(found).reasons == (GUARD_REASONS[guard],)
    verdict = verdict_on(found, show_only=(guard,))
    assert (verdict.outcome, verdict.reasons) == ("promoted", ())
    assert {row.state for row in verdict.guards if row.guard == guard} == {"shown"}


def test_a_candidate_that_does_not_win_has_failed_a_guard_only_if_the_harm_is_sure() -> None:
    def lost_suite(lost: int) -> Comparison:
        scores = np.ones((150, 2))
        scores[:lost, 0] = 0
        return replace(compare("exact_match", yes_or_no(5, 4, 111)), suites=(Suite("builtin", scores),))

    unsure, sure = verdict_on(lost_suite(8)), verdict_on(lost_suite(12))
    assert unsure.outcome == "not_shown_better"
    assert unsure.reasons == ("general_lost", "p_above_limit", "gain_below_minimum")
    assert "What it loses: builtin −5.3 points" in story_text(unsure)
    assert sure.outcome == "guard_failed"


@pytest.mark.parametrize("drops", [5, 12, 40])
def test_the_harm_that_one_drop_shows_is_sure_however_many_drops_there_are(drops: int) -> None:
    random = np.random.default_rng(0)
    champion = random.uniform(0.4, 0.6, 60 * drops)
    change = random.normal(0.4 / (drops - 1), 0.02, champion.size)
    change[:60] = -0.4
    lines = lines_of(champion + change, champion, "rougeL")
    for place, line in enumerate(lines):
        line["drop"] = 1 + place // 60
    verdict = judge(compare("rougeL", lines), Rules())
    lost = next(row for row in verdict.guards if row.label == "drop 1")
    assert lost.p_value is not None
    assert lost.p_value <= 0.001
    assert verdict.outcome == "guard_failed"


def test_every_guard_has_a_reason_and_every_reason_its_words() -> None:
    assert set(GUARD_REASONS.values()) <= set(REASONS)
    assert len(set(GUARD_REASONS.values())) == len(GUARD_REASONS)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_loss_that_grows_never_turns_a_failed_guard_into_one_that_passed(seed: int) -> None:
    random = np.random.default_rng(seed)
    size = int(random.integers(LEAST_TESTED, 160))
    lost = int(random.integers(0, size))
    found = [weigh(compare("exact_match", with_drops(more, size)), Rules()).guards for more in (lost, lost + 1)]
    states = [row.state for guards in found for row in guards.rows if row.label == "drop 2"]
    assert states != ["failed", "passed"]


def test_equal_slices_fail_a_winner_no_more_often_than_their_kind_is_allowed_to() -> None:
    random = np.random.default_rng(5)
    failed = 0
    for _ in range(400):
        lines = [*yes_or_no(60, 2, 138)]
        won = random.choice([1, 0, -1], 4 * 60, p=[0.1, 0.8, 0.1])
        lines += lines_of((won > 0) * 1.0, (won < 0) * 1.0)
        for place, line in enumerate(lines):
            line["id"], line["drop"] = f"{place:06x}", 1 if place < 200 else 2 + (place - 200) // 60
        found = compare("exact_match", lines)
        failed += bool(weigh(found, Rules()).guards.failed)
    assert stats.binomtest(failed, 400, 0.05, alternative="greater").pvalue > 0.001


def test_a_former_champion_that_answered_none_of_the_judged_records_has_no_word() -> None:
    lines = good()
    for place, line in enumerate(lines):
        line["drop"] = 1 if place < 150 else 2
    found = replace(compare("exact_match", lines), former=(Former(2, np.arange(150, 200), np.ones(50)),))
    verdict = judge(found, Rules(gate=GateConfig(on="seen"), known=Known(frozenset({1}))))
    assert (verdict.outcome, verdict.records) == ("promoted", 150)
    assert "former" not in {row.guard for row in verdict.guards}
    nothing = judge(found, Rules(gate=GateConfig(on="seen"), known=Known(frozenset({7}))))
    assert nothing.reasons[0] == "too_few_seen"
