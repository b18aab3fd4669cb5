"""One of several trials, by dev records: the best unless a cheaper one is as good."""

import random

import pytest

from pipeline.train.search.choice import DevScores, choose


def scores(*values: float, cost: float = 1.0, weights: tuple[float, ...] | None = None) -> DevScores:
    return DevScores(values, weights or (1.0,) * len(values), cost)


def test_a_clearly_better_trial_is_taken_whatever_it_costs() -> None:
    low, high = scores(0, 1, 0, 0, cost=1), scores(1, 1, 1, 1, cost=100)
    assert choose([low, high]) == 1
    assert choose([high, low]) == 0


def test_a_tie_goes_to_the_cheaper_one() -> None:
    # Three records better, two worse: the mean difference is 0.2, its standard error 0.49.
    better, cheaper = scores(1, 1, 1, 0, 0, cost=2), scores(0, 0, 0, 1, 1, cost=1)
    assert choose([better, cheaper]) == 1
    assert choose([better, scores(0, 0, 0, 1, 1, cost=3)]) == 0


@pytest.mark.parametrize("records", [100, 103, 107, 130])
def test_one_record_more_is_no_better_however_many_there_are(records: int) -> None:
    """The mean is its own standard error then, to the last bit or not."""
    for index in (0, records // 2, records - 1):
        better = [float(number == index) for number in range(records)]
        assert choose([scores(*better, cost=2), scores(*[0.0] * records, cost=1)]) == 1
        better[index - 1] = 1.0
        assert choose([scores(*better, cost=2), scores(*[0.0] * records, cost=1)]) == 0, "two are more than one error"


def test_the_difference_is_paired() -> None:
    # Their means are far within each other's spread, and one is better on every record.
    random.seed(1)
    base = [random.gauss(0, 10) for _ in range(50)]
    better = [value + 0.1 + random.random() * 0.01 for value in base]
    assert choose([scores(*base, cost=1), scores(*better, cost=2)]) == 1


def test_one_standard_error_is_the_border() -> None:
    # Differences to the best: mean 1, standard deviation sqrt(8/3), standard error sqrt(8/3)/2 = 0.816 with four.
    best = scores(3, 1, 1, -1, cost=2)
    assert choose([best, scores(0, 0, 0, 0, cost=1)]) == 0
    # Four times that spread: 1.63 is more than the mean.
    assert choose([scores(5, 1, 1, -3, cost=2), scores(0, 0, 0, 0, cost=1)]) == 1


def test_a_likelihood_is_weighted_by_its_tokens() -> None:
    weights = (1.0, 1.0, 98.0, 98.0)
    long_ones = scores(-3, -3, -1, -1, cost=2, weights=weights)
    short_ones = scores(-1, -1, -2, -2.01, cost=1, weights=weights)
    assert long_ones.mean == pytest.approx(-202 / 198)
    assert choose([short_ones, long_ones]) == 1


def test_equally_cheap_ones_go_to_the_better_then_to_the_first() -> None:
    assert choose([scores(1, 0, 0), scores(0, 1, 1)]) == 1
    assert choose([scores(1, 0), scores(1, 0)]) == 0


def test_too_few_records_tell_nothing_so_the_cheapest_is_taken() -> None:
    assert choose([scores(1, cost=2), scores(0, cost=1)]) == 1
    assert choose([scores(cost=2), scores(cost=1)]) == 1
