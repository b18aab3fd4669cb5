"""
Which of several candidates goes to the gate, by the dev records alone.

Models that were tried differ by chance, too. So the best one does not win by its score, but sets the bar: whoever is
within one standard error of it, record by record, is as good as it, and the cheapest of those is taken
(the one-standard-error rule: Breiman et al., Classification and Regression Trees, 1984, section 3.4.3).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: Relative error of sums over some thousand records, many times over.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class DevScores:
    """One candidate on the dev records, in an order that all candidates share."""

    scores: tuple[float, ...]
    """One a record, higher is better: a metric's score, or the mean log-likelihood of the answer's tokens in nats."""
    weights: tuple[float, ...]
    """What each record counts: 1 for a metric, the answer's tokens for a log-likelihood; the same in all candidates."""
    cost: float
    """Seconds, or anything else of which less is better; it decides between candidates that are as good."""

    def __post_init__(self) -> None:
        """Raise `ValueError` unless each record has a finite score and a weight above 0."""
        if len(self.scores) != len(self.weights):
            raise ValueError(f"{len(self.scores)} scores and {len(self.weights)} weights: one of each a record")
        if not all(map(math.isfinite, self.scores)) or not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError("dev scores have to be finite, and their weights above 0")

    @property
    def mean(self) -> float:
        """The weighted mean of the scores; 0 without a record."""
        return _mean(self.scores, self.weights)


def choose(candidates: Sequence[DevScores]) -> int:
    """
    Return the place of the candidate that goes to the gate.

    It is the cheapest of those whose paired difference to the best mean is at most one standard error of it; of equally
    cheap ones the better, then the first. Fewer than two records tell no two candidates apart, so the cheapest is
    taken. Raises `ValueError` if there is no candidate, or if they were not scored on the same records.
    """
    if len({candidate.weights for candidate in candidates}) != 1:
        raise ValueError("candidates are chosen among by the same dev records, one candidate at least")
    best = max(candidates, key=lambda candidate: candidate.mean)
    tied = [place for place, candidate in enumerate(candidates) if _is_as_good(candidate, best)]
    return min(tied, key=lambda place: (candidates[place].cost, -candidates[place].mean))


def _is_as_good(candidate: DevScores, best: DevScores) -> bool:
    """Say whether the mean paired difference is within one standard error; a candidate is as good as itself."""
    records = len(best.scores)
    if records < 2:  # noqa: PLR2004 - a standard error needs two
        return True
    weights = best.weights
    differences = [high - low for high, low in zip(best.scores, candidate.scores, strict=True)]
    mean = _mean(differences, weights)
    # Of a weighted mean, by linearisation (Cochran, Sampling Techniques, 1977, section 6.4); of equal weights it is the
    # plain standard error of a mean.
    squares = sum((weight * (one - mean)) ** 2 for one, weight in zip(differences, weights, strict=True))
    error = math.sqrt(records / (records - 1) * squares) / sum(weights)
    # One record more among equal ones has a mean that is its own error: by the last bit alone it would be more or less.
    return mean <= error * (1 + _ROUNDING)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights) if weights else 0.0
