"""
Paired tests, bounds and intervals on per-record differences of one metric, candidate minus champion.

Differences are fractions (a metric of 0 to 1 gives -1 to 1), one a record; every test is one-sided, for a gain: for a
loss it is asked with the signs turned. Pure functions: what is random takes its seed.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import special, stats

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.98
PERMUTATIONS = 9999
RESAMPLES = 9999
#: So many tests together (Holm) can still have a p-value below .001 from fair coins.
FEW_TESTS = 5
#: Up to this many non-zero differences all sign patterns are tried (2^13 < 9999), so the test is exact.
EXACT_SIGNS = 13
#: A change of one record's score by so much is a catastrophe, or the opposite of one.
CATASTROPHE = 0.5
#: Differences that are equal but for this are equal: scores are sums of quotients and miss them in the last bits.
_EQUAL = 1e-12
_BLOCK = 500
#: Sign patterns tried together: a block stays in the processor's cache.
_FLIPS = 128


def mcnemar_exact(wins: int, losses: int) -> float:
    """
    Return the one-sided p-value of the exact McNemar test: P(`wins` or more of the discordant records | no difference).

    Source: McNemar 1947, in its exact conditional form: the wins among the discordant pairs are Binomial(n, 1/2), whose
    tail is the incomplete beta function I(1/2; wins, losses + 1) (Abramowitz and Stegun 1964, 26.5.24).
    """
    return float(special.betainc(wins, losses + 1, 0.5)) if wins > 0 else 1.0


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
    reached, width = 0, -(-moved.size // 8)
    for start in range(0, permutations, _FLIPS):
        rows = min(_FLIPS, permutations - start)
        coins = np.frombuffer(random.bytes(rows * width), dtype=np.uint8).reshape(rows, width)
        flips = np.unpackbits(coins, axis=1, count=moved.size).astype(np.float64)
        reached += int(np.count_nonzero(observed - 2 * (flips @ moved) >= least))
    return (reached + 1) / (permutations + 1)


def tilted_sign_flip(
    differences: Sequence[float] | Floats, seed: int, level: float, permutations: int = PERMUTATIONS
) -> float:
    """
    Return the p-value of `sign_flip` with coins that favour a gain, so that p-values about `level` are told by few.

    Fair coins would need a hundred times as many flips as one p-value of `level` does. A difference d keeps its size
    and is positive with the odds exp(2 u d), u = z / sqrt(sum d^2) with z the normal deviate of `level` (exponential
    tilting, Siegmund 1976), and a pattern with the sum S counts w = prod cosh(u d) / exp(u S). With the observed one
    among them, p = (w + sum of the w that reach it) / (m + 1) errs no more often than it says (Harrison 2012,
    Conservative hypothesis tests and confidence intervals using importance sampling): u does not depend on the signs.
    Up to `EXACT_SIGNS` non-zero differences all patterns are counted, as there.
    """
    values = np.asarray(differences, dtype=np.float64)
    moved = np.abs(values[values != 0])
    if moved.size <= EXACT_SIGNS:
        return sign_flip(values, seed, permutations)
    observed = float(values.sum())
    least = observed - 1e-12 * max(1.0, float(moved.sum()))
    tilt = float(-special.ndtri(level)) / math.sqrt(float((moved**2).sum()))
    constant = float(np.log(np.cosh(tilt * moved)).sum())
    positive = special.expit(2 * tilt * moved).astype(np.float32)
    random = np.random.default_rng(seed)
    reached = math.exp(constant - tilt * observed)
    for start in range(0, permutations, _FLIPS):
        coins = random.random((min(_FLIPS, permutations - start), moved.size), dtype=np.float32)
        sums = 2 * ((coins < positive).astype(np.float64) @ moved) - moved.sum()
        reached += float(np.exp(constant - tilt * sums[sums >= least]).sum())
    return min(1.0, reached / (permutations + 1))


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
    if np.ptp(values) <= _EQUAL:
        return 0.0 if mean > 0 else 1.0
    # stdtr is the distribution function of Student's t.
    return float(special.stdtr(values.size - 1, -mean / (deviation / math.sqrt(values.size))))


def skewness_adjusted_t(differences: Sequence[float] | Floats) -> float:
    """
    Return the one-sided p-value of the t-test on Hall's transformation, which takes the skewness out of t.

    With S = mean / s, skewness g and n records, T = sqrt(n) (S + g S^2 / 3 + g^2 S^3 / 27 + g / (6 n)) is compared with
    Student's t of n - 1 degrees of freedom (Hall 1992, On the removal of skewness by transformation). It knows what t
    does not: a sample of many small gains and few large losses has probably missed some of the losses. Where there is
    no spread, or no more than two records, it is `paired_t`.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.size < 3 or np.ptp(values) <= _EQUAL:  # noqa: PLR2004 - two records are never skewed
        return paired_t(values)
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    skewness = float(((values - mean) ** 3).mean()) / deviation**3
    share = mean / deviation
    removed = share + skewness * share**2 / 3 + skewness**2 * share**3 / 27 + skewness / (6 * values.size)
    return float(special.stdtr(values.size - 1, -math.sqrt(values.size) * removed))


def one_sided_p(
    differences: Sequence[float] | Floats,
    *,
    continuous: bool,
    seed: int,
    relevant: float = 1.0,
    tests: int = 1,
) -> float:
    """
    Return the gate's p-value: exact McNemar for a yes-or-no metric, else the largest of sign flip, t and adjusted t.

    Each of them is too optimistic on some data, the first two where a few large losses hide among many small gains; the
    largest is less so. Where the t-tests are above `relevant` theirs is returned without any sign flips: the largest
    would be above it, too. Of more than `FEW_TESTS` tests that share the level, the flips are tilted to its part.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not continuous:
        return mcnemar_exact(int(np.count_nonzero(values > 0)), int(np.count_nonzero(values < 0)))
    by_t = max(paired_t(values), skewness_adjusted_t(values))
    if by_t > relevant:
        return by_t
    flips = sign_flip(values, seed) if tests <= FEW_TESTS else tilted_sign_flip(values, seed, relevant / tests)
    return max(flips, by_t)


def holm(p_values: Sequence[float]) -> list[float]:
    """
    Return the p-values adjusted so that all of them together err no more often than one (Holm 1979, step-down).

    The smallest of m is multiplied by m, the next by m - 1 and so on; none becomes smaller than the one before it.
    """
    adjusted, least = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def is_yes_or_no(differences: Floats) -> bool:
    """Return whether every difference is -1, 0 or 1, so that the exact test of a yes-or-no metric applies."""
    return bool(np.isin(differences, (-1.0, 0.0, 1.0)).all())


def upper_bound(differences: Sequence[float] | Floats, confidence: float = 0.95) -> float:
    """
    Return the one-sided upper bound of the mean difference that goes with the tests above, at most 1.

    For a yes-or-no metric with d discordant records of n it is (2 q - 1) d / n, where q is the upper bound of the share
    of wins among them (Clopper and Pearson 1934): below zero exactly where `mcnemar_exact` shows a loss; without any
    discordant record, the largest share of them that is likely to stay unseen. Else mean + t s / sqrt(n) (Student
    1908). 1 for fewer than two records.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.size < 2:  # noqa: PLR2004 - one record has no spread
        return 1.0
    if is_yes_or_no(values):
        wins, losses = int(np.count_nonzero(values > 0)), int(np.count_nonzero(values < 0))
        if wins + losses == 0:
            return float(1 - (1 - confidence) ** (1 / values.size))
        share = float(special.betaincinv(wins + 1, losses, confidence)) if losses else 1.0
        return (2 * share - 1) * (wins + losses) / values.size
    error = float(values.std(ddof=1)) / math.sqrt(values.size)
    return min(1.0, float(values.mean()) + float(special.stdtrit(values.size - 1, confidence)) * error)


def ratio_change(sums: Floats, weights: Floats) -> tuple[float, float]:
    """
    Return the difference of two weighted means over the same records, and its standard error.

    `sums` and `weights` have the shape (records, 2): summed NLL and tokens, candidate and champion, say; each mean is
    the sum of its `sums` over the sum of its `weights`. The error is that of the linearised ratios (Cochran 1977,
    Sampling Techniques, 6.4), by record, as both models answered the same ones; NaN for fewer than two records.
    """
    means = sums.sum(axis=0) / weights.sum(axis=0)
    change = float(means[0] - means[1])
    if len(sums) < 2:  # noqa: PLR2004 - one record has no spread
        return change, math.nan
    parts = ratio_parts(sums, weights)
    return change, math.sqrt(float((parts**2).sum()) * len(sums) / (len(sums) - 1))


def ratio_parts(sums: Floats, weights: Floats) -> Floats:
    """Return what each record adds to the error of `ratio_change`: the linearised difference of both ratios."""
    totals = weights.sum(axis=0)
    rests = (sums - sums.sum(axis=0) / totals * weights) / totals
    return np.asarray(rests[:, 0] - rests[:, 1])


def catastrophes(differences: Sequence[float] | Floats, size: float = CATASTROPHE) -> tuple[int, int, float]:
    """
    Return the records that lost and that gained `size` or more, and the p-value that losses are not the more frequent.

    The exact one-sided sign test (Arbuthnott 1710) on these records alone: a mean can hide a few answers that turned
    from right to nonsense behind many small gains.
    """
    values = np.asarray(differences, dtype=np.float64)
    # Scores are quotients: half a point may miss its value in the last bits.
    lost = int(np.count_nonzero(values <= 1e-12 - size))
    gained = int(np.count_nonzero(values >= size - 1e-12))
    return lost, gained, mcnemar_exact(lost, gained)


def interval(differences: Sequence[float] | Floats, seed: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """
    Return the two-sided interval of the mean difference: the BCa bootstrap (Efron 1987), within -1 and 1.

    On a yes-or-no metric it is widened to the exact bounds (`upper_bound`) where these are wider: among few discordant
    records the bootstrap leaves zero out where the test shows nothing.

    Where all differences are equal the bootstrap would claim certainty. There at least q = (a/2)^(1/n) of the
    population has that value (Clopper and Pearson 1934 for n successes in n), and the rest may lie anywhere.
    """
    values = np.asarray(differences, dtype=np.float64)
    tail = (1 - confidence) / 2
    if values.size == 0:
        return (-1.0, 1.0)
    if np.ptp(values) <= _EQUAL:
        share = tail ** (1 / values.size)
        middle = share * float(values[0])
        return (max(-1.0, middle - (1 - share)), min(1.0, middle + (1 - share)))
    low, high = _bootstrap(values, seed, confidence, "BCa")
    if not (math.isfinite(low) and math.isfinite(high)):
        # The bias correction is infinite when no resample lies below the mean, as with two or three records.
        low, high = _bootstrap(values, seed, confidence, "percentile")
    if is_yes_or_no(values):
        low, high = min(low, -upper_bound(-values, 1 - tail)), max(high, upper_bound(values, 1 - tail))
    return (max(-1.0, low), min(1.0, high))


def _mean(samples: Floats, axis: int) -> Floats:
    return np.asarray(samples.mean(axis=axis))


def _bootstrap(
    values: Floats, seed: int, confidence: float, method: Literal["BCa", "percentile"]
) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (values,),
            _mean,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=_BLOCK,
            confidence_level=confidence,
            method=method,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return (float(found.low), float(found.high))
