"""Parts of the held-out records, and what the champion knows of them."""

from typing import Any

import pytest
from scipy import stats

from pipeline.decide import slices as slices_module
from pipeline.decide.comparison import Comparison, compare
from pipeline.decide.policy import LEAST_EXACT, MOST_SMALL
from pipeline.decide.slices import Known, count_unlisted, find_slices, measure_slices
from pipeline.decide.verdict import Rules, decide_verdict
from tests.records_made import in_drops, lines_of, yes_or_no


def of_drops(*drops: int, **more: Any) -> Comparison:
    lines = lines_of([1] * len(drops), [0] * len(drops))
    for line, drop in zip(lines, drops, strict=True):
        line.update(drop=drop, **more)
    return compare("exact_match", lines)


def test_records_of_drops_that_the_champion_knows_are_seen_and_the_others_new() -> None:
    slices = find_slices(of_drops(1, 2, 3, 3), Known(frozenset({1, 3}), {3: "c.jsonl"}))
    assert [(one.kind, one.label, one.mask.tolist(), one.drop) for one in slices] == [
        ("seen", "records of drops that the champion knows", [True, False, True, True], None),
        ("unseen", "records of new drops", [False, True, False, False], None),
        ("drop", "drop 1", [True, False, False, False], 1),
        ("drop", "drop 2", [False, True, False, False], None),
        ("drop", "drop 3 (c.jsonl)", [False, False, True, True], 3),
    ]


def test_nothing_is_new_to_a_base_model_and_pinned_records_are_seen() -> None:
    assert {one.kind for one in find_slices(of_drops(1, 2), Known(None))} == {"drop"}
    assert find_slices(of_drops(1, 1), Known(None)) == ()
    (only,) = find_slices(of_drops(5, 5), Known(frozenset()))
    assert (only.kind, only.mask.tolist()) == ("unseen", [True, True])
    assert {one.kind for one in find_slices(of_drops(5, 6, pinned=True), Known(frozenset({1})))} == {"drop"}


def test_a_tag_of_all_records_is_no_slice_and_small_tags_are_listed_up_to_a_number() -> None:
    count = MOST_SMALL + 10
    lines = yes_or_no(LEAST_EXACT + count, 0, 0)
    for place, line in enumerate(lines):
        line["tags"] = ["all", "common"] if place < LEAST_EXACT else ["all", f"rare {place}"]
    slices = find_slices(compare("exact_match", lines), Known())
    assert slices[0].label == "tag common"
    assert len(slices) == 1 + MOST_SMALL
    assert count_unlisted(compare("exact_match", lines)) == 10


def test_small_drops_are_listed_up_to_a_number_the_newest_of_them_and_larger_ones_always() -> None:
    small = range(2, 2 + MOST_SMALL + 3)
    found = of_drops(*[1] * LEAST_EXACT, *small, *[99] * LEAST_EXACT)
    slices = find_slices(found, Known())
    assert [one.label for one in slices] == [f"drop {drop}" for drop in (1, *small[3:], 99)]
    assert count_unlisted(found) == 3
    assert count_unlisted(of_drops(*[1] * LEAST_EXACT, *small[3:])) == 0


@pytest.mark.parametrize("outcome", [(1, 9), (9, 1)])
def test_small_drops_that_are_not_listed_change_no_verdict(
    outcome: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = compare("exact_match", in_drops(yes_or_no(40, 10, 100), *([line] for line in yes_or_no(*outcome, 110))))
    capped = decide_verdict(found, Rules())
    monkeypatch.setattr(slices_module, "MOST_SMALL", 10**6)
    whole = decide_verdict(found, Rules())
    assert (capped.slices_not_listed, whole.slices_not_listed) == (120 - MOST_SMALL, 0)
    assert len(capped.slices) == 1 + MOST_SMALL
    kept = [row for row in whole.guards if row in capped.guards]
    assert kept == list(capped.guards)
    assert all(row.state == "shown" for row in whole.guards if row not in capped.guards)
    same = {"slices": (), "guards": (), "slices_not_listed": 0}
    assert capped.model_copy(update=same) == whole.model_copy(update=same)


def test_a_slice_is_measured_like_the_whole() -> None:
    found = compare("exact_match", in_drops(yes_or_no(30, 10, 60), yes_or_no(0, 5, 45)))
    first, second = measure_slices(found, find_slices(found, Known()), seed=1)
    assert (first.label, first.records, first.candidate, first.champion) == ("drop 1", 100, 90.0, 70.0)
    assert first.gain == pytest.approx(20)
    assert first.p_value == pytest.approx(stats.binomtest(30, 40, alternative="greater").pvalue)
    assert first.interval is not None
    assert 4 < first.interval[0] < 20 < first.interval[1] < 35
    assert second.gain == pytest.approx(-10)
    assert second.p_value == 1.0
