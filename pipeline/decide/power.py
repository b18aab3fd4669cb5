"""
Power: the smallest true gain that this decision detects on a held-out set like this one, by simulation.

The groups of records are drawn again with replacement (Efron 1979, the bootstrap) as two models that are equally good:
both models' answers to a group are exchanged with probability 1/2. Then the candidate gains as models do: a part of the
answers, or of the groups, becomes right, the others stay. The whole decision, with its guards, is made on each draw.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pipeline.decide.comparison import Comparison
from pipeline.decide.policy import DRAWS, MOST_RECORDS, POWER
from pipeline.decide.statistics import Floats

_FAIR = 0.5
#: Steps of a search between no gain and the largest one: a hundredth of the way.
_STEPS = 7


def smallest_gain(
    comparison: Comparison, promotes: Callable[[Comparison], bool], seed: int, *, spread: bool = False
) -> float | None:
    """
    Return the smallest true gain (a fraction) that `promotes` accepts in 8 of 10 draws; `None` if there is none.

    With `spread` answers become right one by one; else all of a group together, which is harder to show.

    Slow: `promotes` is called on up to 1,600 simulated comparisons. The same seed gives the same result; the share of
    draws has a standard error of about 3 percentage points.
    """
    random = np.random.default_rng(seed)
    drawn = [_draw(comparison, random, spread) for _ in range(DRAWS)]
    room = float(np.mean([(1 - draw.pairs().mean(axis=1)).mean() for draw, _ in drawn]))

    def power(share: float) -> float:
        return float(np.mean([promotes(_gained(draw, luck < share)) for draw, luck in drawn]))

    low, high = 0.0, 1.0
    if room == 0 or power(high) < POWER:
        return None
    for _ in range(_STEPS):
        # The error is relative to the gain: a third of a point matters for a gain of 1 point, not of 50.
        middle = math.sqrt(max(low, 1e-3) * high)
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high * room


def _draw(comparison: Comparison, random: np.random.Generator, spread: bool) -> tuple[Comparison, Floats]:  # noqa: FBT001
    """
    Return a resample of the groups in which both models are equally good, and a random number per record.

    The numbers are uniform in [0, 1), and equal within a group unless `spread`; records with a number below a gain's
    share become right.
    """
    _, codes, sizes = np.unique(comparison.groups, return_inverse=True, return_counts=True)
    starts, order = np.cumsum(sizes) - sizes, np.argsort(codes, kind="stable")
    chosen = random.integers(0, sizes.size, sizes.size)
    groups = np.repeat(np.arange(sizes.size), sizes[chosen])
    within = np.arange(groups.size) - np.repeat(np.cumsum(sizes[chosen]) - sizes[chosen], sizes[chosen])
    drawn = comparison.take(order[starts[chosen][groups] + within], groups)
    turned = (random.random(sizes.size) < _FAIR)[groups]
    exchanged = replace(
        drawn,
        scores={name: _exchange(pair, turned) for name, pair in drawn.scores.items()},
        nll=(_exchange(drawn.nll[0], turned), _exchange(drawn.nll[1], turned)),
        degenerate={kind: _exchange(pair, turned) for kind, pair in drawn.degenerate.items()},
        # Suites are not drawn again: their items are the same in every run.
        suites=tuple(
            replace(x, scores=_exchange(x.scores, random.random(len(x.scores)) < _FAIR)) for x in drawn.suites
        ),
        opinion=None,
    )
    return exchanged, random.random(groups.size) if spread else random.random(sizes.size)[groups]


def _exchange(pair: Floats, turned: np.ndarray) -> Floats:
    return np.where(turned[:, None], pair[:, ::-1], pair)


def _gained(comparison: Comparison, lucky: np.ndarray) -> Comparison:
    pair = comparison.scores[comparison.metric].copy()
    pair[lucky, 0] = 1.0
    return replace(comparison, scores={**comparison.scores, comparison.metric: pair})


def records_needed(gain: float, smallest: float | None, groups: int) -> int | None:
    """
    Return about how many groups in all are needed to show the observed gain, if it is true, in 8 of 10 cases.

    The smallest gain falls with the square root of their number. `None` if no number suffices (no gain, or no gain is
    large enough) or only more than `MOST_RECORDS`.
    """
    if gain <= 0 or smallest is None:
        return None
    needed = groups * (smallest / gain) ** 2
    return math.ceil(needed) if needed <= MOST_RECORDS else None
