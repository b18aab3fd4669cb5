"""
Paired tests, intervals and power on per-record differences of one metric, candidate minus champion.

Differences are fractions (a metric of 0 to 1 gives -1 to 1), one a record; every test is one-sided, for a gain. Pure
functions: what is random takes its seed.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.98
PERMUTATIONS = 9999
RESAMPLES = 9999
#: Up to this many non-zero differences all sign patterns are tried (2^13 < 9999), so the test is exact.
EXACT_SIGNS = 13
#: No advice asks for more held-out records than this.
MOST_RECORDS = 1_000_000
_BLOCK = 500


def mcnemar_exact(wins: int, losses: int) -> float:
    """
    Return the one-sided p-value of the exact McNemar test: P(`wins` or more of the discordant records | no difference).

    Source: McNemar 1947, in its exact conditional form: the wins among the discordant pairs are Binomial(n, 1/2).
    """
    return float(stats.binom.sf(wins - 1, wins + losses, 0.5))


def sign_flip(differences: Sequence[float] | Floats, seed: int, permutations: int = PERMUTATIONS) -> float:
    """
    Return the one-sided p-value of the paired permutation test on the mean difference.

    Under no difference each sign is a fair coin (Fisher 1935). With at most `EXACT_SIGNS` non-zero differences all sign
    patterns are counted; else `permutations` random ones, and the observed one counts with them, so p is never 0
    (Phipson and Smyth 2010, (b + 1) / (m + 1)).
    """
    moved = np.asarray(differences, dtype=np.float64)
    moved = moved[moved != 0]
    observed = float(moved.sum())
    # Sums of the same numbers in another order may differ in the last bits; such a one is a tie, and ties count.
    least = observed - 1e-12 * max(1.0, float(np.abs(moved).sum()))
    if moved.size <= EXACT_SIGNS:
        flips = (np.arange(2**moved.size)[:, None] >> np.arange(moved.size)) & 1
        return float(np.mean(observed - 2 * (flips @ moved) >= least))
    random = np.random.default_rng(seed)
    reached = 0
    for start in range(0, permutations, _BLOCK):
        flips = random.integers(0, 2, size=(min(_BLOCK, permutations - start), moved.size), dtype=np.int8)
        reached += int(np.count_nonzero(observed - 2 * (flips @ moved) >= least))
    return (reached + 1) / (permutations + 1)


def paired_t(differences: Sequence[float] | Floats) -> float:
    """
    Return the one-sided p-value of the paired t-test (Student 1908).

    t = mean / (s / sqrt(n)) has n - 1 degrees of freedom. Without spread there is no t: 0 for a constant gain, 1 for
    anything else; 1 for fewer than two records.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.size < 2:  # noqa: PLR2004 - one record has no spread
        return 1.0
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    if np.ptp(values) == 0 or deviation == 0:
        return 0.0 if mean > 0 else 1.0
    return float(stats.t.sf(mean / (deviation / math.sqrt(values.size)), values.size - 1))


def one_sided_p(differences: Sequence[float] | Floats, *, continuous: bool, seed: int) -> float:
    """
    Return the p-value that the gate uses: exact McNemar for a yes-or-no metric, else the larger of sign-flip and t.

    Either of the two is too optimistic on some data (a few large losses among many small gains); the larger is not.
    """
    if continuous:
        return max(sign_flip(differences, seed), paired_t(differences))
    values = np.asarray(differences, dtype=np.float64)
    return mcnemar_exact(int(np.count_nonzero(values > 0)), int(np.count_nonzero(values < 0)))


def interval(differences: Sequence[float] | Floats, seed: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """
    Return the two-sided interval of the mean difference: the BCa bootstrap (Efron 1987), within -1 and 1.

    Where all differences are equal the bootstrap would claim certainty. There at least q = (a/2)^(1/n) of the
    population has that value (Clopper and Pearson 1934 for n successes in n), and the rest may lie anywhere.
    """
    values = np.asarray(differences, dtype=np.float64)
    tail = (1 - confidence) / 2
    if values.size == 0:
        return (-1.0, 1.0)
    if np.ptp(values) == 0:
        share = tail ** (1 / values.size)
        middle = share * float(values[0])
        return (max(-1.0, middle - (1 - share)), min(1.0, middle + (1 - share)))
    low, high = _bootstrap(values, seed, confidence, "BCa")
    if not (math.isfinite(low) and math.isfinite(high)):
        # The bias correction is infinite when no resample lies below the mean, as with two or three records.
        low, high = _bootstrap(values, seed, confidence, "percentile")
    return (max(-1.0, low), min(1.0, high))


def _mean(samples: Floats, axis: int) -> Floats:
    return np.asarray(samples.mean(axis=axis))


def _bootstrap(
    values: Floats, seed: int, confidence: float, method: Literal["BCa", "percentile"]
) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (values,), _mean, vectorized=True, n_resamples=RESAMPLES, batch=_BLOCK, confidence_level=confidence,
            method=method, rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
    return (float(found.low), float(found.high))


def mcnemar_power(records: int, win_rate: float, loss_rate: float, alpha: float, min_gain: float = 0.0) -> float:
    """
    Return the exact chance that so many records give p <= `alpha` in `mcnemar_exact` and a gain of `min_gain` or more.

    `win_rate` and `loss_rate` are the population's shares of records won and lost. Summed over the number d of
    discordant records, Binomial(n, win + loss), and the wins among them, Binomial(d, win / (win + loss)) (the exact
    unconditional power of Duffy 1984).
    """
    discordance = min(1.0, win_rate + loss_rate)
    if discordance == 0:
        return 0.0
    spread = 9 * math.sqrt(records * discordance * (1 - discordance)) + 1
    first = max(0, math.floor(records * discordance - spread))
    counts = np.arange(first, min(records, math.ceil(records * discordance + spread)) + 1)
    # The smallest number of wins with sf(wins - 1) <= alpha; isf gives the smallest k with sf(k) <= alpha.
    significant = stats.binom.isf(alpha, counts, 0.5) + 1
    large_enough = np.ceil((counts + min_gain * records) / 2 - 1e-9)
    needed = np.maximum(significant, large_enough)
    chances = stats.binom.sf(needed - 1, counts, win_rate / (win_rate + loss_rate))
    return float(stats.binom.pmf(counts, records, discordance) @ chances)


def t_power(records: int, gain: float, spread: float, alpha: float, min_gain: float = 0.0) -> float:
    """
    Return the chance that so many records give p <= `alpha` in `paired_t` and a gain of `min_gain` or more.

    `gain` and `spread` are the population's mean and standard deviation of the differences. The t-test's power is that
    of the noncentral t (Johnson and Welch 1940); both conditions ask for a large mean, so the rarer one decides.
    """
    if records < 2:  # noqa: PLR2004 - one record has no spread
        return 0.0
    if spread == 0:
        return 1.0 if gain > 0 and gain >= min_gain else 0.0
    scale = math.sqrt(records) / spread
    critical = float(stats.t.isf(alpha, records - 1))
    significant = float(stats.nct.sf(critical, records - 1, gain * scale))
    if not math.isfinite(significant):
        significant = float(stats.norm.sf(critical - gain * scale))
    return min(significant, float(stats.norm.sf((min_gain - gain) * scale)))


def smallest_detectable_gain(
    differences: Sequence[float] | Floats, *, continuous: bool, alpha: float, min_gain: float, power: float = 0.8
) -> float | None:
    """
    Return the smallest true gain that as many records with this much noise would show with the given power.

    Noise is the standard deviation of the differences, or, for a yes-or-no metric, the share of records that go the
    other way (the rarer direction, by the rule of succession: none seen does not mean none to come). `None` if not
    even the largest gain would be shown. Exact for McNemar.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.size == 0:
        return None
    rarer = min(int(np.count_nonzero(values > 0)), int(np.count_nonzero(values < 0)))
    against = (rarer + 1) / (values.size + 2)
    spread = float(values.std(ddof=1)) if values.size > 1 else 0.0
    largest = 1.0 if continuous else 1 - 2 * against

    def chance(gain: float) -> float:
        if continuous:
            return t_power(values.size, gain, spread, alpha, min_gain)
        return mcnemar_power(values.size, against + gain, against, alpha, min_gain)

    if largest <= 0 or chance(largest) < power:
        return None
    low, high = 0.0, largest
    while high - low > 1e-5:  # noqa: PLR2004 - a thousandth of a point
        middle = (low + high) / 2
        low, high = (low, middle) if chance(middle) >= power else (middle, high)
    return high


def records_needed(
    differences: Sequence[float] | Floats, *, continuous: bool, alpha: float, min_gain: float, power: float = 0.8
) -> int | None:
    """
    Return how many records in all would show the observed gain, if it is the true one, with the given power.

    `None` where no number would (no gain, or one that is not above the smallest that promotes) or only more than
    `MOST_RECORDS`.
    """
    values = np.asarray(differences, dtype=np.float64)
    gain = float(values.mean()) if values.size else 0.0
    if gain <= 0:
        return None
    spread = float(values.std(ddof=1)) if values.size > 1 else 0.0
    wins, losses = (float(np.mean(side)) for side in (values > 0, values < 0))

    def chance(records: int) -> float:
        if continuous:
            return t_power(records, gain, spread, alpha, min_gain)
        return mcnemar_power(records, wins, losses, alpha, min_gain)

    high = 2
    while chance(high) < power:
        high *= 2
        if high > MOST_RECORDS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if chance(middle) >= power else (middle, high)
    return high
