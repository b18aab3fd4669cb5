"""The tests, bounds and intervals against scipy and published tables, never against themselves."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from pipeline.decide import statistics
from pipeline.decide.statistics import Floats


def mean(sample: Floats, axis: int) -> Floats:
    return np.asarray(sample.mean(axis=axis))


def column(*parts: tuple[float, int]) -> Floats:
    """Return differences: each value so many times."""
    return np.concatenate([np.full(count, value) for value, count in parts])


#: Too few differences for a spread, or none that differ.
THIN = [np.array(values) for values in ([], [0.5], [0.1, 0.2], [0.1] * 50, [0.0] * 50, [-0.1] * 50)]


@pytest.mark.parametrize("shift", [-0.1, 0.0, 0.1])
def test_paired_t_is_scipys(shift: float) -> None:
    differences = np.random.default_rng(7).normal(shift, 0.2, 60)
    expected = stats.ttest_1samp(differences, 0, alternative="greater").pvalue
    assert statistics.paired_t(differences) == pytest.approx(expected, rel=1e-10)


def test_paired_t_without_spread_or_records_claims_nothing_that_is_not_there() -> None:
    assert [statistics.paired_t(values) for values in THIN] == [1.0, 1.0, pytest.approx(0.102, abs=1e-3), 0.0, 1.0, 1.0]


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_adjusted_t_is_halls_transformation_in_its_closed_form(sign: int) -> None:
    differences = sign * (np.random.default_rng(9).exponential(1, 12) - 0.4)
    count, spread = differences.size, differences.std(ddof=1)
    skew = stats.skew(differences) * (differences.std() / spread) ** 3
    # The cubic is a whole cube: ((1 + g S / 3)^3 - 1) / g.
    cube = ((1 + skew * differences.mean() / spread / 3) ** 3 - 1) / skew
    expected = stats.t.sf(math.sqrt(count) * (cube + skew / (6 * count)), count - 1)
    assert statistics.skewness_adjusted_t(differences) == pytest.approx(expected, rel=1e-9)


def test_the_adjusted_t_is_t_where_there_is_no_skewness_or_nothing_to_estimate_it_from() -> None:
    scale = np.random.default_rng(7).normal(0, 0.2, 30)
    even = np.concatenate((scale, -scale)) + 0.03
    assert statistics.skewness_adjusted_t(even) == pytest.approx(statistics.paired_t(even), rel=1e-6)
    for thin in THIN:
        assert statistics.skewness_adjusted_t(thin) == statistics.paired_t(thin)


def test_differences_that_are_equal_but_for_rounding_are_equal() -> None:
    uneven = (np.random.default_rng(3).random(200) + 0.1) - np.random.default_rng(3).random(200)
    assert np.ptp(uneven) > 0
    assert statistics.interval(uneven, seed=1) == pytest.approx(statistics.interval(np.full(200, 0.1), seed=1))
    assert statistics.one_sided_p(-uneven) == 1.0


def test_a_continuous_metric_takes_the_larger_t_and_a_yes_or_no_one_mcnemar() -> None:
    for skewed in (column((0.026, 190), (-0.45, 10)), column((-0.026, 190), (0.6, 10))):
        both = (statistics.paired_t(skewed), statistics.skewness_adjusted_t(skewed))
        assert len(set(both)) == 2
        assert statistics.one_sided_p(skewed) == max(both)
    differences = column((1, 13), (-1, 3), (0, 84))
    assert statistics.one_sided_p(differences) == statistics.mcnemar_exact(13, 3)
    assert max(statistics.paired_t(differences), statistics.skewness_adjusted_t(differences)) < 0.006, "no t is asked"


def test_the_interval_is_scipys_bca_bootstrap_at_98_percent() -> None:
    differences = np.random.default_rng(1).exponential(0.2, 80) - 0.15
    expected = stats.bootstrap(
        (differences,),
        mean,
        vectorized=True,
        confidence_level=0.98,
        n_resamples=40_000,
        method="BCa",
        rng=np.random.default_rng(2),
    ).confidence_interval
    low, high = statistics.interval(differences, seed=3)
    width = float(expected.high - expected.low)
    assert low == pytest.approx(expected.low, abs=0.04 * width)
    assert high == pytest.approx(expected.high, abs=0.04 * width)


@pytest.mark.parametrize(
    ("wins", "losses"), [(4, 0), (5, 0), (7, 1), (8, 1), (10, 2), (12, 3), (14, 4), (20, 5), (60, 0)]
)
def test_the_interval_of_a_yes_or_no_metric_leaves_zero_out_only_where_the_test_shows_a_difference(
    wins: int, losses: int
) -> None:
    differences = column((1, wins), (-1, losses), (0, 200 - wins - losses))
    low, high = statistics.interval(differences, seed=1)
    assert (low > 0) == (statistics.mcnemar_exact(wins, losses) <= 0.01)
    worst, best = statistics.interval(-differences, seed=1)
    assert (worst, best) == pytest.approx((-high, -low), abs=0.01)


def test_equal_differences_do_not_claim_certainty() -> None:
    low, high = statistics.interval(np.ones(120), seed=1)
    # Clopper-Pearson: the lower 1 % bound of 120 in 120, times 1, less the rest at worst.
    bound = stats.binomtest(120, 120, alternative="greater").proportion_ci(0.99).low
    assert low == pytest.approx(2 * bound - 1)
    assert high == 1.0
    low, high = statistics.interval(np.zeros(120), seed=1)
    assert (low, high) == pytest.approx((bound - 1, 1 - bound))


@pytest.mark.parametrize("differences", [[], [0.3], [1.0, 0.0], [1.0] * 99 + [0.0], [0.0] * 99 + [-1.0]])
def test_a_thin_sample_gives_a_finite_interval_around_its_mean(differences: list[float]) -> None:
    low, high = statistics.interval(np.array(differences), seed=1)
    assert -1 <= low <= (sum(differences) / len(differences) if differences else 0) <= high <= 1
    assert low < high


def test_holm_adjusts_as_in_the_published_example_and_as_closed_testing_does() -> None:
    # The worked example of Wikipedia's article on the method: at .05 the first and the last are rejected.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # Marcus, Peritz and Gabriel 1976: Holm is the closed test by Bonferroni's over every set with that member.
    p_values = np.random.default_rng(9).random(6) ** 3
    sets = [chosen for size in range(1, 7) for chosen in itertools.combinations(range(6), size)]
    closed = [
        max(min(1.0, len(chosen) * min(p_values[list(chosen)])) for chosen in sets if place in chosen)
        for place in range(6)
    ]
    assert statistics.holm(p_values.tolist()) == pytest.approx(closed)
    assert statistics.holm([]) == []


@pytest.mark.parametrize("shift", [-0.1, 0.0, 0.03])
def test_the_upper_bound_of_a_continuous_change_is_scipys(shift: float) -> None:
    differences = np.random.default_rng(7).normal(shift, 0.2, 60)
    expected = stats.ttest_1samp(differences, 0, alternative="less").confidence_interval(0.95).high
    assert statistics.upper_bound(differences) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("wins", "losses", "ties"), [(3, 12, 85), (12, 3, 85), (0, 8, 92), (9, 0, 40), (30, 45, 300)])
def test_the_upper_bound_of_a_yes_or_no_change_is_clopper_pearsons(wins: int, losses: int, ties: int) -> None:
    differences = column((1, wins), (-1, losses), (0, ties))
    discordant = wins + losses
    share = stats.binomtest(wins, discordant, alternative="less").proportion_ci(0.95).high
    assert statistics.upper_bound(differences) == pytest.approx((2 * share - 1) * discordant / len(differences))


def test_the_bound_of_nothing_does_not_claim_certainty() -> None:
    assert statistics.upper_bound(np.array([])) == statistics.upper_bound(np.array([-0.5])) == 1.0
    bound = stats.binomtest(0, 100, alternative="less").proportion_ci(0.95).high
    assert statistics.upper_bound(np.zeros(100)) == pytest.approx(bound)


def test_the_error_of_a_weighted_change_is_what_redrawing_the_records_gives() -> None:
    random = np.random.default_rng(14)
    tokens = random.integers(1, 60, 300).astype(float)
    sums = np.column_stack([tokens * random.gamma(4, 0.3, 300), tokens * random.gamma(4, 0.31, 300)])
    sums[:, 1] = 0.7 * sums[:, 0] + 0.3 * sums[:, 1]
    weights = np.column_stack([tokens, tokens])
    change, error = statistics.ratio_change(sums, weights)
    assert change == pytest.approx(sums[:, 0].sum() / tokens.sum() - sums[:, 1].sum() / tokens.sum())
    draws = random.integers(0, 300, (4000, 300))
    again = (sums[draws, 0] - sums[draws, 1]).sum(axis=1) / tokens[draws].sum(axis=1)
    assert error == pytest.approx(float(again.std()), rel=0.06)


# Data that the tests are known to be too optimistic on, each against the bound that the gate states for it.


@pytest.mark.parametrize(("share", "size"), [(0.05, 0.5), (0.02, 0.9), (0.012, 1.0), (0.005, 1.0)])
def test_rare_catastrophes_hidden_in_small_gains_show_no_gain(share: float, size: float) -> None:
    random = np.random.default_rng(16)
    lost = random.random((1500, 200)) < share
    samples = np.where(lost, -size, size * share / (1 - share)) + random.normal(0, 0.01, (1500, 200))
    # With the t-tests alone up to 36 per cent: a sample in which not one of the losses fell cannot tell of them.
    assert np.mean([statistics.gain_p(sample) <= 0.01 for sample in samples]) <= 0.01


def test_one_loss_more_costs_no_power_where_differences_are_as_large_as_those_of_models() -> None:
    samples = np.random.default_rng(17).normal(0.045, 0.2, (500, 200))
    shown = [statistics.one_sided_p(sample) <= 0.01 for sample in samples]
    assert 0.75 < np.mean(shown) < 0.85
    assert [statistics.gain_p(sample) <= 0.01 for sample in samples] == shown
    exact = column((1, 13), (-1, 3), (0, 84))
    assert statistics.gain_p(exact) == statistics.mcnemar_exact(13, 3)
