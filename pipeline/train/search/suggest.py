"""
What to try next, and what to give up: the grid in its order, or Optuna, which is asked anew each time.

Optuna keeps nothing: its study is made from the files of the trials before, with a seed that follows from the run's
seed and the trial's number. So a search that was killed asks again what it would have asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from pipeline.config import TrainConfig
from pipeline.search_settings import Range, SearchConfig, grid

if TYPE_CHECKING:
    import optuna

#: Trials that end whole before one may be pruned by their median.
_UNPRUNED = 3
#: Draws at random come first, this share of the trials, then those that follow from what was learned.
_RANDOM = 1 / 3
#: Times that Optuna is asked for something else when it draws what was tried already.
_DRAWS = 10
_SEEDS = 2**32

Losses = Sequence[float]
"""Dev losses in nats per token, in the order in which they were measured: trials may differ in their steps."""


@dataclass(frozen=True)
class Tried:
    """What a trial before came to."""

    settings: Mapping[str, Any]
    score: float | None
    """Higher is better; `None` of one that was pruned or failed."""
    losses: Losses
    """None of one that failed."""


@dataclass(frozen=True)
class MedianRule:
    """Optuna's median pruner over the trials before."""

    earlier: tuple[Losses, ...]
    """Of those that ended whole."""

    def __call__(self, losses: Losses) -> bool:
        """Say whether a training with these dev losses, the latest last, is to be ended: worse than the median."""
        import optuna

        study = _study(optuna.samplers.RandomSampler(seed=0))
        for one in self.earlier:
            study.add_trial(optuna.create_trial(value=min(one, default=0.0), intermediate_values=_numbered(one)))
        own = optuna.create_trial(state=optuna.trial.TrialState.RUNNING, intermediate_values=_numbered(losses))
        # Of Optuna's own it would be a number of numpy's.
        return bool(optuna.pruners.MedianPruner(n_startup_trials=_UNPRUNED).prune(study, own))


def suggest(train: TrainConfig, past: Sequence[Tried]) -> dict[str, Any] | None:
    """Return the settings of the trial after `past`; `None` if all were tried, or nothing new was found."""
    search = train.search
    if search.method == "grid":
        return next(islice(grid(search), len(past), None), None)
    if len(past) >= search.trials:
        return None
    for draw in range(_DRAWS):
        settings = _draw(train, past, (train.seed + len(past) + draw * search.trials) % _SEEDS)
        if all(settings != one.settings for one in past):
            return settings
    return None


def _draw(train: TrainConfig, past: Sequence[Tried], seed: int) -> dict[str, Any]:
    import optuna

    search = train.search
    kinds = {name: _distribution(train, name) for name in search.space}
    study = _study(optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(1, round(search.trials * _RANDOM))))
    states = optuna.trial.TrialState
    for one in past:
        state = states.COMPLETE if one.score is not None else states.PRUNED if one.losses else states.FAIL
        study.add_trial(
            optuna.create_trial(
                state=state,
                value=None if one.score is None else -one.score,
                params={name: _to_optuna(search, name, one.settings[name]) for name in kinds},
                distributions=kinds,
                intermediate_values=_numbered(one.losses),
            )
        )
    drawn = study.ask(kinds).params
    return {name: _from_optuna(search, name, drawn[name]) for name in kinds}


def _numbered(losses: Losses) -> dict[int, float]:
    # Optuna compares what has the same number.
    return dict(enumerate(losses, start=1))


def _study(sampler: "optuna.samplers.BaseSampler") -> "optuna.Study":
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="minimize", sampler=sampler)


def _distribution(train: TrainConfig, name: str) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values = train.search.space[name]
    if not isinstance(values, Range):
        # Places of the list: Optuna takes no lists as values.
        return CategoricalDistribution(range(len(values)))
    if isinstance(getattr(train, name), int):
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(float(values.low), float(values.high), log=values.log)


def _to_optuna(search: SearchConfig, name: str, value: Any) -> Any:
    values = search.space[name]
    return value if isinstance(values, Range) else values.index(tuple(value) if isinstance(value, list) else value)


def _from_optuna(search: SearchConfig, name: str, value: Any) -> Any:
    values = search.space[name]
    if isinstance(values, Range):
        return value
    found = values[value]
    # As a trial's file has it.
    return list(found) if isinstance(found, tuple) else found
