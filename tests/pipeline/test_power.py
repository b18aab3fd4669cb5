"""Power and sample sizes against scipy, published tables, direct counting and simulation."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from pipeline import power
from pipeline.power import GainTest, Hurdles, Watched

YES_OR_NO = GainTest(continuous=False, alpha=0.01, min_gain=0.01)
CONTINUOUS = GainTest(continuous=True, alpha=0.01, min_gain=0.01)


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
    found = power.mcnemar_power(30, 0.45, 0.1, 0.01, min_gain)
    assert found == pytest.approx(direct_power(30, 0.45, 0.1, 0.01, min_gain), rel=1e-9)


def test_mcnemar_power_approaches_the_published_sample_size_formula() -> None:
    # Connor 1987: n = (z_a sqrt(psi) + z_b sqrt(psi - d^2))^2 / d^2, the conditional test being a little stricter.
    discordance, gain = 0.2, 0.03
    z_a, z_b = stats.norm.isf(0.01), stats.norm.isf(0.2)
    formula = (z_a * math.sqrt(discordance) + z_b * math.sqrt(discordance - gain**2)) ** 2 / gain**2
    found = power.mcnemar_power(round(formula), (discordance + gain) / 2, (discordance - gain) / 2, 0.01)
    assert found == pytest.approx(0.8, abs=0.02)


def test_t_power_is_what_a_simulation_with_scipys_test_finds() -> None:
    random = np.random.default_rng(8)
    samples = random.normal(0.06, 0.2, (4000, 100))
    share = float(np.mean(stats.ttest_1samp(samples, 0, axis=1, alternative="greater").pvalue <= 0.01))
    assert power.t_power(100, 0.06, 0.2, 0.01) == pytest.approx(share, abs=0.03)


def test_t_power_of_published_sample_sizes_is_80_percent() -> None:
    # G*Power 3.1, one sample, one tail, d = 0.5, alpha .05, power .80: 27.
    assert power.t_power(27, 0.5, 1.0, 0.05) >= 0.8 > power.t_power(26, 0.5, 1.0, 0.05)


def test_the_gain_that_promotes_at_least_is_part_of_the_power() -> None:
    # At a true gain of the minimum itself, half of the samples fall below it however many records there are.
    assert power.t_power(10**6, 0.01, 0.2, 0.01, min_gain=0.01) == pytest.approx(0.5, abs=0.01)
    assert power.mcnemar_power(10**6, 0.06, 0.05, 0.01, min_gain=0.01) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("continuous", [True, False])
def test_the_smallest_detectable_gain_has_80_percent_power(*, continuous: bool) -> None:
    random = np.random.default_rng(2)
    differences = random.normal(0, 0.2, 400) if continuous else random.choice([-1.0, 0.0, 1.0], 400, p=[0.1, 0.8, 0.1])
    found = power.smallest_detectable_gain(differences, CONTINUOUS if continuous else YES_OR_NO)
    assert found is not None
    gain = found.gain
    assert found.test_power == pytest.approx(0.8, abs=0.002)
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
    assert power.smallest_detectable_gain([0.0] * 6, YES_OR_NO) is None
    assert power.smallest_detectable_gain([], CONTINUOUS) is None


def test_the_records_needed_are_the_published_number_for_the_observed_gain() -> None:
    scale = np.random.default_rng(4).normal(0, 1, 100)
    differences = 0.03 + 0.19 * (scale - scale.mean()) / scale.std(ddof=1)
    needed = power.records_needed(differences, CONTINUOUS)
    # Normal approximation (z_a + z_b)^2 sd^2 / d^2 = 403, and a few more for the estimated spread.
    assert needed is not None
    assert 403 <= needed <= 408
    yes_or_no = [1.0] * 23 + [-1.0] * 17 + [0.0] * 160
    needed = power.records_needed(yes_or_no, YES_OR_NO)
    assert needed is not None
    assert power.mcnemar_power(needed, 0.115, 0.085, 0.01, 0.01) >= 0.8
    assert needed == pytest.approx(2221, rel=0.05)


@pytest.mark.parametrize("differences", [[], [0.0] * 100, [-0.1] * 100, [0.01, 0.009] * 100])
def test_no_number_of_records_shows_a_gain_that_is_not_there_or_below_the_minimum(differences: list[float]) -> None:
    assert power.records_needed(differences, CONTINUOUS) is None


def test_guards_make_the_smallest_gain_larger_so_that_the_whole_decision_keeps_its_power() -> None:
    random = np.random.default_rng(21)
    differences = random.normal(0, 0.2, 400)
    # Two suites of general abilities that a good candidate leaves as they are: Holm's 5 % together.
    suites = [Watched("general", 0.02), Watched("general", 0.03)]
    alone = power.smallest_detectable_gain(differences, CONTINUOUS)
    whole = power.smallest_detectable_gain(differences, CONTINUOUS, Hurdles(differences, suites, seed=1))
    assert alone is not None
    assert whole is not None
    assert whole.gain > alone.gain
    assert whole.test_power * 0.95 == pytest.approx(0.8, abs=0.01)
    assert (alone.dearest, whole.dearest) == (None, "general")


def test_a_guard_that_sees_the_gain_itself_costs_nearly_nothing_and_one_without_noise_nothing() -> None:
    differences = np.random.default_rng(22).normal(0, 0.2, 400)
    parts = (differences - differences.mean()) / 400
    same = Hurdles(differences, [Watched("slice", parts, slope=1.0)], seed=1)
    assert same.passing(0.03, 0.8) == 1.0
    still = Hurdles(differences, [Watched("metric", np.zeros(400), margin=0.02)], seed=1)
    assert still.passing(0.0, 0.5) == 1.0


def test_the_share_that_passes_is_what_the_tests_of_redrawn_records_let_pass() -> None:
    random = np.random.default_rng(23)
    gains = random.normal(0, 0.2, 300)
    other = random.normal(0, 0.1, 300)
    hurdles = Hurdles(gains, [Watched("metric", (other - other.mean()) / 300, margin=0.008)], seed=1)
    draws = random.integers(0, 300, (4000, 300))
    redrawn = (other - other.mean())[draws]
    harmed = stats.ttest_1samp(redrawn, 0, axis=1, alternative="less").pvalue <= 0.05
    expected = 1 - float(np.mean(harmed | (redrawn.mean(axis=1) < -0.008)))
    assert hurdles.passing(0.0, 1.0) == pytest.approx(expected, abs=0.025)


def test_where_the_guards_stop_too_many_no_gain_is_called_detectable() -> None:
    differences = np.random.default_rng(24).normal(0, 0.2, 400)
    strict = [Watched(f"kind {number}", 0.02, margin=0.005) for number in range(3)]
    hurdles = Hurdles(differences, strict, seed=1)
    assert power.smallest_detectable_gain(differences, CONTINUOUS, hurdles) is None
    # A loss of 0.005 where the error is 0.02 happens to 0.4 of good candidates, three times over.
    passing = stats.norm.sf(-0.25) ** 3
    rarely = power.smallest_detectable_gain(differences, CONTINUOUS, hurdles, power=passing - 0.03)
    assert rarely is not None
    assert rarely.power == passing - 0.03
    assert power.smallest_detectable_gain(differences, CONTINUOUS, hurdles, power=passing + 0.03) is None


def test_the_dearest_guards_are_those_that_stop_the_most_good_candidates() -> None:
    differences = np.random.default_rng(25).normal(0, 0.2, 400)
    kinds = [Watched("general", 0.02, margin=0.04), Watched("empty", 0.02, tested=False, margin=0.01)]
    assert Hurdles(differences, kinds, seed=1).dearest(0.05, 0.9) == "empty"
    assert Hurdles(differences, kinds[:1], seed=1).dearest(0.05, 0.9) == "general"
    sure = [Watched("size", 0.001, tested=False, margin=0.1)]
    assert Hurdles(differences, sure, seed=1).dearest(0.05, 0.9) is None


def test_the_draws_of_a_large_heldout_set_take_little_memory() -> None:
    differences, others = np.random.default_rng(1).normal(0, 0.3, (2, 20_000))
    tracemalloc.start()
    hurdles = Hurdles(differences, [Watched("metric", others / others.size)], seed=2)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100_000_000
    assert hurdles.passing(0.0, 0.5) == pytest.approx(0.95, abs=0.02)
