"""The gate in both directions; scores are made, never measured, so each test says what is true of its candidate."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.artifacts import Verdict
from pipeline.config import GateConfig
from pipeline.decide.comparison import Comparison, Opinion, Suite, compare, pool
from pipeline.decide.explain import clauses, sentence
from pipeline.decide.slices import Known
from pipeline.decide.statistics import Floats
from pipeline.decide.verdict import Rules, decide_verdict, settle, weigh
from pipeline.metrics.degenerate import DEGENERATE
from pipeline.words import p_words
from tests.made_artifacts import judgement_of
from tests.records_made import in_drops, lines_of, paired, story_text, yes_or_no

Lines = list[dict[str, Any]]
RULES = Rules()


def judged(lines: Lines, rules: Rules = RULES, metric: str = "exact_match") -> Verdict:
    return decide_verdict(compare(metric, lines), rules)


def by(**gate: Any) -> Rules:
    return Rules(gate=GateConfig(**gate))


def test_a_better_candidate_is_promoted_and_the_sentence_says_why() -> None:
    candidate = [1] * 117 + [0] * 3
    champion = [0] * 116 + [1, 0, 0, 0]
    verdict = decide_verdict(paired(candidate, champion), RULES)
    assert verdict.outcome == "promoted"
    assert verdict.reasons == ()
    assert (verdict.wins, verdict.losses, verdict.ties) == (116, 0, 4)
    assert verdict.gain == pytest.approx(100 * 116 / 120)
    assert verdict.test == "mcnemar"
    assert verdict.interval is not None
    low, high = verdict.interval
    assert 88 < low < 100 * 116 / 120 < high <= 100
    assert sentence(clauses(verdict)) == f"promoted: +96.7 points (+{low:.1f} to +{high:.1f})"
    said = story_text(verdict)
    assert "The new model scored 97.5 of 100 points, the champion 0.8: a change of +96.7." in said
    assert "It did better on 116 of them, worse on 0, equally well on 4." in said
    assert "would look like this less than once in 10,000 times" in said


@pytest.mark.parametrize(
    ("p_value", "limit", "gain", "said"),
    [
        (0.0100000001, 0.01, 1 - 1e-8, ("p = 0.0100000001", "0.99999999 is below 1.")),
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
    verdict = judged(yes_or_no(23, 13, 164))
    assert verdict.outcome == "not_shown_better"
    assert verdict.reasons == ("p_above_limit",)
    assert verdict.smallest_detectable_gain is not None
    assert verdict.records_needed is not None
    assert 200 + verdict.records_needed == pytest.approx(200 * (verdict.smallest_detectable_gain / 5) ** 2, abs=1)
    said = story_text(verdict)
    assert f"about {verdict.records_needed:,} more held-out records would show this gain" in said
    smallest = f"{verdict.smallest_detectable_gain:.1f} points or more is promoted in 8 of 10 cases"
    assert f"With these records, a gain of {smallest}; the settings ask for 1.0." in said


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


def test_a_gain_that_is_shown_and_too_small_is_not_helped_by_more_records() -> None:
    verdict = decide_verdict(paired([1] * 1024 + [0] * 976, [1] * 1012 + [0] * 988), RULES)
    assert verdict.reasons == ("gain_below_minimum",)
    assert verdict.gain == pytest.approx(0.6)
    assert verdict.smallest_detectable_gain is not None
    assert verdict.records_needed is None
    assert "drop more or other data, or ask for less (gate.min_gain)" in story_text(verdict)


def test_the_settings_move_the_limits() -> None:
    lines = yes_or_no(20, 8, 171)
    assert judged(lines, by(p_value=0.05)).outcome == "promoted"
    assert judged(lines, by(p_value=0.05, min_gain=10)).outcome == "not_shown_better"
    assert judged(lines, by(p_value=0.05, min_records=1000)).outcome == "insufficient_evidence"


@pytest.mark.parametrize(("metric", "least"), [("exact_match", 100), ("token_f1", 200)])
def test_too_few_records_promote_nothing_however_clear_they_are(metric: str, least: int) -> None:
    noise = np.random.default_rng(2)

    def clear(records: int) -> Verdict:
        if metric == "exact_match":
            return judged(yes_or_no(records - 1, 1, 0))
        champion = noise.uniform(0, 0.2, records)
        return decide_verdict(paired(champion + 0.5 + noise.normal(0, 0.01, records), champion, metric), RULES)

    short = clear(least - 1)
    assert short.outcome == "insufficient_evidence"
    assert short.reasons == ("too_few_records",)
    assert short.records_needed == 1
    assert sentence(clauses(short)).endswith(f" held-out records, and a verdict needs {least}")
    assert "promoted" not in story_text(short), "on so few no gain is"
    assert short.smallest_detectable_gain is None
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
    assert sentence(clauses(verdict)) == "insufficient evidence: no held-out set was dropped"
    assert "Drop a file of records into the track's folder heldout." in story_text(verdict)


def test_a_candidate_that_was_trained_on_held_out_records_is_contaminated_however_good_it_looks() -> None:
    verdict = judged(yes_or_no(100, 0, 20), Rules(seen_by_candidate=3))
    assert verdict.outcome == "contaminated"
    assert verdict.reasons == ("trained_on_heldout",)
    # Such a run has succeeded: it cannot be retried.
    assert "dropforge retry" not in story_text(verdict)
    assert "drop a file of rows: the next run is prepared and trained anew" in story_text(verdict)


def test_a_set_that_can_show_no_gain_is_said_to_be_one() -> None:
    words = "With these records no gain, however large, is promoted in 8 of 10 cases."
    verdict = judged(yes_or_no(3, 1, 0), by(min_records=4))
    assert (verdict.smallest_detectable_gain, verdict.records_needed) == (None, None)
    assert words in story_text(verdict)
    won = judged(yes_or_no(100, 0, 20))
    assert won.smallest_detectable_gain is None, "it is not asked where something else was decided"
    assert words not in story_text(won)


# The verdict does not depend on any order.


@st.composite
def worlds(draw: st.DrawFn) -> Lines:
    """Records with two metrics, drops, tags, groups, likelihoods and bad answers; some candidates win, some lose."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, shift = draw(st.integers(120, 260)), draw(st.sampled_from([-0.1, 0.0, 0.06, 0.3]))
    champion = random.random(count)
    lines = lines_of(champion + random.normal(shift, 0.19, count), champion, "rougeL")
    for place, line in enumerate(lines):
        line["drop"] = int(random.integers(1, 5))
        line["group"] = f"{random.integers(0, place // 2 + 1)}"
        line["tags"] = [tag for tag in ("short", "long") if random.random() < 0.4]
        for role in ("candidate", "champion"):
            line[role]["scores"]["token_f1"] = float(random.random())
            line[role]["nll_sum"] = float(random.gamma(4))
            line[role]["degenerate"] = ["empty"] if random.random() < 0.02 else []
    return lines


SMALL = GateConfig(min_records=20)


@settings(max_examples=8, deadline=None)
@given(worlds(), st.randoms(use_true_random=False))
def test_the_verdict_does_not_depend_on_the_order_of_the_records_or_of_the_names_of_drops(
    lines: Lines, order: Any
) -> None:
    names = [(1, "a.jsonl"), (2, "b.jsonl"), (4, "d.jsonl")]
    first = judged(lines, Rules(gate=SMALL, known=Known(frozenset({1, 2}), dict(names))), "rougeL")
    order.shuffle(lines)
    again = judged(lines, Rules(gate=SMALL, known=Known(frozenset({2, 1}), dict(names[::-1]))), "rougeL")
    assert again == first


def test_no_records_at_all_are_insufficient_evidence() -> None:
    verdict = judged([])
    assert verdict.outcome == "insufficient_evidence"
    assert verdict.candidate_score is None
    assert sentence(clauses(verdict)) == "insufficient evidence: 0 held-out records, and a verdict needs 100"
    assert "promoted" not in story_text(verdict)


# New drops bring their own held-out records, and so their own yardstick.


def of_drops(seen: tuple[int, int, int], new: tuple[int, int, int]) -> Lines:
    """Return records of drop 1 and of drop 2, each with so many won, lost and equal."""
    return in_drops(yes_or_no(*seen), yes_or_no(*new))


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


def test_the_gate_on_seen_records_is_not_moved_by_new_ones() -> None:
    all_win = judged(of_drops((40, 4, 106), (60, 2, 88)), Rules(known=KNOWS_ONE))
    assert (all_win.outcome, all_win.reasons) == ("promoted", ()), "no reason names new records"
    rules = Rules(gate=GateConfig(on="seen"), known=KNOWS_ONE)
    odd = judged(of_drops((4, 4, 142), (60, 2, 88)), rules)
    assert odd.outcome == "not_shown_better"
    assert odd.records == 150
    good = judged(of_drops((40, 4, 106), (2, 60, 88)), rules)
    assert (good.outcome, good.reasons) == ("promoted", ())
    assert {row.label for row in good.slices if row.kind == "drop"} == {"drop 1 (old.jsonl)", "drop 2 (new.jsonl)"}


def test_the_gate_on_seen_records_wants_enough_of_them() -> None:
    verdict = judged(of_drops((60, 0, 30), (60, 2, 88)), Rules(gate=GateConfig(on="seen"), known=KNOWS_ONE))
    assert verdict.outcome == "insufficient_evidence"
    assert verdict.reasons == ("too_few_seen",)
    assert 'Set gate.on = "all"' in story_text(verdict)


def test_the_gate_on_pinned_records_leaves_the_others_out() -> None:
    lines = of_drops((40, 4, 106), (2, 60, 88))
    for line in lines:
        line["pinned"] = line["drop"] == 1
    verdict = judged(lines, by(on="pinned"))
    assert (verdict.outcome, verdict.records) == ("promoted", 150)


# What speaks against the drops that the champion does not know.

THREE = Known(frozenset({1, 2}), {1: "old.jsonl", 3: "new.jsonl"})


def won(**more: Any) -> Comparison:
    """Return a candidate that wins on three drops, of which the champion does not know the third."""
    lines = yes_or_no(60, 6, 234)
    for place, line in enumerate(lines):
        line["drop"] = 1 + place % 3
    return replace(compare("exact_match", lines), **more)


def of_three(*parts: tuple[int, int, int]) -> Comparison:
    """Return records of drops 1, 2 and 3, each with so many won, lost and equal."""
    return compare("exact_match", in_drops(*(yes_or_no(*part) for part in parts)))


def likelihoods(rise: float) -> tuple[Floats, Floats]:
    """Return those of 300 records, which became less likely by about so many nats per token."""
    sums = np.full((300, 2), 8.0)
    sums[:, 0] += 8 * (rise + np.tile([-0.01, 0.01], 150))
    return sums, np.full((300, 2), 8.0)


def bad(kind: str) -> dict[str, Floats]:
    pairs = {one: np.zeros((300, 2)) for one in DEGENERATE}
    pairs[kind][:60, 0] = 1
    return pairs


EVEN = compare("exact_match", yes_or_no(5, 4, 291))
#: Of the records of `won` the six lost ones and twenty others.
LOST = np.isin(np.arange(300), range(60, 86))
LOST_SUITE = (Suite("builtin", np.tile([0.0, 1.0], (100, 1))),)
FAR_FROM_BASE = (Suite("builtin", np.tile([[0.0, 0.0], [0.0, 1.0]], (1, 50)).reshape(-1, 2), np.ones(100)),)
FAR = {1: np.full(300, 2.0)}
OPINION = Opinion(judgement_of(0, 90), {f"{place:06x}": "loss" for place in range(90)})


@pytest.mark.parametrize(
    ("found", "reason", "blames"),
    [
        (compare("exact_match", yes_or_no(5, 60, 235)), "harm_shown", True),
        (of_three((0, 12, 88), (30, 0, 70), (30, 0, 70)), "slice_lost", True),
        (won(tags={"odd": LOST}, drops=np.repeat(1, 300)), "slice_lost", False),
        (won(nll=likelihoods(0.2)), "nll_rose", False),
        (replace(EVEN, nll=likelihoods(0.2)), "nll_rose", True),  # no win
        (won(suites=LOST_SUITE), "general_lost", False),
        (won(suites=FAR_FROM_BASE), "general_below_base", False),
        (won(degenerate=bad("empty")), "empty_rose", False),
        (won(degenerate=bad("truncated")), "truncated_rose", False),
        (won(degenerate=bad("looping")), "looping_rose", False),
        (replace(of_three((0, 2, 98), (40, 0, 60), (40, 0, 60)), former=FAR), "anchor_lost", True),
        (won(opinion=OPINION), "judge_prefers_champion", False),
        (of_three((0, 0, 20), (0, 0, 20), (0, 0, 20)), "too_few_records", False),
        (of_three((0, 6, 94), (3, 0, 97), (3, 0, 97)), "slice_lost", False),  # no win, and not sure enough
        (of_three((0, 20, 80), (12, 0, 88), (12, 0, 88)), "slice_lost", True),  # no win, and sure
        (won(), "", False),
    ],
)
def test_a_loss_an_old_drop_and_without_a_win_the_likelihood_put_new_drops_under_suspicion(
    found: Comparison, reason: str, blames: bool
) -> None:
    verdict = decide_verdict(found, Rules(known=THREE))
    assert reason in verdict.reasons or (verdict.outcome, reason) == ("promoted", "")
    assert verdict.blames_new_drops == blames
    said = story_text(verdict)
    assert ("A drop is suspended only if its trial is worse" in said) == blames
    if verdict.outcome == "guard_failed":
        assert ("No drop is suspended for this" in said) != blames


@pytest.mark.parametrize("known", [Known(None), Known(frozenset())])
def test_where_the_champion_knows_no_drop_none_is_blamed(known: Known) -> None:
    for found in (compare("exact_match", yes_or_no(5, 60, 235)), replace(EVEN, nll=likelihoods(0.2))):
        verdict = decide_verdict(found, Rules(known=known))
        assert verdict.outcome in {"worse", "guard_failed"}
        assert not verdict.blames_new_drops
        assert "tried in turn" not in story_text(verdict)


def test_lost_drops_are_the_seen_ones_that_failed() -> None:
    lost, kept = (0, 20, 80), (60, 0, 40)
    cases = [((lost, kept, lost), (1,)), ((kept, kept, lost), ()), ((lost, lost, kept), (1, 2))]
    for parts, drops in cases:
        assert decide_verdict(of_three(*parts), Rules(known=THREE)).lost_drops == drops
    anchor = decide_verdict(replace(of_three((0, 2, 98), kept, kept), former=FAR), Rules(known=THREE))
    assert (anchor.outcome, anchor.lost_drops) == ("guard_failed", ()), "this run lost next to nothing of it"


def test_a_candidate_that_does_not_win_has_failed_a_guard_only_by_a_sure_loss_of_an_old_drop_or_of_likelihood() -> None:
    general = decide_verdict(replace(EVEN, suites=LOST_SUITE), Rules())
    assert (general.outcome, general.reasons[0]) == ("not_shown_better", "general_lost")
    assert "What it loses: builtin −100.0 points" in story_text(general)
    # So sure that the p-value is 0.
    fell = decide_verdict(replace(EVEN, nll=likelihoods(0.2)), Rules())
    assert [row.p_value for row in fell.guards if row.guard == "nll"] == [0.0]
    assert fell.outcome == "guard_failed"
    unsure = likelihoods(0.2)
    unsure[0][:, 0] += np.tile([20.0, -20.0], 150)
    assert decide_verdict(replace(EVEN, nll=unsure), Rules()).outcome == "not_shown_better"


@pytest.mark.parametrize("drops", [5, 40])
def test_the_harm_that_one_drop_shows_is_sure_however_many_drops_there_are(drops: int) -> None:
    random = np.random.default_rng(0)
    champion = random.uniform(0.4, 0.6, 60 * drops)
    change = random.normal(0.4 / (drops - 1), 0.02, champion.size)
    change[:60] = random.normal(-0.4, 0.02, 60)
    lines = lines_of(champion + change, champion, "rougeL")
    for place, line in enumerate(lines):
        line["drop"] = 1 + place // 60
    verdict = decide_verdict(compare("rougeL", lines), Rules())
    assert (verdict.outcome, verdict.lost_drops) == ("guard_failed", (1,))


# --- a trial is judged with the run before it, and settled by its control

ON_ONE = Rules(known=KNOWS_ONE)


def of_two_drops(wrong: int, *, old: int = 120, new: int = 80) -> Comparison:
    """
    Return a comparison whose candidate wins all records of a new drop, and is wrong on so many of an old one.

    These are the last ones; the champion is wrong on the first ten.
    """
    candidate, champion = [1] * (old - wrong) + [0] * wrong, [0] * 10 + [1] * (old - 10)
    lines = lines_of(candidate + [1] * new, champion + [0] * new)
    for line in lines[old:]:
        line["drop"] = 2
    return compare("exact_match", lines)


def control_with(wrong: int, *, old: int = 120) -> Comparison:
    """Return the comparison of a control, which lacks the new drop: wrong where the champion is, and on the last."""
    champion = [0] * 10 + [1] * (old - 10)
    return compare("exact_match", lines_of([0] * 10 + [1] * (old - 10 - wrong) + [0] * wrong, champion))


@pytest.mark.parametrize(
    ("run", "control", "passed"),
    [(16, 6, True), (16, 0, False), (8, 0, True), (15, 0, False)],
    ids=["as the control lost, too", "twice without the control", "the run lost less", "a little beyond the margin"],
)
def test_old_drops_are_judged_by_two_models_each_after_a_trial_that_won_but_for_them(
    run: int, control: int, *, passed: bool
) -> None:
    trial = of_two_drops(16)
    verdict = weigh(trial, ON_ONE)
    assert (verdict.outcome, verdict.blames_new_drops) == ("guard_failed", True)
    found = settle(verdict, trial, pool(trial, of_two_drops(run), control_with(control)), ON_ONE)
    assert found is not None
    assert found.passed is passed
    (row,) = (row for row in found.guards if row.drop == 1)
    assert row.change == pytest.approx(-100 * ((16 + run) / 2 - 10 - 0.75 * control) / 120)


@pytest.mark.parametrize("change", [{"reasons": ("p_above_limit",)}, {"outcome": "worse"}, {"outcome": "promoted"}])
def test_only_a_trial_that_won_but_for_guards_of_old_drops_is_settled(change: dict[str, Any]) -> None:
    trial = of_two_drops(16)
    verdict, pooled = weigh(trial, ON_ONE), pool(trial, of_two_drops(8), control_with(6))
    assert settle(verdict, trial, pooled, ON_ONE) is not None
    assert settle(verdict.model_copy(update=change), trial, pooled, ON_ONE) is None
    general = verdict.guards[0].model_copy(update={"guard": "general", "state": "failed"})
    assert settle(verdict.model_copy(update={"guards": (*verdict.guards, general)}), trial, pooled, ON_ONE) is None


def test_a_loss_on_too_few_records_for_a_test_of_means_stays() -> None:
    trial = of_two_drops(16, old=29, new=100)
    trial.scores["exact_match"][:10, 1] = 1.0
    verdict = weigh(trial, ON_ONE)
    assert verdict.outcome == "guard_failed"
    pooled = pool(trial, of_two_drops(0, old=29), control_with(9, old=29))
    found = settle(verdict, trial, pooled, ON_ONE)
    assert found is not None
    assert not found.passed
    assert weigh(trial, ON_ONE, pool(trial, of_two_drops(0, old=29))).outcome == "guard_failed"


def test_a_record_that_a_model_answered_for_another_drop_is_not_pooled() -> None:
    trial, run, control = of_two_drops(16), of_two_drops(8), control_with(6)
    control.drops[110:] = 7
    pooled = pool(trial, run, control).scores["exact_match"]
    assert pooled[110:120, 1].tolist() == [1.0] * 10
    assert pool(trial, run, control_with(6)).scores["exact_match"][114:120, 1].tolist() == [0.25] * 6


def test_a_lost_anchor_is_settled_too() -> None:
    trial = replace(of_two_drops(0), former={3: np.ones(200), 4: np.array([1.0] * 120 + [np.nan] * 80)})
    trial.scores["exact_match"][:10] = 0.0, 0.0
    trial.scores["exact_match"][10] = 0.0, 1.0
    verdict = weigh(trial, ON_ONE)
    assert (verdict.outcome, verdict.reasons[0], verdict.blames_new_drops) == ("guard_failed", "anchor_lost", True)
    assert verdict.lost_drops == (), "the champion lost there, too"
    for wrong, passed in ((0, True), (12, False)):
        found = settle(verdict, trial, pool(trial, of_two_drops(wrong), control_with(0)), ON_ONE)
        assert found is not None
        assert found.passed is passed
