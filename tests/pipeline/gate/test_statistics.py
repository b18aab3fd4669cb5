"""The tests, bounds and intervals against scipy and published tables, never against themselves."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from pipeline.config import LEAST_P_VALUE
from pipeline.gate import statistics


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


@pytest.mark.parametrize("skew", ["losses", "gains"])
def test_the_adjusted_t_errs_about_as_often_as_it_says_where_t_errs_by_far_more_or_less(skew: str) -> None:
    random = np.random.default_rng(31)
    # Exponential differences with mean 0, skewness -2 or 2.
    samples = (1 - random.exponential(1, (20_000, 100))) * (1 if skew == "losses" else -1)
    by_t = np.mean([statistics.paired_t(sample) <= 0.01 for sample in samples])
    adjusted = np.mean([statistics.skewness_adjusted_t(sample) <= 0.01 for sample in samples])
    assert by_t > 0.02 if skew == "losses" else by_t < 0.004
    assert abs(adjusted - 0.01) < 0.004


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
    for thin in ([], [0.5], [0.1, 0.2], [0.1] * 50, [0.0] * 50, [-0.1] * 50):
        assert statistics.skewness_adjusted_t(thin) == statistics.paired_t(thin)


def test_differences_that_are_equal_but_for_rounding_are_equal() -> None:
    uneven = (np.random.default_rng(3).random(200) + 0.1) - np.random.default_rng(3).random(200)
    assert np.ptp(uneven) > 0
    assert statistics.interval(uneven, seed=1) == pytest.approx(statistics.interval([0.1] * 200, seed=1))
    assert statistics.one_sided_p(-uneven, continuous=True, seed=1) == 1.0


def test_a_continuous_metric_takes_the_largest_of_the_tests_and_exact_match_takes_mcnemar() -> None:
    for skewed in (np.array([0.026] * 190 + [-0.45] * 10), np.array([-0.026] * 190 + [0.6] * 10)):
        by_t = (statistics.paired_t(skewed), statistics.skewness_adjusted_t(skewed))
        every = (statistics.sign_flip(skewed, seed=4), *by_t)
        assert len(set(every)) == 3
        assert statistics.one_sided_p(skewed, continuous=True, seed=4) == max(every)
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


@pytest.mark.parametrize(
    ("wins", "losses"), [(4, 0), (5, 0), (7, 1), (8, 1), (10, 2), (12, 3), (14, 4), (20, 5), (60, 0)]
)
def test_the_interval_of_a_yes_or_no_metric_leaves_zero_out_only_where_the_test_shows_a_difference(
    wins: int, losses: int
) -> None:
    differences = [1.0] * wins + [-1.0] * losses + [0.0] * (200 - wins - losses)
    low, high = statistics.interval(differences, seed=1)
    assert (low > 0) == (statistics.mcnemar_exact(wins, losses) <= 0.01)
    worst, best = statistics.interval([-one for one in differences], seed=1)
    assert (worst, best) == pytest.approx((-high, -low), abs=0.01)


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


def test_the_t_test_alone_answers_where_it_is_already_too_large_and_never_changes_the_decision() -> None:
    random = np.random.default_rng(12)
    for seed in range(40):
        differences = random.normal(0.02, 0.2, 120)
        whole = statistics.one_sided_p(differences, continuous=True, seed=seed)
        quick = statistics.one_sided_p(differences, continuous=True, seed=seed, relevant=0.05)
        assert quick <= whole
        assert (quick <= 0.05) == (whole <= 0.05)
    # By t alone .00003; 9,999 flips of signs give no smaller p-value than 1 in 10,000.
    sample = random.normal(0, 1, 220)
    sure = 0.2 * (sample - sample.mean()) / sample.std(ddof=1) + 0.2 * 4.1 / math.sqrt(220)
    assert 0.00002 < statistics.paired_t(sure) < 0.00004
    assert statistics.one_sided_p(sure, continuous=True, seed=1, relevant=0.00005) >= 0.0001


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


def test_holm_of_one_is_the_test_itself_and_never_errs_more_than_the_level_together() -> None:
    assert statistics.holm([0.04]) == [0.04]
    random = np.random.default_rng(13)
    families = random.random((4000, 6))
    wrong = sum(min(statistics.holm(family.tolist())) <= 0.05 for family in families)
    assert stats.binomtest(wrong, 4000, 0.05, alternative="greater").pvalue > 0.001
    assert stats.binomtest(int((families.min(axis=1) <= 0.05).sum()), 4000, 0.05, alternative="greater").pvalue < 1e-9


@pytest.mark.parametrize("shift", [-0.1, 0.0, 0.03])
def test_the_upper_bound_of_a_continuous_change_is_scipys(shift: float) -> None:
    differences = np.random.default_rng(7).normal(shift, 0.2, 60)
    expected = stats.ttest_1samp(differences, 0, alternative="less").confidence_interval(0.95).high
    assert statistics.upper_bound(differences) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("wins", "losses", "ties"), [(3, 12, 85), (12, 3, 85), (0, 8, 92), (9, 0, 40), (30, 45, 300)])
def test_the_upper_bound_of_a_yes_or_no_change_is_clopper_pearsons(wins: int, losses: int, ties: int) -> None:
    differences = [1.0] * wins + [-1.0] * losses + [0.0] * ties
    discordant = wins + losses
    share = stats.binomtest(wins, discordant, alternative="less").proportion_ci(0.95).high
    assert statistics.upper_bound(differences) == pytest.approx((2 * share - 1) * discordant / len(differences))


@pytest.mark.parametrize("losses", range(26))
def test_the_bound_is_below_zero_exactly_where_the_test_shows_a_loss(losses: int) -> None:
    differences = [1.0] * (25 - losses) + [-1.0] * losses + [0.0] * 75
    shown = stats.binomtest(losses, 25, alternative="greater").pvalue <= 0.05
    assert (statistics.upper_bound(differences) < 0) == shown


def test_the_bound_of_nothing_does_not_claim_certainty() -> None:
    assert statistics.upper_bound([]) == statistics.upper_bound([-0.5]) == 1.0
    bound = stats.binomtest(0, 100, alternative="less").proportion_ci(0.95).high
    assert statistics.upper_bound([0.0] * 100) == pytest.approx(bound)


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


def test_catastrophes_are_counted_on_both_sides_and_tested_by_the_sign_test() -> None:
    differences = [-0.5] * 9 + [-0.7] * 3 + [0.6] * 2 + [0.49] * 80 + [-0.49] * 5
    lost, gained, p_value = statistics.catastrophes(differences)
    assert (lost, gained) == (12, 2)
    assert p_value == pytest.approx(stats.binomtest(12, 14, alternative="greater").pvalue)
    # 0.7 - 0.2 is a little under a half in binary.
    assert statistics.catastrophes([0.2 - 0.7])[0] == 1
    assert statistics.catastrophes([0.1] * 50) == (0, 0, 1.0)


# Data that the tests are known to be too optimistic on, each against the bound that the gate states for it.


def rejections(samples: statistics.Floats, level: float = 0.01) -> float:
    """Return how often a sample shows a gain by the gate's test for a continuous metric."""
    found = [
        statistics.one_sided_p(sample, continuous=True, seed=seed, relevant=level)
        for seed, sample in enumerate(samples)
    ]
    return float(np.mean(np.array(found) <= level))


def test_near_duplicates_must_not_be_counted_one_by_one() -> None:
    random = np.random.default_rng(15)
    # Groups of five records with a correlation of a half within the group and no gain.
    shared = np.repeat(random.normal(0, math.sqrt(0.5), (1500, 100)), 5, axis=1)
    rows = 0.19 * (shared + random.normal(0, math.sqrt(0.5), (1500, 500)))
    one_a_group = rows[:, ::5]
    assert rejections(rows) > 0.06
    assert stats.binomtest(round(1500 * rejections(one_a_group)), 1500, 0.01, alternative="greater").pvalue > 0.001


@pytest.mark.parametrize(("share", "size"), [(0.05, 0.5), (0.02, 0.49), (0.02, 0.9), (0.05, 0.9)])
def test_rare_catastrophes_hidden_in_small_gains_show_no_gain(share: float, size: float) -> None:
    random = np.random.default_rng(16)
    lost = random.random((1500, 200)) < share
    samples = np.where(lost, -size, size * share / (1 - share)) + random.normal(0, 0.01, (1500, 200))
    # Without the adjustment 3 to 9 per cent. A sample in which not one of the losses fell cannot tell of them.
    unseen = float(np.mean(~lost.any(axis=1)))
    assert rejections(samples[lost.any(axis=1)]) <= 0.01
    assert unseen < 0.03


def test_the_smallest_p_value_that_can_be_set_is_the_smallest_that_the_permutation_test_has() -> None:
    assert statistics.sign_flip([0.5] * 200, seed=1) == pytest.approx(LEAST_P_VALUE)


@pytest.mark.parametrize("shift", [0.04, 0.06, 0.08])
def test_tilted_coins_tell_what_many_fair_ones_do(shift: float) -> None:
    noise = np.random.default_rng(6).normal(0, 0.2, 100)
    differences = noise - noise.mean() + shift
    fair = statistics.sign_flip(differences, seed=1, permutations=400_000)
    tilted = [statistics.tilted_sign_flip(differences, seed, level=0.05 / 200) for seed in range(5)]
    # Of 400,000 fair ones some ten hits are left at the smallest p-value.
    assert tilted == pytest.approx([fair] * 5, rel=0.15, abs=1.5e-5)


def test_tilted_coins_on_ties_are_mcnemar_far_below_what_fair_ones_could_tell() -> None:
    differences = [0.5] * 60 + [-0.5] * 15 + [0.0] * 30
    exact = statistics.mcnemar_exact(60, 15)
    assert exact < 1e-7
    found = statistics.tilted_sign_flip(differences, seed=2, level=0.05 / 200)
    assert found == pytest.approx(exact, rel=0.2)
    assert statistics.tilted_sign_flip([-one for one in differences], seed=2, level=0.05 / 200) > 0.99
    assert 0 < statistics.tilted_sign_flip([0.5] * 200, seed=1, level=0.05 / 200) < 1e-20
    assert statistics.tilted_sign_flip([0.5] * 9, seed=1, level=0.05 / 200) == 2**-9


def test_tilted_coins_err_no_more_often_than_they_say_however_few_there_are() -> None:
    random = np.random.default_rng(7)
    found = np.array([
        statistics.tilted_sign_flip(random.laplace(0, 0.2, 20), seed, level=0.01, permutations=20)
        for seed in range(3000)
    ])  # fmt: skip
    for level in (0.01, 0.05):
        assert np.mean(found <= level) <= level + 3 * np.sqrt(level / 3000)
