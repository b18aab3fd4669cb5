"""
Power: what a held-out set of this size and noise can show, and how many records it takes to show a gain.

The power is that of the whole decision: the test's own, exact for McNemar, times the share of winners that the guards
let through.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from pipeline.comparison import Flags, Places
from pipeline.statistics import Floats

#: How often a gain that is called detectable is promoted.
POWER = 0.8
#: What is said instead where the guards, on so few records, stop more than that by chance.
LOWER_POWERS = (0.7, 0.6, 0.5)
#: A guard's test fails a candidate at this p-value; all tests of one kind together have it (Holm).
GUARD_LEVEL = 0.05
#: No advice asks for more held-out records than this.
MOST_RECORDS = 1_000_000
_DRAWS = 4000
#: Random numbers in memory at once.
_MOST_COINS = 1 << 22


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


@dataclass(frozen=True)
class GainTest:
    """The gate's test of the primary metric, as far as its power depends on it."""

    continuous: bool
    alpha: float
    min_gain: float
    """As a fraction."""

    def chance(self, records: int, gain: float, noise: "Noise") -> float:
        """Return how often a true gain is shown on so many records."""
        if self.continuous:
            return t_power(records, gain, noise.spread, self.alpha, self.min_gain)
        return mcnemar_power(records, noise.against + gain, noise.against, self.alpha, self.min_gain)


@dataclass(frozen=True)
class Noise:
    """What makes a gain hard to see: the spread of the differences, or the share of records that go the other way."""

    spread: float
    against: float


@dataclass(frozen=True)
class Watched:
    """One change that a guard tests or holds against a margin, as a chance to stand against a good candidate."""

    family: str
    """Tests of one family share the 5 % (Holm)."""
    parts: Floats | float
    """What each held-out record adds to the change's error; one number, its standard error, if of other records."""
    slope: float = 0.0
    """The true change for a true gain of 1: 1 for a slice, 0 where a good candidate changes nothing."""
    tested: bool = True
    margin: float | None = None
    """Largest loss that passes, in the change's own unit; none: it is only tested."""


class Hurdles:
    """The guards of one report, as simulated estimates of all that they watch, with the gain itself beside them."""

    def __init__(self, differences: Floats, watched: Sequence[Watched], seed: int) -> None:
        """
        Draw the errors of all estimates together, from the records' own contributions.

        The draws are the Gaussian multiplier bootstrap (Chernozhukov, Chetverikov and Kato 2013): each record's
        contributions times a normal number of its own, so what is correlated in the records is in the draws.
        """
        random = np.random.default_rng(seed)
        gain = (differences - differences.mean()) / max(1, differences.size)
        parts = np.column_stack([gain, *(one.parts for one in watched if isinstance(one.parts, np.ndarray))])
        rows = max(1, _MOST_COINS // max(1, differences.size))
        drawn = np.concatenate([
            random.standard_normal((min(rows, _DRAWS - start), differences.size)) @ parts
            for start in range(0, _DRAWS, rows)
        ])  # fmt: skip
        columns = iter(drawn.T)
        self._gain = next(columns)
        self._watched = tuple(watched)
        self._errors = [
            next(columns) if isinstance(one.parts, np.ndarray) else one.parts * random.standard_normal(_DRAWS)
            for one in self._watched
        ]
        self._order = np.argsort(-self._gain, kind="stable")

    def passing(self, gain: float, chance: float) -> float:
        """Return the share of winners that the guards let through, if the true gain wins with probability `chance`."""
        winners = self._order[: max(1, round(chance * _DRAWS))]
        stopped = np.zeros(winners.size, dtype=bool)
        for caught in self._stopped(gain, winners).values():
            stopped |= caught
        return 1.0 - float(stopped.mean())

    def dearest(self, gain: float, chance: float) -> str | None:
        """Return the family of guards that stops the most of these winners; `None` if none stops any."""
        winners = self._order[: max(1, round(chance * _DRAWS))]
        caught = {family: int(stops.sum()) for family, stops in self._stopped(gain, winners).items()}
        family = max(caught, key=lambda one: caught[one], default=None)
        return family if family is not None and caught[family] else None

    def _stopped(self, gain: float, winners: Places) -> dict[str, Flags]:
        """Return which winners each family of guards stops."""
        stopped = {one.family: np.zeros(winners.size, dtype=np.bool_) for one in self._watched}
        sizes = {one.family: sum(other.tested and other.family == one.family for other in self._watched)
                 for one in self._watched}  # fmt: skip
        for one, errors in zip(self._watched, self._errors, strict=True):
            deviation = float(errors.std())
            changes = one.slope * gain + errors[winners]
            if one.tested and deviation > 0:
                # Holm rejects anything at all only if the smallest p-value is within the level over their number.
                stopped[one.family] |= changes < float(stats.norm.ppf(GUARD_LEVEL / sizes[one.family])) * deviation
            if one.margin is not None:
                stopped[one.family] |= changes < -one.margin
        return stopped


@dataclass(frozen=True)
class Detectable:
    """The smallest true gain that is promoted with a power, as a fraction."""

    gain: float
    power: float
    test_power: float
    """The test's own power there, which the guards take something from."""
    dearest: str | None = None
    """Family of the guards that take the most."""


def smallest_detectable_gain(
    differences: Sequence[float] | Floats, test: GainTest, hurdles: Hurdles | None = None, power: float = POWER
) -> Detectable | None:
    """
    Return the smallest true gain that as many records with this much noise would promote with the given power.

    Noise is the standard deviation of the differences, or, for a yes-or-no metric, the share of records that go the
    other way (the rarer direction, by the rule of succession: none seen does not mean none to come). `None` if not
    even the largest gain would be promoted so often. Without `hurdles` it is the test's own, exact for McNemar.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.size == 0:
        return None
    rarer = min(int(np.count_nonzero(values > 0)), int(np.count_nonzero(values < 0)))
    against = (rarer + 1) / (values.size + 2)
    noise = Noise(float(values.std(ddof=1)) if values.size > 1 else 0.0, against)
    largest = 1.0 if test.continuous else 1 - 2 * against

    def chance(gain: float) -> float:
        shown = test.chance(values.size, gain, noise)
        return shown if hurdles is None or shown < power else shown * hurdles.passing(gain, shown)

    if largest <= 0 or chance(largest) < power:
        return None
    low, high = 0.0, largest
    while high - low > 1e-5:  # noqa: PLR2004 - a thousandth of a point
        middle = (low + high) / 2
        low, high = (low, middle) if chance(middle) >= power else (middle, high)
    shown = test.chance(values.size, high, noise)
    return Detectable(high, power, shown, hurdles.dearest(high, shown) if hurdles is not None else None)


def records_needed(differences: Sequence[float] | Floats, test: GainTest, power: float = POWER) -> int | None:
    """
    Return how many records in all would show the observed gain, if it is the true one, with the given power.

    `power` is the test's; that of the whole decision is smaller (`Detectable.test_power` is what it takes). `None`
    where no number would do (no gain, or one that is not above the smallest that promotes) or only more than
    `MOST_RECORDS`.
    """
    values = np.asarray(differences, dtype=np.float64)
    gain = float(values.mean()) if values.size else 0.0
    if gain <= 0:
        return None
    noise = Noise(float(values.std(ddof=1)) if values.size > 1 else 0.0, float(np.mean(values < 0)))
    high = 2
    while test.chance(high, gain, noise) < power:
        high *= 2
        if high > MOST_RECORDS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if test.chance(middle, gain, noise) >= power else (middle, high)
    return high
