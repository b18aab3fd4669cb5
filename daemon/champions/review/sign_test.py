"""The exact sign test of a blind review, in the standard library alone: the daemon loads no scipy."""

import math

_HALVINGS = 60


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of the exact sign test (Arbuthnott 1710) without ties; 1 for no pairs."""
    pairs = wins + losses
    return min(1.0, 2 * sum(math.comb(pairs, k) for k in range(max(wins, losses), pairs + 1)) / (1 << pairs))


def share_interval(wins: int, losses: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Return the interval of the share of wins, 0 to 1 (Clopper and Pearson 1934); found by halving, to 1e-15.

    Its ends are the shares at which as many wins or more, and as few or fewer, have half of 1 - `confidence` each.
    """
    return _lower_end(wins, losses, (1 - confidence) / 2), 1 - _lower_end(losses, wins, (1 - confidence) / 2)


def _lower_end(wins: int, losses: int, tail: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS if wins else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if _tail(wins, wins + losses, middle) > tail else (middle, high)
    return low


def _tail(least: int, of: int, share: float) -> float:
    """Return the probability of `least` or more of so many pairs, each with probability `share`."""
    ways = math.lgamma(of + 1)
    yes, no = math.log(share), math.log1p(-share)
    logs = (ways - math.lgamma(k + 1) - math.lgamma(of - k + 1) + k * yes + (of - k) * no for k in range(least, of + 1))
    return math.fsum(map(math.exp, logs))
