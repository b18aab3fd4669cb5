"""What later drops say of a champion: the e-value against numerical integration, the starts, and the decision."""

import math
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from pipeline.decide.policy import WATCH_NIGHTS, WATCH_START
from pipeline.decide.watch import Watch, e_value, watch_of


class Night(NamedTuple):
    worse: int
    better: int
    former: int = 4


LOST, WON, TIED = Night(1, 0), Night(0, 1), Night(0, 0)


def seen(nights: list[Night]) -> Watch:
    watch = watch_of(nights)
    assert watch is not None
    return watch


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_e_value_is_the_integral(worse: int, better: int) -> None:
    drops = worse + better
    found, _ = integrate.quad(lambda t: 2 ** (drops + 1) * t**worse * (1 - t) ** better, 0.5, 1, epsrel=1e-11)
    assert e_value(worse, better) == pytest.approx(min(found, 1e9), rel=1e-6)


def test_the_e_value_of_thousands_of_drops_is_a_finite_number() -> None:
    assert e_value(5000, 0) == 1e9
    assert math.isfinite(e_value(4000, 4000))
    assert 0 < e_value(0, 5000) < 1e-3


@given(st.integers(0, 14), st.integers(0, 14))
def test_a_fair_coin_gains_nothing_on_average(worse: int, better: int) -> None:
    """The e-value is a martingale under "half of the drops": Ville's inequality rests on it."""
    following = (e_value(worse + 1, better) + e_value(worse, better + 1)) / 2
    assert following == pytest.approx(e_value(worse, better))


def test_a_champion_that_loses_twelve_drops_in_a_row_is_doubted_then_to_be_returned() -> None:
    assert [seen([LOST] * nights).reached for nights in range(1, 13)] == [0] * 7 + [20] * 3 + [100] * 2


def test_drops_of_one_night_count_one_by_one_and_a_tie_counts_as_none() -> None:
    assert seen([Night(7, 1), Night(5, 0)]).evidence == e_value(12, 1) / 2
    assert seen([LOST, TIED, TIED]).evidence == seen([LOST]).evidence


def test_a_new_count_starts_every_thirty_nights_and_finds_a_champion_that_became_worse() -> None:
    nights = [WON] * 2 * WATCH_START + [LOST] * 16
    found = seen(nights)
    parts = [e_value(16, 60) / 2, e_value(16, 30) / 6, e_value(16, 0) / 12]
    assert found.evidence == pytest.approx(sum(parts))
    assert found.reached == 100
    assert (found.worse, found.better) == (16, 0), "the counts are those of the start that weighs most"
    assert seen([WON] * (WATCH_START - 1) + [LOST]).evidence == e_value(1, WATCH_START - 1) / 2
    assert seen([WON] * WATCH_START + [LOST]).evidence == e_value(1, WATCH_START) / 2 + e_value(1, 0) / 6


@pytest.mark.parametrize(
    ("nights", "over"),
    [
        ([WON] * 8, False),
        ([WON] * 9, True),
        ([WON, LOST] * 44 + [WON], False),
        ([WON, LOST] * 45, True),
        ([WON, LOST] * 30 + [LOST] * 30, False),
        ([LOST] * WATCH_NIGHTS, False),
    ],
)
def test_a_watch_is_over_once_the_champion_is_as_good_or_after_ninety_nights_without_a_doubt(
    nights: list[Night], over: bool
) -> None:
    assert seen(nights).is_over is over


def test_without_a_night_there_is_no_watch() -> None:
    assert watch_of([]) is None
