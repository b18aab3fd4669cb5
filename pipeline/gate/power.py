"""
Power: what a held-out set of this size and noise can show, and how many records it takes to show a gain.

The power is that of the whole decision: the test's own, exact for McNemar and resampled for a continuous metric, times
the share of winners that the guards let through.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from pipeline.gate.comparison import Flags, Places
from pipeline.gate.resamples import DRAWS, Moments, Resamples, grow
from pipeline.gate.statistics import Floats

#: How often a gain that is called detectable is promoted.
POWER = 0.8
#: What is said instead where the guards, on so few records, stop more than that by chance.
LOWER_POWERS = (0.7, 0.6, 0.5)
#: No more of the test's own power is asked for: beyond that further records buy little, the guards decide.
MOST_TEST_POWER = 0.95
#: A guard's test fails a candidate at this p-value; all tests of one kind together have it (Holm).
GUARD_LEVEL = 0.05
#: No advice asks for more held-out records than this.
MOST_RECORDS = 1_000_000
#: The number of records that a continuous gain needs is told to one part in so many: the draws tell no more.
_PARTS = 200
#: Of draws that no report gives a seed.
_SEED = 20261125


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

    def needed(self, moments: Moments) -> Floats | None:
        """Return the true gain from which on each of these draws would be promoted; none for a yes-or-no metric."""
        return moments.needed_gains(self.alpha, self.min_gain) if self.continuous else None

    def chance(self, records: int, gain: float, noise: "Noise") -> float:
        """
        Return how often a true gain is shown on so many records.

        For a continuous metric it is the share of draws that both t-tests and the least gain let pass, and no more than
        `t_power`. The sign flips, of which `one_sided_p` takes the largest p-value too, are left out: after the
        t-tests they stop less than one draw of a hundred.
        """
        if not self.continuous:
            return mcnemar_power(records, noise.against + gain, noise.against, self.alpha, self.min_gain)
        most = t_power(records, gain, noise.spread, self.alpha, self.min_gain)
        if noise.needed is None:
            return most
        return min(most, float(np.mean(noise.needed <= gain)))


@dataclass(frozen=True)
class Noise:
    """What makes a gain hard to see: the spread of the differences, or the share of records that go the other way."""

    spread: float
    against: float
    needed: Floats | None = None
    """`GainTest.needed` by resampling on as many records."""


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
    catastrophes: bool = False
    """The differences' own catastrophes are held against those that gained as much, and nothing else is."""


class GuardModel:
    """The guards of one report, as simulated estimates of all that they watch, with the gain itself beside them."""

    def __init__(self, differences: Floats, watched: Sequence[Watched], test: GainTest, seed: int) -> None:
        """
        Draw the errors of all estimates together, from the records' own contributions.

        The records are drawn again (`Resamples`), so what is correlated in them is in the draws; what has records of
        its own gets a normal error.
        """
        parts = [one.parts for one in watched if isinstance(one.parts, np.ndarray)]
        random = np.random.default_rng(seed)
        self._drawn = Resamples(differences, np.column_stack([np.empty((differences.size, 0)), *parts]), seed)
        columns = iter(self._drawn.errors.T)
        self._watched = tuple(watched)
        self._errors = [
            next(columns) if isinstance(one.parts, np.ndarray) else one.parts * random.standard_normal(DRAWS)
            for one in self._watched
        ]
        self._tests = Counter(one.family for one in self._watched if one.tested)
        self.needed = test.needed(self._drawn.moments)
        """`GainTest.needed` of the draws."""
        self._order = np.argsort(-self._drawn.moments.means if self.needed is None else self.needed, kind="stable")

    def passing(self, gain: float, chance: float) -> float:
        """Return the share of winners that the guards let through, if the true gain wins with probability `chance`."""
        winners = self._order[: max(1, round(chance * DRAWS))]
        stopped = np.zeros(winners.size, dtype=bool)
        for caught in self._stopped(gain, winners).values():
            stopped |= caught
        return 1.0 - float(stopped.mean())

    def costliest(self, gain: float, chance: float) -> str | None:
        """Return the family of guards that stops the most of these winners; `None` if none stops any."""
        winners = self._order[: max(1, round(chance * DRAWS))]
        caught = {family: int(stops.sum()) for family, stops in self._stopped(gain, winners).items()}
        family = max(caught, key=lambda one: caught[one], default=None)
        return family if family is not None and caught[family] else None

    def _stopped(self, gain: float, winners: Places) -> dict[str, Flags]:
        """Return which winners each family of guards stops."""
        stopped = {one.family: np.zeros(winners.size, dtype=np.bool_) for one in self._watched}
        for one, errors in zip(self._watched, self._errors, strict=True):
            deviation = float(errors.std())
            changes = one.slope * gain + errors[winners]
            if one.tested and deviation > 0:
                # Holm rejects anything at all only if the smallest p-value is within the level over their number.
                stopped[one.family] |= (
                    changes < float(stats.norm.ppf(GUARD_LEVEL / self._tests[one.family])) * deviation
                )
            if one.margin is not None:
                stopped[one.family] |= changes < -one.margin
            if one.catastrophes:
                stopped[one.family] |= self._drawn.catastrophes(gain, winners) <= GUARD_LEVEL
        return stopped


@dataclass(frozen=True)
class Detectable:
    """The smallest true gain that is promoted with a power, as a fraction."""

    gain: float
    power: float
    test_power: float
    """The test's own power there, which the guards take something from."""
    costliest: str | None = None
    """Family of the guards that take the most."""


def asked_power(smallest: Detectable | None) -> float:
    """
    Return the test's power that leaves `POWER` to the whole decision, behind the guards as they are at that gain.

    Never below `POWER`. Where they leave less than that to every gain (`None`: to none in five cases of ten), or would
    take more than `MOST_TEST_POWER`, it is that.
    """
    passing = 0.0 if smallest is None else smallest.power / smallest.test_power
    return MOST_TEST_POWER if passing * MOST_TEST_POWER <= POWER else max(POWER, POWER / passing)


def smallest_detectable_gain(
    differences: Sequence[float] | Floats, test: GainTest, guard_model: GuardModel | None = None, power: float = POWER
) -> Detectable | None:
    """
    Return the smallest true gain that as many records with this much noise would promote with the given power.

    Noise is the standard deviation of the differences, or, for a yes-or-no metric, the share of records that go the
    other way (the rarer direction, by the rule of succession: none seen does not mean none to come). `None` if not
    even the largest gain would be promoted so often. Without `guard_model` it is the test's own.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.size == 0:
        return None
    rarer = min(int(np.count_nonzero(values > 0)), int(np.count_nonzero(values < 0)))
    against = (rarer + 1) / (values.size + 2)
    guard_model = GuardModel(values, (), test, _SEED) if guard_model is None else guard_model
    noise = Noise(float(values.std(ddof=1)) if values.size > 1 else 0.0, against, guard_model.needed)
    largest = 1.0 if test.continuous else 1 - 2 * against

    def chance(gain: float) -> float:
        shown = test.chance(values.size, gain, noise)
        return shown if shown < power else shown * guard_model.passing(gain, shown)

    if largest <= 0 or chance(largest) < power:
        return None
    low, high = 0.0, largest
    while high - low > 1e-5:  # noqa: PLR2004 - a thousandth of a point
        middle = (low + high) / 2
        low, high = (low, middle) if chance(middle) >= power else (middle, high)
    shown = test.chance(values.size, high, noise)
    return Detectable(high, power, shown, guard_model.costliest(high, shown))


def records_needed(differences: Sequence[float] | Floats, test: GainTest, power: float = POWER) -> int | None:
    """
    Return how many records in all would show the observed gain, if it is the true one, with the given power.

    `power` is the test's; that of the whole decision is smaller (`asked_power` is what it takes). For a continuous
    metric the set is grown by drawing its records again (`grow`). `None` where no number would do (no gain, or one that
    is not above the smallest that promotes) or only more than `MOST_RECORDS`.
    """
    values = np.asarray(differences, dtype=np.float64)
    gain = float(values.mean()) if values.size else 0.0
    if gain <= 0:
        return None
    noise = Noise(float(values.std(ddof=1)) if values.size > 1 else 0.0, float(np.mean(values < 0)))
    found = _fewest(lambda records: test.chance(records, gain, noise) >= power, 2)
    if found is None or not test.continuous:
        return found

    # `t_power` is the most that resampling may say, so none of fewer records needs to be asked.
    def enough(records: int) -> bool:
        drawn = replace(noise, needed=test.needed(grow(values, records, _SEED)))
        return test.chance(records, gain, drawn) >= power

    return _fewest(enough, found, parts=_PARTS)


def _fewest(enough: Callable[[int], bool], least: int, parts: int = MOST_RECORDS) -> int | None:
    """Return from where on there are enough records, to one part in `parts`; `None` above `MOST_RECORDS`."""
    low, high = least - 1, least
    while not enough(high):
        low, high = high, 2 * high
        if high > MOST_RECORDS:
            return None
    while high - low > max(1, high // parts):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
