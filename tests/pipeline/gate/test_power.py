"""Power and sample sizes against scipy, published tables, direct counting and simulation."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from pipeline.gate.resamples import DRAWS, Moments, Resamples, grow
from scipy import stats

from pipeline.gate import power, statistics
from pipeline.gate.power import GainTest, GuardModel, Watched, asked_power

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
    assert 403 <= needed <= 403 * 1.03
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
    whole = power.smallest_detectable_gain(differences, CONTINUOUS, GuardModel(differences, suites, CONTINUOUS, seed=1))
    assert alone is not None
    assert whole is not None
    assert whole.gain > alone.gain
    assert whole.test_power * 0.95 == pytest.approx(0.8, abs=0.01)
    assert (alone.costliest, whole.costliest) == (None, "general")


def test_a_guard_that_sees_the_gain_itself_costs_nearly_nothing_and_one_without_noise_nothing() -> None:
    differences = np.random.default_rng(22).normal(0, 0.2, 400)
    parts = (differences - differences.mean()) / 400
    same = GuardModel(differences, [Watched("slice", parts, slope=1.0)], CONTINUOUS, seed=1)
    assert same.passing(0.03, 0.8) == 1.0
    still = GuardModel(differences, [Watched("metric", np.zeros(400), margin=0.02)], CONTINUOUS, seed=1)
    assert still.passing(0.0, 0.5) == 1.0


def test_the_share_that_passes_is_what_the_tests_of_redrawn_records_let_pass() -> None:
    random = np.random.default_rng(23)
    gains = random.normal(0, 0.2, 300)
    other = random.normal(0, 0.1, 300)
    guard_model = GuardModel(gains, [Watched("metric", (other - other.mean()) / 300, margin=0.008)], CONTINUOUS, seed=1)
    draws = random.integers(0, 300, (4000, 300))
    redrawn = (other - other.mean())[draws]
    harmed = stats.ttest_1samp(redrawn, 0, axis=1, alternative="less").pvalue <= 0.05
    expected = 1 - float(np.mean(harmed | (redrawn.mean(axis=1) < -0.008)))
    assert guard_model.passing(0.0, 1.0) == pytest.approx(expected, abs=0.025)


def test_where_the_guards_stop_too_many_no_gain_is_called_detectable() -> None:
    differences = np.random.default_rng(24).normal(0, 0.2, 400)
    strict = [Watched(f"kind {number}", 0.02, margin=0.005) for number in range(3)]
    guard_model = GuardModel(differences, strict, CONTINUOUS, seed=1)
    assert power.smallest_detectable_gain(differences, CONTINUOUS, guard_model) is None
    # A loss of 0.005 where the error is 0.02 happens to 0.4 of good candidates, three times over.
    passing = stats.norm.sf(-0.25) ** 3
    rarely = power.smallest_detectable_gain(differences, CONTINUOUS, guard_model, power=passing - 0.03)
    assert rarely is not None
    assert rarely.power == passing - 0.03
    assert power.smallest_detectable_gain(differences, CONTINUOUS, guard_model, power=passing + 0.03) is None


def test_the_costliest_guards_are_those_that_stop_the_most_good_candidates() -> None:
    differences = np.random.default_rng(25).normal(0, 0.2, 400)
    kinds = [Watched("general", 0.02, margin=0.04), Watched("empty", 0.02, tested=False, margin=0.01)]
    assert GuardModel(differences, kinds, CONTINUOUS, seed=1).costliest(0.05, 0.9) == "empty"
    assert GuardModel(differences, kinds[:1], CONTINUOUS, seed=1).costliest(0.05, 0.9) == "general"
    sure = [Watched("size", 0.001, tested=False, margin=0.1)]
    assert GuardModel(differences, sure, CONTINUOUS, seed=1).costliest(0.05, 0.9) is None


def test_the_draws_of_a_large_heldout_set_take_little_memory() -> None:
    differences, others = np.random.default_rng(1).normal(0, 0.3, (2, 20_000))
    tracemalloc.start()
    guard_model = GuardModel(differences, [Watched("metric", others / others.size)], CONTINUOUS, seed=2)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100_000_000
    assert guard_model.passing(0.0, 0.5) == pytest.approx(0.95, abs=0.02)


#: Four of 200 records lose much, the others gain a little.
SKEWED = np.r_[np.full(4, -0.45), np.random.default_rng(5).normal(0.02, 0.02, 196)]


@pytest.mark.parametrize("values", [SKEWED, -SKEWED, np.random.default_rng(6).normal(0, 0.1, 40), np.full(30, 0.1)])
def test_the_gain_that_a_draw_needs_is_where_both_t_tests_and_the_least_gain_begin_to_pass(
    values: statistics.Floats,
) -> None:
    centred = values - values.mean()
    drawn = np.random.default_rng(7).choice(centred, (50, centred.size))
    sums = np.column_stack([(drawn**power).sum(axis=1) for power in (1, 2, 3)])
    for sample, needed in zip(drawn, Moments.of(sums, centred.size).needed_gains(0.01, 0.01), strict=True):
        for gain, passes in ((needed - 1e-6, False), (needed + 1e-6, True)):
            found = sample + gain
            p_value = max(statistics.paired_t(found), statistics.skewness_adjusted_t(found))
            assert (p_value <= 0.01 and found.mean() >= 0.01) == passes


def test_few_large_losses_make_the_smallest_gain_as_large_as_the_skewness_adjusted_t_asks() -> None:
    found = power.smallest_detectable_gain(SKEWED, CONTINUOUS)
    assert found is not None
    by_t = next(gain for gain in np.arange(0, 0.1, 1e-4) if power.t_power(200, gain, SKEWED.std(ddof=1), 0.01) >= 0.8)
    assert found.gain > 1.4 * by_t
    drawn = np.random.default_rng(8).choice(SKEWED - SKEWED.mean() + found.gain, (1500, 200))
    shown = [max(statistics.paired_t(one), statistics.skewness_adjusted_t(one)) <= 0.01 for one in drawn]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.03)


def test_many_small_losses_and_few_large_gains_promise_no_more_than_t_does() -> None:
    found = power.smallest_detectable_gain(-SKEWED, CONTINUOUS)
    assert found is not None
    assert power.t_power(200, found.gain, float(SKEWED.std(ddof=1)), 0.01) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("gain", [0.015, 0.02, 0.03])
def test_as_many_skewed_records_as_are_needed_show_the_gain(gain: float) -> None:
    differences = SKEWED - SKEWED.mean() + gain
    needed = power.records_needed(differences, CONTINUOUS)
    assert needed is not None
    drawn = np.random.default_rng(9).choice(differences, (1500, needed))
    shown = [
        max(statistics.paired_t(one), statistics.skewness_adjusted_t(one)) <= 0.01 and one.mean() >= 0.01
        for one in drawn
    ]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.035)


def test_a_grown_set_is_drawn_from_like_records_drawn_one_by_one() -> None:
    values = np.r_[np.full(20, -0.45), np.random.default_rng(5).normal(0.02, 0.02, 980)]
    one_by_one = Resamples(values, np.empty((1000, 0)), 1).moments.needed_gains(0.01, 0.01)
    grown = grow(values, 1000, 2).needed_gains(0.01, 0.01)
    shares = (0.1, 0.5, 0.8, 0.95)
    assert np.quantile(grown, shares) == pytest.approx(np.quantile(one_by_one, shares), rel=0.03)


def test_what_is_resampled_does_not_depend_on_the_order_of_the_differences() -> None:
    turned = np.random.default_rng(1).permutation(SKEWED + 0.01)
    for found in (power.smallest_detectable_gain, power.records_needed):
        assert found(turned, CONTINUOUS) == found(np.sort(turned), CONTINUOUS)


def test_the_records_drawn_have_the_catastrophes_that_the_guard_counts() -> None:
    values = np.r_[np.full(6, -0.7), np.full(5, 0.45), np.random.default_rng(3).normal(0, 0.02, 189)]
    centred = np.sort(values) - values.mean()
    # A column a record: how often it was drawn.
    drawn = Resamples(values, np.eye(200)[np.argsort(np.argsort(values, kind="stable"))], 4)
    counts = np.rint(drawn.errors + 1).astype(int)
    winners = np.arange(100)
    for gain in (0.0, 0.06, 0.25):
        expected = [statistics.catastrophes(np.repeat(centred, counts[one]) + gain)[2] for one in winners]
        assert drawn.catastrophes(gain, winners) == pytest.approx(np.array(expected))
    assert len({*drawn.catastrophes(0.06, np.arange(DRAWS)).tolist()}) > 10


def test_guards_that_take_more_never_make_the_test_ask_for_less() -> None:
    cases = [(0.8, 0.8), (0.8, 0.9), (0.8, 0.999), (0.7, 0.75), (0.7, 0.999), (0.5, 0.55)]
    asked = [asked_power(power.Detectable(0.1, whole, test)) for whole, test in cases]
    assert asked == pytest.approx([0.8, 0.9, 0.95, 0.8 * 0.75 / 0.7, 0.95, 0.8 * 0.55 / 0.5])
    assert asked_power(None) == 0.95
