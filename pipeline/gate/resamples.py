"""
Records drawn again with replacement, to ask the gate's tests what they would have said (Efron 1979, the bootstrap).

A fixed number of draws with a seed of its own, and the records sorted by their difference first, so that the same
differences in any order are asked the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from pipeline.gate.statistics import CATASTROPHE, Floats

DRAWS = 4000
#: Records drawn together: their counts stay in the processor's cache, which is four times as fast.
_BLOCK = 1 << 17
#: A larger set is grown from so many groups of like differences, and so many of the smallest and largest by themselves.
_GROUPS, _EXTREMES = 64, 32
#: Variances below that are what rounding leaves of none.
_NO_VARIANCE = 1e-20
_NO_SKEWNESS = 1e-6
#: Answers that a true gain of more than that would lift over half of the scale are not counted as risen.
_LARGEST_LIFT = 0.25


@dataclass(frozen=True)
class Moments:
    """Mean, standard deviation (n - 1) and skewness of each draw of so many centred differences."""

    records: int
    means: Floats
    deviations: Floats
    skewness: Floats

    @classmethod
    def of(cls, sums: Floats, records: int) -> "Moments":
        """Return those of draws with these sums of the first three powers, shape (draws, 3)."""
        first, second, third = (sums / records).T
        variances = second - first**2
        flat = variances <= _NO_VARIANCE
        deviations = np.sqrt(np.where(flat, 0.0, variances) * records / max(1, records - 1))
        cubes = third - 3 * first * second + 2 * first**3
        skewness = np.where(flat, 0.0, cubes / np.where(flat, 1.0, deviations) ** 3)
        return cls(records, first, deviations, skewness)

    def needed_gains(self, alpha: float, min_gain: float) -> Floats:
        """
        Return the smallest true gain with which each draw has p <= `alpha` in both t-tests, and a gain of `min_gain`.

        A gain moves the mean alone. With c the critical value of Student's t and g the skewness, t needs the share S of
        mean and deviation to be c / sqrt(n); Hall's transformation (`skewness_adjusted_t`), which is
        ((1 + g S / 3)^3 - 1) / g + g / (6 n) and never falls, needs (3 / g) ((1 + g (c / sqrt(n) - g / (6 n)))^(1/3) -
        1).
        """
        by_t = float(stats.t.isf(alpha, self.records - 1)) / np.sqrt(self.records)
        skewed = np.abs(self.skewness) > _NO_SKEWNESS
        turned = np.where(skewed, self.skewness, 1.0)
        removed = 3 / turned * (np.cbrt(1 + turned * (by_t - turned / (6 * self.records))) - 1)
        shares = np.maximum(by_t, np.where(skewed, removed, by_t))
        return np.asarray(np.maximum(shares * self.deviations, min_gain) - self.means)


class Resamples:
    """As many records as there are, drawn again: their differences, and what else each of them adds to."""

    def __init__(self, differences: Floats, columns: Floats, seed: int) -> None:
        """Draw them; `columns`, which are centred, have the shape (records, any)."""
        order = np.argsort(differences, kind="stable")
        self._centred = differences[order] - differences.mean()
        # A true gain only lifts an answer, so no other one can be lost.
        self._lost = self._centred[self._centred <= -CATASTROPHE]
        self._gained = self._centred[self._centred >= CATASTROPHE - _LARGEST_LIFT] if self._lost.size else np.empty(0)
        table = np.column_stack([_powers(self._centred), columns[order] - columns.mean(axis=0)])
        self._falls = np.empty((DRAWS, self._lost.size), dtype=np.uint8)
        self._rises = np.empty((DRAWS, self._gained.size), dtype=np.uint8)
        sums, start = np.empty((DRAWS, table.shape[1])), 0
        for counts in self._counts(np.random.default_rng(seed)):
            rows = slice(start, start + len(counts))
            sums[rows] = counts @ table
            self._falls[rows] = counts[:, : self._lost.size]
            self._rises[rows] = counts[:, counts.shape[1] - self._gained.size :]
            start += len(counts)
        self.moments = Moments.of(sums[:, :3], differences.size)
        self.errors = sums[:, 3:]
        """What each draw adds to each column, shape (draws, columns)."""

    def _counts(self, random: np.random.Generator) -> Iterator[Floats]:
        """Yield how often each record is in each draw, some draws together."""
        size = self._centred.size
        most = max(1, _BLOCK // size)
        for start in range(0, DRAWS, most):
            rows = min(most, DRAWS - start)
            places = random.integers(0, size, (rows, size), dtype=np.int32)
            places += np.arange(rows, dtype=np.int32)[:, None] * size
            counts = np.bincount(places.ravel(), minlength=rows * size)
            yield counts.reshape(rows, size).astype(np.float64)

    def catastrophes(self, gain: float, winners: npt.NDArray[np.int64]) -> Floats:
        """Return the p-value of `statistics.catastrophes` in these draws, with so much true gain on every record."""
        lost = int(np.count_nonzero(self._lost + gain <= 1e-12 - CATASTROPHE))
        if not lost:
            return np.ones(winners.size)
        first = int(np.count_nonzero(self._gained + gain < CATASTROPHE - 1e-12))
        falls = self._falls[winners, :lost].sum(axis=1, dtype=np.int64)
        rises = self._rises[winners, first:].sum(axis=1, dtype=np.int64)
        return np.where(falls > 0, special.betainc(np.maximum(falls, 1), rises + 1, 0.5), 1.0)


def grow(differences: Floats, records: int, seed: int) -> Moments:
    """
    Return the moments of draws of `records` records from these differences.

    Drawn is how often each value is taken (multinomial), so a million records cost what a hundred do. Of many values
    the middle ones are taken in groups at their mean, and all are spread again to the deviation that they had.
    """
    centred = np.sort(differences) - differences.mean()
    values, sizes = centred, np.ones(centred.size)
    if centred.size > _GROUPS + 2 * _EXTREMES:
        ends = np.linspace(_EXTREMES, centred.size - _EXTREMES, _GROUPS + 1).astype(np.int64)
        starts = np.r_[np.arange(_EXTREMES), ends, np.arange(centred.size - _EXTREMES + 1, centred.size)]
        sizes = np.diff(np.r_[starts, centred.size]).astype(np.float64)
        values = np.add.reduceat(centred, starts) / sizes
        spread = np.sqrt(float(sizes @ values**2))
        values = values * (np.sqrt(float((centred**2).sum())) / spread if spread > 0 else 1.0)
    counts = np.random.default_rng(seed).multinomial(records, sizes / centred.size, size=DRAWS)
    return Moments.of(counts @ _powers(values), records)


def _powers(values: Floats) -> Floats:
    return np.column_stack([values, values**2, values**3])
