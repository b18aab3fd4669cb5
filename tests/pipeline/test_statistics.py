"""The tests and intervals against scipy, published tables and direct counting, never against themselves."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from pipeline import statistics


def mean(sample: statistics.Floats, axis: int) -> statistics.Floats:
    return np.asarray(sample.mean(axis=axis))


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (7, 0), (13, 3), (3, 13), (60, 40), (116, 0)])
def test_mcnemar_is_the_one_sided_binomial_test_on_discordant_records(wins: int, losses: int) -> None:
    expected = stats.binomtest(wins, wins + losses, 0.5, alternative="greater").pvalue if wins + losses else 1.0
    assert statistics.mcnemar_exact(wins, losses) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_gives_the_published_binomial_table() -> None:
    # Siegel 1956, table D: one-tailed probabilities for P = Q = 1/2.
    assert round(statistics.mcnemar_exact(5, 0), 3) == 0.031
    assert round(statistics.mcnemar_exact(9, 1), 3) == 0.011
    assert round(statistics.mcnemar_exact(15, 5), 3) == 0.021


@pytest.mark.parametrize("seed", range(4))
def test_sign_flip_counts_all_signs_of_a_small_sample_as_scipy_does(seed: int) -> None:
    differences = np.random.default_rng(seed).normal(0.1, 0.3, 10)
    expected = stats.permutation_test(
        (differences,), mean, vectorized=True, permutation_type="samples", alternative="greater", n_resamples=2**10
    ).pvalue
    assert statistics.sign_flip(differences, seed=1) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.04])
def test_sign_flip_on_a_large_sample_agrees_with_scipy(shift: float) -> None:
    differences = np.random.default_rng(3).normal(shift, 0.2, 150)
    found = statistics.sign_flip(differences, seed=1)
    expected = stats.permutation_test(
        (differences,),
        mean,
        vectorized=True,
        permutation_type="samples",
        alternative="greater",
        n_resamples=9999,
        rng=np.random.default_rng(9),
    ).pvalue
    # Each is a share of 9,999 draws: five standard errors of their difference.
    assert abs(found - expected) < 5 * math.sqrt(2 * expected * (1 - expected) / 9999) + 1e-4


def test_sign_flip_on_ties_is_mcnemar() -> None:
    differences = [1.0] * 18 + [-1.0] * 8 + [0.0] * 74
    exact = stats.binomtest(18, 26, 0.5, alternative="greater").pvalue
    found = statistics.sign_flip(differences, seed=2, permutations=40_000)
    assert found == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 40_000))


def test_sign_flip_is_never_zero_and_repeats_itself() -> None:
    differences = np.full(200, 0.5)
    assert statistics.sign_flip(differences, seed=1) == 1 / 10_000
    noisy = np.random.default_rng(0).normal(0.01, 0.2, 100)
    assert statistics.sign_flip(noisy, seed=5) == statistics.sign_flip(noisy, seed=5)
    assert statistics.sign_flip(noisy, seed=5) != statistics.sign_flip(noisy, seed=6)


@pytest.mark.parametrize("shift", [-0.1, 0.0, 0.1])
def test_paired_t_is_scipys(shift: float) -> None:
    differences = np.random.default_rng(7).normal(shift, 0.2, 60)
    expected = stats.ttest_1samp(differences, 0, alternative="greater").pvalue
    assert statistics.paired_t(differences) == pytest.approx(expected, rel=1e-10)


def test_paired_t_without_spread_or_records_claims_nothing_that_is_not_there() -> None:
    assert statistics.paired_t([]) == 1.0
    assert statistics.paired_t([0.5]) == 1.0
    assert statistics.paired_t([0.0] * 50) == 1.0
    assert statistics.paired_t([-0.1] * 50) == 1.0
    assert statistics.paired_t([0.1] * 50) == 0.0


def test_a_continuous_metric_takes_the_larger_of_both_tests_and_exact_match_takes_mcnemar() -> None:
    skewed = np.array([0.026] * 190 + [-0.45] * 10)
    both = (statistics.sign_flip(skewed, seed=4), statistics.paired_t(skewed))
    assert both[0] != both[1]
    assert statistics.one_sided_p(skewed, continuous=True, seed=4) == max(both)
    yes_or_no = [1.0] * 13 + [-1.0] * 3 + [0.0] * 84
    assert statistics.one_sided_p(yes_or_no, continuous=False, seed=4) == statistics.mcnemar_exact(13, 3)


def test_the_larger_of_both_tests_errs_less_where_rare_large_losses_hide_among_small_gains() -> None:
    random = np.random.default_rng(11)
    runs, level = 600, 0.01
    hits = {"gate": 0, "flip": 0}
    for run in range(runs):
        lost = random.random(100) < 0.05
        differences = np.where(lost, -0.5, 0.5 * 0.05 / 0.95) + random.normal(0, 0.01, 100)
        flip = statistics.sign_flip(differences, seed=run, permutations=499)
        hits["flip"] += flip <= level
        hits["gate"] += max(flip, statistics.paired_t(differences)) <= level
    assert hits["gate"] < hits["flip"] / 2


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
    width = expected.high - expected.low
    assert low == pytest.approx(expected.low, abs=0.04 * width)
    assert high == pytest.approx(expected.high, abs=0.04 * width)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    runs = 200
    covered = 0
    for run in range(runs):
        low, high = statistics.interval(random.choice([-1.0, 0.0, 1.0], 150, p=[0.1, 0.75, 0.15]), seed=run)
        covered += low <= 0.05 <= high
    assert stats.binomtest(covered, runs, 0.98, alternative="less").pvalue > 1e-4


def test_equal_differences_do_not_claim_certainty() -> None:
    low, high = statistics.interval([1.0] * 120, seed=1)
    # Clopper-Pearson: the lower 1 % bound of 120 in 120, times 1, less the rest at worst.
    bound = stats.binomtest(120, 120, alternative="greater").proportion_ci(0.99).low
    assert low == pytest.approx(2 * bound - 1)
    assert high == 1.0
    low, high = statistics.interval([0.0] * 120, seed=1)
    assert (low, high) == pytest.approx((bound - 1, 1 - bound))


@pytest.mark.parametrize("differences", [[], [0.3], [1.0, 0.0], [1.0] * 99 + [0.0], [0.0] * 99 + [-1.0]])
def test_a_thin_sample_gives_a_finite_interval_around_its_mean(differences: list[float]) -> None:
    low, high = statistics.interval(differences, seed=1)
    assert -1 <= low <= (sum(differences) / len(differences) if differences else 0) <= high <= 1
    assert low < high


def direct_power(records: int, win: float, loss: float, alpha: float, min_gain: float) -> float:
    """Sum the trinomial over every outcome, testing each with scipy's binomial test."""
    total = 0.0
    for wins, losses in itertools.product(range(records + 1), repeat=2):
        if wins + losses > records or wins - losses < min_gain * records - 1e-9 or wins + losses == 0:
            continue
        if stats.binomtest(wins, wins + losses, alternative="greater").pvalue <= alpha:
            chances = (win, loss, 1 - win - loss)
            total += stats.multinomial.pmf((wins, losses, records - wins - losses), records, chances)
    return total


@pytest.mark.parametrize("min_gain", [0.0, 0.3])
def test_mcnemar_power_is_the_sum_over_every_outcome(min_gain: float) -> None:
    found = statistics.mcnemar_power(30, 0.45, 0.1, 0.01, min_gain)
    assert found == pytest.approx(direct_power(30, 0.45, 0.1, 0.01, min_gain), rel=1e-9)


def test_mcnemar_power_approaches_the_published_sample_size_formula() -> None:
    # Connor 1987: n = (z_a sqrt(psi) + z_b sqrt(psi - d^2))^2 / d^2, the conditional test being a little stricter.
    discordance, gain = 0.2, 0.03
    z_a, z_b = stats.norm.isf(0.01), stats.norm.isf(0.2)
    formula = (z_a * math.sqrt(discordance) + z_b * math.sqrt(discordance - gain**2)) ** 2 / gain**2
    found = statistics.mcnemar_power(round(formula), (discordance + gain) / 2, (discordance - gain) / 2, 0.01)
    assert found == pytest.approx(0.8, abs=0.02)


def test_t_power_is_what_a_simulation_with_scipys_test_finds() -> None:
    random = np.random.default_rng(8)
    samples = random.normal(0.06, 0.2, (4000, 100))
    share = float(np.mean(stats.ttest_1samp(samples, 0, axis=1, alternative="greater").pvalue <= 0.01))
    assert statistics.t_power(100, 0.06, 0.2, 0.01) == pytest.approx(share, abs=0.03)


def test_t_power_of_published_sample_sizes_is_80_percent() -> None:
    # G*Power 3.1, one sample, one tail, d = 0.5, alpha .05, power .80: 27.
    assert statistics.t_power(27, 0.5, 1.0, 0.05) >= 0.8 > statistics.t_power(26, 0.5, 1.0, 0.05)


def test_the_gain_that_promotes_at_least_is_part_of_the_power() -> None:
    # At a true gain of the minimum itself, half of the samples fall below it however many records there are.
    assert statistics.t_power(10**6, 0.01, 0.2, 0.01, min_gain=0.01) == pytest.approx(0.5, abs=0.01)
    assert statistics.mcnemar_power(10**6, 0.06, 0.05, 0.01, min_gain=0.01) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("continuous", [True, False])
def test_the_smallest_detectable_gain_has_80_percent_power(*, continuous: bool) -> None:
    random = np.random.default_rng(2)
    differences = random.normal(0, 0.2, 400) if continuous else random.choice([-1.0, 0.0, 1.0], 400, p=[0.1, 0.8, 0.1])
    gain = statistics.smallest_detectable_gain(differences, continuous=continuous, alpha=0.01, min_gain=0.01)
    assert gain is not None
    if continuous:
        z = stats.norm.isf(0.01) + stats.norm.isf(0.2)
        assert gain == pytest.approx(z * float(differences.std(ddof=1)) / math.sqrt(400), rel=0.02)
    else:
        rarer = (min(int((differences > 0).sum()), int((differences < 0).sum())) + 1) / 402
        wins = stats.binom.rvs(400, rarer + gain, size=4000, random_state=1)
        losses = stats.binom.rvs(400 - wins, rarer / (1 - rarer - gain), random_state=2)
        p_values = np.asarray(stats.binom.sf(wins - 1, wins + losses, 0.5))
        shown = (p_values <= 0.01) & (wins - losses >= 4)
        assert float(np.mean(shown)) == pytest.approx(0.8, abs=0.03)


def test_too_few_records_can_show_no_gain_at_all() -> None:
    assert statistics.smallest_detectable_gain([0.0] * 6, continuous=False, alpha=0.01, min_gain=0.0) is None
    assert statistics.smallest_detectable_gain([], continuous=True, alpha=0.01, min_gain=0.0) is None


def test_the_records_needed_are_the_published_number_for_the_observed_gain() -> None:
    scale = np.random.default_rng(4).normal(0, 1, 100)
    differences = 0.03 + 0.19 * (scale - scale.mean()) / scale.std(ddof=1)
    needed = statistics.records_needed(differences, continuous=True, alpha=0.01, min_gain=0.01)
    # Normal approximation (z_a + z_b)^2 sd^2 / d^2 = 403, and a few more for the estimated spread.
    assert needed is not None
    assert 403 <= needed <= 408
    yes_or_no = [1.0] * 23 + [-1.0] * 17 + [0.0] * 160
    needed = statistics.records_needed(yes_or_no, continuous=False, alpha=0.01, min_gain=0.01)
    assert needed is not None
    assert statistics.mcnemar_power(needed, 0.115, 0.085, 0.01, 0.01) >= 0.8
    assert needed == pytest.approx(2221, rel=0.05)


@pytest.mark.parametrize("differences", [[], [0.0] * 100, [-0.1] * 100, [0.01, 0.009] * 100])
def test_no_number_of_records_shows_a_gain_that_is_not_there_or_below_the_minimum(differences: list[float]) -> None:
    assert statistics.records_needed(differences, continuous=True, alpha=0.01, min_gain=0.01) is None
