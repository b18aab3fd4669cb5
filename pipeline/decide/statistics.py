"""
Paired tests, bounds and intervals of a metric's differences, candidate minus champion, one per group of records.

Differences are fractions (a metric of 0 to 1 gives -1 to 1). Every test is one-sided, for a gain; to test for a loss,
negate the differences. Pure functions; only the bootstrap takes a seed.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from pipeline.decide.policy import CONFIDENCE, LEVEL, WITH_ONE_LOSS_MORE

Floats = npt.NDArray[np.float64]

RESAMPLES = 9999
#: Differences that are equal but for this are equal: scores are sums of quotients and miss them in the last bits.
_EQUAL = 1e-12
_BLOCK = 500


def mcnemar_exact(wins: int, losses: int) -> float:
    """
    Return the one-sided p-value of the exact McNemar test: P(`wins` or more of the discordant records | no difference).

    It is 1 without a win. Source: McNemar 1947, in its exact conditional form: the wins among the discordant pairs are
    Binomial(n, 1/2), whose tail is the incomplete beta function I(1/2; wins, losses + 1) (Abramowitz and Stegun 1964,
    26.5.24).
    """
    return float(special.betainc(wins, losses + 1, 0.5)) if wins > 0 else 1.0


def paired_t(values: Floats) -> float:
    """
    Return the one-sided p-value of the paired t-test (Student 1908).

    t = mean / (s / sqrt(n)) has n - 1 degrees of freedom. Without spread there is no t: 0 for a constant gain, 1 for
    anything else; 1 for fewer than two records.
    """
    if values.size < 2:  # noqa: PLR2004 - one record has no spread
        return 1.0
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    if np.ptp(values) <= _EQUAL:
        return 0.0 if mean > 0 else 1.0
    # stdtr is the distribution function of Student's t.
    return float(special.stdtr(values.size - 1, -mean / (deviation / math.sqrt(values.size))))


def skewness_adjusted_t(values: Floats) -> float:
    """
    Return the one-sided p-value of the t-test on Hall's transformation, which removes the effect of skewness on t.

    With S = mean / s, skewness g and n records, T = sqrt(n) (S + g S^2 / 3 + g^2 S^3 / 27 + g / (6 n)) is compared with
    Student's t of n - 1 degrees of freedom (Hall 1992, On the removal of skewness by transformation). Unlike t, it
    allows for a sample of many small gains and few large losses having probably missed some of the losses. Without
    spread, or with no more than two records, it is `paired_t`.
    """
    if values.size < 3 or np.ptp(values) <= _EQUAL:  # noqa: PLR2004 - two records are never skewed
        return paired_t(values)
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    skewness = float(((values - mean) ** 3).mean()) / deviation**3
    share = mean / deviation
    removed = share + skewness * share**2 / 3 + skewness**2 * share**3 / 27 + skewness / (6 * values.size)
    return float(special.stdtr(values.size - 1, -math.sqrt(values.size) * removed))


def one_sided_p(values: Floats) -> float:
    """
    Return the one-sided p-value for a gain: exact McNemar if every value is -1, 0 or 1, else the larger t-test's.

    The values of a binary metric lie between if they are means of groups.
    """
    if is_yes_or_no(values):
        return mcnemar_exact(*count_signs(values))
    return max(paired_t(values), skewness_adjusted_t(values))


def gain_p(values: Floats) -> float:
    """
    Return the p-value on which a verdict rests: `one_sided_p`, or a fifth of that with one value of -1 added if larger.

    At a limit of .01 the gain must thus also have p <= .05 with one such loss more (`WITH_ONE_LOSS_MORE`). The exact
    test needs no such addition.
    """
    p_value = one_sided_p(values)
    return p_value if is_yes_or_no(values) else max(p_value, one_sided_p(np.append(values, -1.0)) / WITH_ONE_LOSS_MORE)


def count_signs(values: Floats) -> tuple[int, int]:
    """Return the number of positive and of negative differences; rounding errors count as 0."""
    return int(np.count_nonzero(values > _EQUAL)), int(np.count_nonzero(values < -_EQUAL))


def holm(p_values: Sequence[float]) -> list[float]:
    """
    Return the p-values, in their order, adjusted by Holm's method (1979), which bounds the familywise error rate.

    The smallest of m is multiplied by m, the next by m - 1 and so on; each is at least the one before it, and at most
    1.
    """
    adjusted, least = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def is_yes_or_no(values: Floats) -> bool:
    """Return whether every difference is -1, 0 or 1, so that the exact test of a binary metric applies."""
    return not bool(np.any(values * (values * values - 1)))


def upper_bound(values: Floats, confidence: float = 1 - LEVEL) -> float:
    """
    Return the one-sided upper confidence bound of the mean difference; at most 1.

    If all n differences are -1, 0 or 1, and d of them not 0, it is (2 q - 1) d / n, where q is the upper bound of the
    share of wins among these (Clopper and Pearson 1934): below zero exactly where `mcnemar_exact` shows a loss. If all
    are 0 it is the largest share of others that could probably be missed. Otherwise it is mean + t s / sqrt(n) (Student
    1908). 1 for fewer than two records.
    """
    if values.size < 2:  # noqa: PLR2004 - one record has no spread
        return 1.0
    if is_yes_or_no(values):
        wins, losses = count_signs(values)
        if wins + losses == 0:
            return float(1 - (1 - confidence) ** (1 / values.size))
        share = float(special.betaincinv(wins + 1, losses, confidence)) if losses else 1.0
        return (2 * share - 1) * (wins + losses) / values.size
    error = float(values.std(ddof=1)) / math.sqrt(values.size)
    return min(1.0, float(values.mean()) + float(special.stdtrit(values.size - 1, confidence)) * error)


def ratio_change(sums: Floats, weights: Floats) -> tuple[float, float]:
    """
    Return the candidate's weighted mean minus the champion's, over the same groups of records, and its standard error.

    `sums` and `weights` have the shape (groups, 2), for candidate and champion: summed NLL and tokens, say; each mean
    is the sum of its `sums` over the sum of its `weights`. The error is that of the linearised ratios (Cochran 1977,
    Sampling Techniques, 6.4), paired by group; NaN for fewer than two groups.
    """
    totals = weights.sum(axis=0)
    means = sums.sum(axis=0) / totals
    change = float(means[0] - means[1])
    if len(sums) < 2:  # noqa: PLR2004 - one group has no spread
        return change, math.nan
    rests = (sums - means * weights) / totals
    parts = rests[:, 0] - rests[:, 1]
    return change, math.sqrt(float((parts**2).sum()) * len(sums) / (len(sums) - 1))


def interval(values: Floats, seed: int) -> tuple[float, float]:
    """
    Return the two-sided 98 % interval of the mean difference: the BCa bootstrap (Efron 1987), within -1 and 1.

    Without values it is (-1, 1); where BCa gives no finite interval it is the percentile bootstrap's. If every value is
    -1, 0 or 1 it is widened to the exact bounds (`upper_bound`) where these are wider: with few discordant records the
    bootstrap excludes zero where the test shows nothing.

    If all differences are equal the bootstrap would claim certainty. Then at least q = (a/2)^(1/n) of the population
    has that value (Clopper and Pearson 1934 for n successes in n), and the rest may lie anywhere.
    """
    tail = (1 - CONFIDENCE) / 2
    if values.size == 0:
        return (-1.0, 1.0)
    if np.ptp(values) <= _EQUAL:
        share = tail ** (1 / values.size)
        middle = share * float(values[0])
        return (max(-1.0, middle - (1 - share)), min(1.0, middle + (1 - share)))
    low, high = _bootstrap(values, seed, "BCa")
    if not (math.isfinite(low) and math.isfinite(high)):
        # The bias correction is infinite when no resample lies below the mean, as with two or three records.
        low, high = _bootstrap(values, seed, "percentile")
    if is_yes_or_no(values):
        low, high = min(low, -upper_bound(-values, 1 - tail)), max(high, upper_bound(values, 1 - tail))
    return (max(-1.0, low), min(1.0, high))


def _bootstrap(values: Floats, seed: int, method: Literal["BCa", "percentile"]) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        bounds = stats.bootstrap(
            (values,),
            np.mean,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=_BLOCK,
            confidence_level=CONFIDENCE,
            method=method,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return (float(bounds.low), float(bounds.high))
