"""Records that are paraphrases of each other are one unit of every test: otherwise luck is counted once for each."""

import pytest
from scipy import stats

from pipeline.config import GateConfig
from pipeline.decide.comparison import Comparison, compare
from pipeline.decide.explain import clauses, sentence
from pipeline.decide.slices import Known
from pipeline.decide.verdict import Rules, decide_verdict
from tests.records_made import lines_of, yes_or_no


def grouped(size: int) -> Comparison:
    """Return 120 records won, lost or equal, each asked in `size` ways that are all answered alike."""
    lines = [line for line in yes_or_no(24, 8, 88) for _ in range(size)]
    return compare("exact_match", [{**line, "id": f"{place:06x}"} for place, line in enumerate(lines)])


def test_asking_each_record_in_five_ways_changes_no_number_of_the_verdict() -> None:
    once, five_times = (decide_verdict(grouped(size), Rules()) for size in (1, 5))
    assert (once.records, five_times.records) == (120, 600)
    assert once.groups == five_times.groups == 120
    assert (five_times.wins, five_times.losses, five_times.ties) == (24, 8, 88)
    # The interval's seed is that of the ids.
    same = {"records": 0, "interval": None}
    assert five_times.model_copy(update=same) == once.model_copy(update=same)


def test_the_mean_of_a_group_is_its_unit_however_many_records_it_has() -> None:
    lines = lines_of([1, 1, 0, 1, 0.5], [0, 0, 0, 1, 0], "rougeL")
    for line, group in zip(lines, "aaabc", strict=True):
        line["group"] = group
    found = compare("rougeL", lines)
    assert found.pairs().tolist() == [[pytest.approx(2 / 3), 0], [1, 1], [0.5, 0]]
    assert found.differences() == pytest.approx([2 / 3, 0, 0.5])
    verdict = decide_verdict(found, Rules())
    assert (verdict.records, verdict.groups, verdict.wins, verdict.ties) == (5, 3, 2, 1)
    assert verdict.candidate_score == pytest.approx(100 * (2 / 3 + 1 + 0.5) / 3)


def test_a_group_across_drops_counts_once_in_each_and_once_in_all() -> None:
    lines = yes_or_no(2, 1, 1)
    for line, (drop, group) in zip(lines, [(1, "a"), (2, "a"), (2, "a"), (2, "b")], strict=True):
        line.update(drop=drop, group=group, tags=["x"] if group == "a" else [])
    found = compare("exact_match", lines)
    assert found.differences() == pytest.approx([1 / 3, 0])
    verdict = decide_verdict(found, Rules(known=Known(frozenset({1}))))
    rows = {row.label: (row.records, row.groups) for row in verdict.slices}
    assert (rows["drop 1"], rows["drop 2"], rows["tag x"]) == ((1, 1), (3, 2), (3, 1))
    gains = {row.label: row.gain for row in verdict.slices}
    assert (gains["drop 1"], gains["drop 2"], gains["tag x"]) == pytest.approx((100, 0, 100 / 3))
    assert {row.groups for row in verdict.slices if row.kind == "unseen"} == {2}


def test_the_fewest_records_of_a_verdict_are_groups() -> None:
    short, enough = (decide_verdict(grouped(5), Rules(gate=GateConfig(min_records=least))) for least in (121, 120))
    assert (short.outcome, short.records_needed) == ("insufficient_evidence", 1)
    assert (
        sentence(clauses(short))
        == "insufficient evidence: 120 different held-out records (600 in all), and a verdict needs 121"
    )
    assert enough.outcome == "promoted"


def test_a_groups_mean_between_yes_and_no_counts_by_its_size() -> None:
    # Of groups of two 20 gain on both of their records, 12 lose on one: a gain that a count of both does not show.
    lines = yes_or_no(40, 12, 270)
    places = [*(place // 2 for place in range(40)), *range(20, 32), *range(20, 32), *range(32, 290)]
    for line, group in zip(lines, places, strict=True):
        line["group"] = f"{group}"
    verdict = decide_verdict(compare("exact_match", lines), Rules())
    assert (verdict.wins, verdict.losses, verdict.groups) == (20, 12, 290)
    assert stats.binomtest(20, 32, alternative="greater").pvalue > 0.1
    assert verdict.test == "t"
    assert verdict.outcome == "promoted"
