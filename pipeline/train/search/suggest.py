"""
Suggest the next trial's settings, from the grid or from Optuna, and decide which trial is pruned.

Optuna stores nothing: its study is rebuilt from the states of earlier trials, with a seed that follows from the run's
seed and the trial's number. So a killed search draws the same settings again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

from pipeline.config import TrainConfig
from pipeline.search_settings import Range, grid
from pipeline.train.search.trials import TrialState

#: Trials that must finish before one may be pruned by their median.
_UNPRUNED = 3
#: Share of the trials that are drawn at random before the sampler uses their results.
_RANDOM = 1 / 3
#: Draws before giving up when Optuna repeats settings that were tried already.
_DRAWS = 10
_SEEDS = 2**32

Losses = Sequence[float]
"""Dev losses in nats per token, in the order in which they were measured: trials may differ in their steps."""


@dataclass(frozen=True)
class MedianRule:
    """The median rule of Vizier (Golovin et al., KDD 2017, section 3.2.2) over earlier trials."""

    earlier: tuple[Losses, ...]
    """Of the trials that finished."""

    def __call__(self, losses: Losses) -> bool:
        """
        Return whether to prune a training with these dev losses.

        It is pruned if its best loss is above the median of the earlier trials' losses at the same measurement, and at
        least `_UNPRUNED` trials have finished.
        """
        there = [past[len(losses) - 1] for past in self.earlier if len(past) >= len(losses)]
        return len(self.earlier) >= _UNPRUNED and bool(there) and min(losses) > median(there)


def suggest(train: TrainConfig, past: Sequence[TrialState]) -> dict[str, Any] | None:
    """Return the settings of the trial after `past`; `None` if the space or the number of trials is exhausted."""
    search = train.search
    if search.method == "grid":
        return next(islice(grid(search), len(past), None), None)
    if len(past) >= search.trials:
        return None
    for draw in range(_DRAWS):
        settings = _draw(train, past, (train.seed + len(past) + draw * search.trials) % _SEEDS)
        if all(settings != trial.settings for trial in past):
            return settings
    return None


def _draw(train: TrainConfig, past: Sequence[TrialState], seed: int) -> dict[str, Any]:
    """Draw settings by Optuna, given the results of `past`; listed values are JSON texts in its study."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = train.search
    kinds = {name: _distribution(train, name) for name in search.space}
    listed = {name for name, values in search.space.items() if not isinstance(values, Range)}
    startup = max(1, round(search.trials * _RANDOM))
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup))
    states = optuna.trial.TrialState
    for trial in past:
        state = states.COMPLETE if trial.scored else states.PRUNED if trial.losses else states.FAIL
        study.add_trial(
            optuna.create_trial(
                state=state,
                value=None if trial.mean is None else -trial.mean,
                params={name: json.dumps(x) if name in listed else x for name, x in trial.settings.items()},
                distributions=kinds,
                intermediate_values=dict(enumerate(trial.losses, start=1)),
            )
        )
    return {name: json.loads(x) if name in listed else x for name, x in study.ask(kinds).params.items()}


def _distribution(train: TrainConfig, name: str) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values = train.search.space[name]
    if not isinstance(values, Range):
        return CategoricalDistribution([json.dumps(value) for value in values])
    if isinstance(getattr(train, name), int):
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)
