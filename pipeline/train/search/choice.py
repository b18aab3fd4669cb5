"""
Choose a trial by its scores on the dev records.

The one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3): scores differ by
chance, too, so of all trials whose paired difference to the best is within one standard error, the cheapest is chosen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: Far above the relative rounding error of sums over some thousand records.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class DevScores:
    """One trial's scores on the dev records, in an order that all trials share."""

    scores: tuple[float, ...]
    """Per record, higher is better: the metric, or the mean log-likelihood of the answer's tokens in nats."""
    weights: tuple[float, ...]
    """Per record: 1 for a metric, the number of answer tokens for a log-likelihood; the same in all trials."""
    cost: float
    """Lower is better, as tokens times weights; it decides between equally good trials."""

    @property
    def mean(self) -> float:
        """Weighted mean of the scores; 0 if there is no record."""
        return _mean(self.scores, self.weights)


def choose(trials: Sequence[DevScores]) -> int:
    """
    Return the index of the trial to merge and evaluate, by the one-standard-error rule.

    It is the cheapest trial whose paired difference to the best mean is at most one standard error of that difference;
    among equally cheap ones the better, then the first. With fewer than two records the cheapest is chosen. Raises
    `ValueError` if the trials have different numbers of records.
    """
    best = max(trials, key=lambda trial: trial.mean)
    tied = [index for index, trial in enumerate(trials) if _is_as_good(trial, best)]
    return min(tied, key=lambda index: (trials[index].cost, -trials[index].mean))


def _is_as_good(trial: DevScores, best: DevScores) -> bool:
    """Return whether the mean paired difference to `best` is within one standard error; true below two records."""
    records = len(best.scores)
    if records < 2:  # noqa: PLR2004 - a standard error needs two
        return True
    weights = best.weights
    differences = [high - low for high, low in zip(best.scores, trial.scores, strict=True)]
    mean = _mean(differences, weights)
    # Standard error of a weighted mean, by linearisation (Cochran, Sampling Techniques, 1977, section 6.4); with equal
    # weights it is that of a mean.
    squares = sum((weight * (x - mean)) ** 2 for x, weight in zip(differences, weights, strict=True))
    error = math.sqrt(records / (records - 1) * squares) / sum(weights)
    # If a single record differs, mean and error are equal: without a tolerance the last bit would decide.
    return mean <= error * (1 + _ROUNDING)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights) if weights else 0.0
