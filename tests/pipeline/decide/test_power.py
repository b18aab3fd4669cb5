"""The smallest gain is promoted about as often as it says, by the whole decision, and needs no more than it says."""

import math
from dataclasses import replace
from functools import partial

import pytest

from pipeline.config import GateConfig, GuardConfig
from pipeline.decide import power
from pipeline.decide.comparison import Comparison, compare
from pipeline.decide.power import records_needed, smallest_gain
from pipeline.decide.slices import Known
from pipeline.decide.verdict import Rules, promotes
from tests.records_made import paired, world, yes_or_no

RULES = Rules(gate=GateConfig(min_records=40), known=Known(frozenset({1, 2, 3, 4})))


def stated(comparison: Comparison, rules: Rules = RULES, seed: int = 1) -> float | None:
    return smallest_gain(comparison, partial(promotes, rules=rules), seed)


def test_where_no_gain_is_promoted_none_is_stated() -> None:
    # On four records even four wins have p = 1 / 16.
    assert stated(compare("exact_match", yes_or_no(2, 1, 1))) is None
    assert stated(paired([1] * 120, [1] * 120)) is None, "all is right already"
    # A guard that refuses each candidate: no gain of the task gets an answer of the suite right.
    floor = replace(RULES, guards=GuardConfig(floors={"json_valid": 90}))
    assert stated(world("exact_match", 1), floor) is None
    shown = replace(floor, guards=floor.guards.model_copy(update={"stop": ()}))
    assert stated(world("exact_match", 1), shown) is not None


def test_what_is_to_be_shown_more_surely_must_be_larger() -> None:
    comparison = world("exact_match", 2)
    gains = [stated(comparison, replace(RULES, gate=GateConfig(p_value=level))) or math.inf for level in (0.05, 0.001)]
    assert gains[0] < gains[1]
    least = replace(RULES, gate=GateConfig(min_gain=25))
    assert 0.25 < (stated(comparison, least) or 0) < 0.35


def test_more_than_a_million_records_are_not_asked_for_nor_any_for_a_loss() -> None:
    assert records_needed(0.01, 0.2, 200) == 80_000
    assert records_needed(0.0001, 0.04, 200) is None
    assert records_needed(-0.01, 0.2, 200) is None


def test_four_times_as_many_records_show_half_of_the_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "DRAWS", 60)
    small, large = (stated(replace(world("rougeL", 7, size=size), suites=())) or 0 for size in (300, 1200))
    assert large == pytest.approx(small / 2, rel=0.3)
