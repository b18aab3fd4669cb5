"""Each guard lets a good candidate pass, fails the one that it is there for, and is quiet where it was told to be."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from scipy import stats

from pipeline.artifacts import GuardResult, Verdict
from pipeline.config import GateConfig, GuardConfig, GuardName, MetricName
from pipeline.decide.comparison import Comparison, Opinion, Suite, compare
from pipeline.decide.explain import clauses, guard_words, sentence
from pipeline.decide.policy import GUARDS, LEAST_TESTED, label
from pipeline.decide.slices import Known
from pipeline.decide.statistics import Floats
from pipeline.decide.verdict import Rules, decide_verdict
from pipeline.metrics.registry import METRICS
from tests.made_artifacts import judgement_of
from tests.records_made import in_drops, story_text, yes_or_no

Lines = list[dict[str, Any]]
#: Wins the gate's test by far, with nothing against it.
GOOD = (40, 4, 156)
#: Guards that block nothing unless the settings say so.
ONLY_SHOWN = {"collapse"}


def good(times: int = 1) -> Lines:
    """Return 200 records of which a candidate wins 40 and loses 4, spread evenly, or a multiple of them."""
    lines = yes_or_no(*(times * count for count in GOOD))
    order = np.random.default_rng(1).permutation(len(lines))
    for place, line in zip(order.tolist(), lines, strict=True):
        line["id"] = line["group"] = f"{place:06x}"
    return sorted(lines, key=lambda line: str(line["id"]))


def of_good(**more: Any) -> Comparison:
    return replace(compare("exact_match", good()), **more)


def verdict_on(found: Lines | Comparison, known: frozenset[int] | None = None, **guards: Any) -> Verdict:
    comparison = found if isinstance(found, Comparison) else compare("exact_match", found)
    return decide_verdict(comparison, Rules(guards=GuardConfig(**guards), known=Known(known)))


def row_of(verdict: Verdict, guard: str, words: str = "") -> GuardResult:
    (row,) = [row for row in verdict.guards if row.guard == guard and words in label(row)]
    return row


def expect(verdict: Verdict, guard: str, state: str, words: str = "") -> GuardResult:
    """Require the guard's state, and that it decides between a promotion and a failed guard; return its row."""
    row = row_of(verdict, guard, words)
    assert row.state == state
    found = (verdict.outcome, verdict.reasons)
    assert found == (("guard_failed", (GUARDS[guard].reason,)) if state == "failed" else ("promoted", ()))
    return row


def lost_of(items: int, lost: int) -> Floats:
    """Return scores of a candidate that lost so many items to another model."""
    scores = np.ones((items, 2))
    scores[:lost, 0] = 0
    return scores


def opinion(wins: int, losses: int) -> Opinion:
    said = ["win"] * wins + ["loss"] * losses
    return Opinion(judgement_of(wins, losses), dict(zip(compare("exact_match", good()).ids, said, strict=False)))


def test_a_good_candidate_passes_every_guard_and_each_is_a_row_with_its_numbers() -> None:
    lines = good()
    for place, line in enumerate(lines):
        line["drop"] = 1 + place % 2
    found = replace(
        compare("exact_match", lines),
        suites=(Suite("general", np.tile([0.6, 0.6], (120, 1)), np.full(120, 0.6)), *with_questions(0).suites),
        former={2: np.zeros(200)},
        opinion=opinion(40, 20),
    )
    verdict = verdict_on(found, floors={"exact_match": 10})
    assert (verdict.outcome, verdict.reasons) == ("promoted", ())
    states = {row.guard: row.state for row in verdict.guards}
    assert {guard for guard, state in states.items() if state == "passed"} == set(GuardConfig().stop)
    assert {guard for guard, state in states.items() if state == "shown"} == ONLY_SHOWN


def test_every_guard_has_a_reason_of_its_own() -> None:
    assert set(GUARDS) == set(get_args(GuardName)) == {*GuardConfig().stop, *ONLY_SHOWN}
    assert len({guard.reason for guard in GUARDS.values()}) == len(GUARDS)


# Drops and tags that the champion knows.


def with_drops(lost: int, size: int, gained: int = 0) -> Lines:
    """Return 200 records of drop 1 that are mostly won, and `size` of drop 2 of which so many are lost and gained."""
    return in_drops(yes_or_no(60, 2, 138), yes_or_no(gained, lost, size - lost - gained))


@pytest.mark.parametrize(
    ("lost", "gained", "size", "state"),
    [
        (6, 0, 120, "failed"),  # 5 points, and shown: p = 1 / 64, twice that by Holm
        (5, 0, 90, "passed"),  # p = 1 / 32, over two drops 1 / 16, and too few for the margin
        (27, 20, 99, "passed"),  # 7 points, that may be chance, on too few for the margin
        (27, 20, 100, "failed"),  # the same on enough
        (24, 20, 100, "passed"),  # 4 points; the margin is 4.5
        (7, 0, 7, "shown"),
        (8, 0, 8, "failed"),  # exactly tested
    ],
)
def test_a_drop_fails_where_its_loss_is_shown_or_beyond_the_margin_on_a_hundred(
    lost: int, gained: int, size: int, state: str
) -> None:
    verdict = verdict_on(with_drops(lost, size, gained))
    row = row_of(verdict, "slice", "drop 2")
    assert (row.state, row.records, row.drop) == (state, size, 2)
    assert row_of(verdict, "slice", "drop 1").state == "passed"
    assert verdict.outcome == ("guard_failed" if state == "failed" else "promoted")
    assert verdict_on(with_drops(27, 100, 20), slices=7.0).outcome == "promoted"


def of_many(drops: int, size: int, lost: int, gained: int = 0, **more: Any) -> Comparison:
    """Return drops of `size` records each: drop 1 with `lost` and `gained` records, the others with gains alone."""
    parts = [yes_or_no(gained, lost, size - lost - gained), *(yes_or_no(size // 5, 0, size - size // 5),) * (drops - 1)]
    return replace(compare("exact_match", in_drops(*parts)), **more)


@pytest.mark.parametrize(
    ("drops", "lost", "gained", "state"),
    [
        (5, 26, 20, "failed"),  # 6 points, p = .23
        (6, 26, 20, "passed"),  # the same, as one of six it may be chance
        (6, 16, 6, "failed"),  # 10 points, p = .026, over six drops .16
    ],
)
def test_where_many_drops_have_a_hundred_records_a_loss_beyond_the_margin_must_also_be_significant(
    drops: int, lost: int, gained: int, state: str
) -> None:
    row = expect(verdict_on(of_many(drops, 100, lost, gained)), "slice", state, "drop 1")
    assert row.p_value is not None
    assert row.p_value > 0.05


def test_drops_and_tags_with_too_few_records_are_named() -> None:
    lines = good()
    for place, line in enumerate(lines):
        line["drop"] = 1 if place < 7 else 2
        line["tags"] = ["rare"] if place == 100 else ["common"]
    verdict = verdict_on(lines)
    said = "These have too few held-out records to be guarded: drop 1 and tag rare."
    assert said in story_text(verdict)
    assert sentence(clauses(verdict)).endswith("; not guarded: 2 small drops or tags")
    assert "to be guarded" not in story_text(verdict_on(good()))
    for place, line in enumerate(lines):
        line["drop"] = 1 + place // 7
    many = "drop 1, drop 2, drop 3, drop 4, drop 5 and 24 more"
    verdict = verdict_on([{**line, "tags": []} for line in lines])
    assert f"to be guarded: {many}." in story_text(verdict)


def test_a_drop_that_the_champion_does_not_know_has_nothing_to_lose() -> None:
    verdict = verdict_on(with_drops(30, 120), known=frozenset({1}))
    assert verdict.outcome == "promoted"
    assert {label(row) for row in verdict.guards if row.guard == "slice"} == {
        "drop 1",
        "records of drops that the champion knows",
    }


def test_tags_are_slices_whose_tests_share_their_level() -> None:
    def tagged(*others: str) -> Verdict:
        lines = with_drops(5, 60)
        for line in lines:
            line["tags"] = ["category:maths"] if line["drop"] == 2 else list(others)
            line["drop"] = 1
        return verdict_on(lines)

    alone = expect(tagged(), "slice", "failed")
    assert (label(alone), alone.records, alone.p_value) == ("tag category:maths", 60, 1 / 32)
    row = expect(tagged("short"), "slice", "passed", "maths")
    assert row.p_value == 2 / 32


def test_records_of_a_tag_that_are_new_to_the_champion_have_nothing_to_lose() -> None:
    def tagged(kept: int) -> Verdict:
        """Return the verdict where drop 2, of which 30 of 60 records are lost, has a tag that drop 1 has on `kept`."""
        lines = with_drops(30, 60)
        for place, line in enumerate(one for one in lines if one["drop"] == 1):
            line["tags"] = ["kind"] if place < kept else []
        for line in lines:
            line["tags"] = ["kind"] if line["drop"] == 2 else line["tags"]
        return verdict_on(lines, known=frozenset({1}))

    assert not [row for row in tagged(0).guards if label(row) == "tag kind"], "only new records have it"
    row = expect(tagged(40), "slice", "passed", "tag kind")
    assert (row.records, row.change) == (40, 100)
    assert {one.label: one.records for one in tagged(40).slices}["tag kind"] == 100


# Former champions on old drops: the anchor.


def anchored(*former: int, lost: int = 1, size: int = 100, gained: int = 0, **marks: Any) -> Comparison:
    """
    Return a candidate that wins on drop 2 and lost one record of drop 1 to the champion.

    Former champions, generation 1 and on, answered all of drop 1 right but `gained` records, and `former` many more
    than the candidate.
    """
    right = np.ones(size)
    right[:gained] = 0  # what no former champion could
    old = [*yes_or_no(0, 0, size - lost), *yes_or_no(0, lost, 0)]
    lines = [{**line, **marks} for line in in_drops(old, yes_or_no(60, 2, 138))]
    found = compare("exact_match", lines)
    scores = found.scores["exact_match"].copy()
    columns = []
    for behind in former:
        own = np.full(len(lines), np.nan)
        own[:size] = right
        columns.append((own, behind))
    # Both models fail on what the best former champion has ahead of them.
    most = max((behind for _, behind in columns), default=0)
    scores[size - most : size - lost] = 0
    for own, behind in columns:
        own[size - most : size - behind] = 0
    made = {number: own for number, (own, _) in enumerate(columns, 1)}
    return replace(found, scores={"exact_match": scores}, former=made)


@pytest.mark.parametrize(
    ("behind", "gained", "size", "state"),
    [
        (5, 0, 100, "passed"),  # 5 points, however sure
        (6, 0, 100, "failed"),  # p = 1 / 64
        (8, 2, 100, "passed"),  # 6 points, p = .055
        (9, 2, 100, "failed"),  # 7 points, p = .033
        (6, 0, 7, "shown"),
        (7, 0, 8, "failed"),
    ],
)
def test_an_old_drop_may_fall_little_below_what_a_former_champion_made_of_it(
    behind: int, gained: int, size: int, state: str
) -> None:
    verdict = verdict_on(anchored(behind, gained=gained, size=size))
    row = expect(verdict, "anchor", state)
    assert (label(row), row.records) == ("drop 1 against the champion of generation 1", size)
    assert row.change == pytest.approx(-100 * (behind - gained) / size)
    assert verdict_on(anchored(behind, gained=gained, size=size), anchor=100).outcome == "promoted"


def test_the_former_champion_that_was_best_on_a_drop_is_its_anchor() -> None:
    row = expect(verdict_on(anchored(3, 9, 6)), "anchor", "failed")
    assert label(row) == "drop 1 against the champion of generation 2"
    assert expect(verdict_on(anchored(3, 2)), "anchor", "passed").change == -3


@pytest.mark.parametrize(("answered", "p_value", "state"), [(1, 67 / 2048, "failed"), (2, 2 * 67 / 2048, "passed")])
def test_the_anchors_of_several_drops_share_their_level(answered: int, p_value: float, state: str) -> None:
    found = of_many(5, 100, 1)
    scores = found.scores["exact_match"].copy()
    scores[1:9] = 0
    # Of drop 1 the former champion knew nine that the candidate does not, and lacked two.
    former = scores[:, 0].copy()
    former[:9], former[9:11], former[found.drops > answered] = 1, 0, np.nan
    verdict = verdict_on(replace(found, scores={"exact_match": scores}, former={1: former}))
    assert expect(verdict, "anchor", state, "drop 1 ").p_value == pytest.approx(p_value)


def test_a_candidate_that_is_no_further_below_the_anchor_than_the_champion_passes() -> None:
    row = expect(verdict_on(anchored(30, lost=0)), "anchor", "passed")
    assert label(row) == "drop 1 against the champion of generation 1, no further below it than the champion"
    expect(verdict_on(anchored(30, lost=1)), "anchor", "failed")


def test_only_drops_that_the_champion_knows_have_an_anchor_and_pinned_records_none() -> None:
    found = anchored(20)
    assert "anchor" not in {row.guard for row in verdict_on(found, known=frozenset({2})).guards}
    assert row_of(verdict_on(found, known=frozenset({1})), "anchor").state == "failed"
    assert "anchor" not in {row.guard for row in verdict_on(anchored(20, pinned=True)).guards}
    everywhere = replace(found, former={1: np.full(300, np.nan)})
    assert "anchor" not in {row.guard for row in verdict_on(everywhere).guards}, "it answered none of them"


# The likelihood of the references.


def nll(rise: float, size: int = 200, spread: float = 0.1) -> Lines:
    """Return records whose references became less likely by `rise` nats per token, more and less in turn."""
    lines = good()[:size]
    for place, line in enumerate(lines):
        line["champion"].update(nll_sum=8.0, nll_tokens=8)
        line["candidate"].update(nll_sum=8 * (1 + rise + (-spread if place % 2 else spread)), nll_tokens=8)
    return lines


@pytest.mark.parametrize(
    ("rise", "size", "spread", "state"),
    [
        (0.09, 200, 0.01, "passed"),  # within the margin, however sure
        (0.11, 200, 0.01, "failed"),
        (0.15, 100, 2.0, "failed"),  # beyond it on a hundred, though it may be chance
        (0.15, 98, 2.0, "passed"),
        (0.15, 98, 0.1, "failed"),  # on fewer if it is shown
        (0.15, 28, 0.1, "passed"),
    ],
)
def test_the_likelihood_may_fall_within_its_margin(rise: float, size: int, spread: float, state: str) -> None:
    rules = Rules(gate=GateConfig(min_records=20, min_gain=0, p_value=0.5))
    verdict = decide_verdict(compare("exact_match", nll(rise, size, spread)), rules)
    row = expect(verdict, "nll", state)
    assert (row.unit, row.margin, row.records) == ("nats", 0.1, size)
    assert row.change == pytest.approx(rise)
    error = spread * np.sqrt(size / (size - 1)) / np.sqrt(size)
    assert row.p_value == pytest.approx(stats.norm.sf(rise / error), abs=1e-12)
    assert row.bound == pytest.approx(rise - stats.norm.ppf(0.95) * error)
    if state == "failed":
        assert "nats (the limit is 0.10 nats)" in story_text(verdict)


def test_the_likelihood_is_weighted_by_tokens() -> None:
    lines = good()
    lines[0]["candidate"].update(nll_sum=4000.0, nll_tokens=2000)
    lines[0]["champion"].update(nll_sum=2000.0, nll_tokens=2000)
    row = row_of(verdict_on(lines), "nll")
    assert row.change == pytest.approx(2000 / (2000 + 199 * 4))


# Answers that are none.


@pytest.mark.parametrize("kind", ["empty", "truncated", "looping"])
@pytest.mark.parametrize(
    ("more", "times", "state"),
    [
        (6, 1, "passed"),  # 3 per cent, p = 1 / 64
        (7, 1, "failed"),  # p = 1 / 128
        (8, 2, "passed"),  # 2 per cent, however sure
        (9, 2, "failed"),
    ],
)
def test_degenerate_answers_may_grow_within_their_margin_or_by_chance(
    kind: str, more: int, times: int, state: str
) -> None:
    lines = good(times)
    for line in lines[:more]:
        line["candidate"]["degenerate"] = [kind]
    verdict = verdict_on(lines)
    row = expect(verdict, kind, state)
    share = 100 * more / (200 * times)
    assert (row.candidate, row.champion, row.change, row.margin) == pytest.approx((share, 0.0, share, 2.0))
    assert row.p_value == 0.5**more
    if state == "failed":
        assert f"{kind} answers +{share:.1f} per cent (the limit is 2.0 per cent)" in story_text(verdict)


# General abilities, against the champion and against the base model.


@pytest.mark.parametrize(
    ("lost", "items", "state"),
    [
        (8, 160, "passed"),  # 5 points
        (6, 100, "passed"),  # 6 points, p = 1 / 64
        (7, 100, "failed"),
        (7, 7, "shown"),
        (8, 8, "failed"),
    ],
)
def test_general_abilities_fail_beyond_the_margin_where_that_is_shown(lost: int, items: int, state: str) -> None:
    verdict = verdict_on(of_good(suites=(Suite("builtin", lost_of(items, lost)),)))
    row = expect(verdict, "general", state)
    assert (label(row), row.records, row.margin) == ("builtin", items, 5.0)
    assert "general_base" not in {row.guard for row in verdict.guards}, "the champion is the base model"


def against_base(lost: int, items: int = 120, champion_lost: int | None = None) -> Comparison:
    """Return a candidate that wins and lost so many of the items that the base model knows, the champion one less."""
    scores = lost_of(items, lost)
    scores[: lost - 1 if champion_lost is None else champion_lost, 1] = 0
    return of_good(suites=(Suite("builtin", scores, np.ones(items)),))


@pytest.mark.parametrize(
    ("lost", "items", "state"),
    [
        (12, 120, "passed"),  # 10 points, however surely they are lost
        (13, 120, "failed"),
        (6, 50, "passed"),  # 12 points, p = 1 / 64
        (7, 50, "failed"),  # p = 1 / 128
        (7, 7, "shown"),
        (8, 8, "failed"),
    ],
)
def test_a_suite_may_lose_little_against_the_base_model(lost: int, items: int, state: str) -> None:
    verdict = verdict_on(against_base(lost, items))
    row = expect(verdict, "general_base", state)
    assert (label(row), row.records) == ("builtin against the base model", items)
    assert (row.champion, row.margin) == (100, 10)
    assert (row.candidate, row.change) == pytest.approx((100 * (1 - lost / items), -100 * lost / items))
    assert row_of(verdict, "general").change == pytest.approx(-100 / items)
    assert verdict_on(against_base(lost, items), general_base=100).outcome == "promoted"


@pytest.mark.parametrize(("lost", "state"), [(29, "passed"), (30, "passed"), (31, "failed")])
def test_a_champion_that_is_far_below_the_base_model_gives_way_to_who_loses_no_more(lost: int, state: str) -> None:
    row = expect(verdict_on(against_base(lost, champion_lost=30)), "general_base", state)
    assert row.change == pytest.approx(-100 * lost / 120)
    assert ("no further below it than the champion" in label(row)) == (state == "passed")


def with_questions(labels: int, short: int = 0, champion: int = 0, base: int | None = 0, items: int = 38) -> Comparison:
    """Return a candidate that wins and says a label, or next to nothing, to so many general questions."""
    said = {"candidate": ["label"] * labels + ["short"] * short, "champion": ["label"] * champion}
    said |= {} if base is None else {"base": ["short"] * base}
    kinds = {model: (*found, *[""] * (items - len(found))) for model, found in said.items()}
    return of_good(suites=(Suite("questions", np.zeros((items, 2)), collapsed=kinds),))


@pytest.mark.parametrize(
    ("questions", "state"),
    [
        ({"labels": 6}, "passed"),  # p = 1 / 64
        ({"labels": 7}, "failed"),  # p = 1 / 128
        ({"labels": 4, "short": 3}, "failed"),
        ({"labels": 20, "champion": 19}, "failed"),
        ({"labels": 20, "champion": 20}, "passed"),  # it brings nothing back, and loses no more
        ({"labels": 20, "champion": 14, "base": None}, "passed"),  # the base is the champion
        ({"labels": 29, "items": 29}, "shown"),
    ],
)
def test_a_model_that_answers_general_questions_with_labels_stops_where_the_settings_say_so(
    questions: dict[str, Any], state: str
) -> None:
    found = with_questions(**questions)
    row = expect(verdict_on(found, stop=("collapse",)), "collapse", state)
    assert row.parts == {"label": questions["labels"], "empty": 0, "short": questions.get("short", 0)}
    assert verdict_on(found).outcome == "promoted"
    if state == "failed":
        number = questions["labels"] + questions.get("short", 0)
        said = f"What it loses: questions without a real answer: {number} of 38, "
        assert said in story_text(verdict_on(found, stop=("collapse",)))


# What a person set: floors and a judge.


def test_a_floor_for_a_metric_that_nothing_was_scored_by_fails_and_says_so() -> None:
    verdict = verdict_on(good(), floors={"json_valid": 99})
    row = expect(verdict, "floor", "failed")
    assert (row.records, row.candidate, row.change) == (0, None, None)
    assert "Drop more rows that the floor is scored on, lower it, or take it out (guards.floors)" in story_text(verdict)
    assert guard_words(row) == "valid JSON, at least 99: scored on none of these records"


def partly_json(invalid: int, size: int) -> Lines:
    """Return records that a candidate wins, JSON asked of `size`; both models fail on `invalid` of them."""
    lines = good()
    for place, line in enumerate(lines[:size]):
        for role in ("candidate", "champion"):
            line[role]["scores"]["json_valid"] = float(place >= invalid)
    return lines


@pytest.mark.parametrize(
    ("invalid", "size", "state"),
    [
        (9, 199, "passed"),
        (10, 199, "failed"),
        (LEAST_TESTED, LEAST_TESTED, "failed"),
        (LEAST_TESTED - 1, LEAST_TESTED - 1, "shown"),
    ],
)
def test_a_floor_is_held_against_the_records_that_its_metric_says_something_about(
    invalid: int, size: int, state: str
) -> None:
    verdict = verdict_on(partly_json(invalid, size), floors={"json_valid": 95})
    row = expect(verdict, "floor", state)
    assert row.records == size
    assert row.candidate == pytest.approx(100 * (size - invalid) / size)
    few = ", on too few records to decide" if state == "shown" else ""
    assert label(row) == f"valid JSON, at least 95{few}"
    told = f"What is not reached: valid JSON, at least 95: {row.candidate:.1f} points."
    assert (told in story_text(verdict)) == (state == "failed")


def test_a_floor_can_be_set_for_every_metric_and_for_nothing_else() -> None:
    assert set(get_args(MetricName)) == set(METRICS)


@pytest.mark.parametrize(
    ("wins", "losses", "state"),
    [(60, 10, "passed"), (22, 34, "passed"), (20, 34, "failed"), (0, 29, "shown"), (0, 30, "failed")],
)
def test_a_judge_can_only_stand_against_a_promotion(wins: int, losses: int, state: str) -> None:
    row = expect(verdict_on(of_good(opinion=opinion(wins, losses))), "judge", state)
    assert row.records == wins + losses
    assert row.p_value == pytest.approx(stats.binomtest(losses, wins + losses, alternative="greater").pvalue)
    assert guard_words(row) == f"answers that judge-7b prefers: {wins} of the new model's, {losses} of the champion's"
    equal = replace(compare("exact_match", yes_or_no(5, 4, 111)), opinion=opinion(100, 0))
    assert verdict_on(equal).outcome == "not_shown_better"


def test_a_judge_counts_a_group_of_paraphrases_once() -> None:
    found = of_good(opinion=opinion(4, 60))
    row = expect(verdict_on(replace(found, groups=np.arange(len(found.ids)) // 2)), "judge", "failed")
    assert (row.records, row.candidate, row.champion) == (32, 2, 30)


@pytest.mark.parametrize(
    ("guard", "found"),
    [
        ("slice", with_drops(30, 120)),
        ("nll", nll(0.5)),
        ("general", of_good(suites=(Suite("builtin", np.tile([0.0, 1.0], (150, 1))),))),
        ("general_base", against_base(40)),
        ("anchor", anchored(40)),
        ("judge", of_good(opinion=opinion(0, 90))),
    ],
)
def test_a_guard_that_the_settings_leave_out_is_shown_and_cannot_fail(guard: str, found: Lines | Comparison) -> None:
    assert verdict_on(found).reasons == (GUARDS[guard].reason,)
    verdict = verdict_on(found, stop=tuple(set(GuardConfig().stop) - {guard}))
    assert (verdict.outcome, verdict.reasons, verdict.lost_drops) == ("promoted", (), ())
    assert {row.state for row in verdict.guards if row.guard == guard} == {"shown"}
