"""
Suggest the next trial's settings, from the grid or from Optuna.

Optuna stores nothing: its study is rebuilt from the states of earlier trials, with a seed that follows from the run's
seed and the trial's number. So a killed search draws the same settings again, if its trials run one at a time.
"""

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

from pipeline.config import TrainConfig
from pipeline.search_settings import Range, grid
from pipeline.train.search.trials import TrialState

#: Share of the trials that are drawn at random before the sampler uses their results.
_RANDOM = 1 / 3
#: Draws before giving up when Optuna repeats settings that were tried already.
_DRAWS = 10
_SEEDS = 2**32


def suggest(train: TrainConfig, past: Sequence[TrialState]) -> dict[str, Any] | None:
    """
    Return the settings of the trial after `past`; `None` after the last, or if ten draws give tried ones only.

    A trial without an outcome counts as running: Optuna draws away from it.
    """
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
        study.add_trial(
            optuna.create_trial(
                state=states.COMPLETE if trial.once else states.FAIL if trial.outcome else states.RUNNING,
                value=trial.dev_loss,
                params={name: json.dumps(x) if name in listed else x for name, x in trial.settings.items()},
                distributions=kinds,
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
