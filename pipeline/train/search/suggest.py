"""
Suggest the next trial's settings, from the grid or from Optuna, and decide which trial is pruned.

Optuna stores nothing: its study is rebuilt from the files of earlier trials, with a seed that follows from the run's
seed and the trial's number. So a killed search draws the same settings again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from pipeline.config import TrainConfig
from pipeline.search_settings import Range, SearchConfig, grid

if TYPE_CHECKING:
    import optuna

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
class Tried:
    """An earlier trial's settings and result."""

    settings: Mapping[str, Any]
    score: float | None
    """Higher is better; `None` if it was pruned or failed."""
    losses: Losses
    """Empty if it failed."""


@dataclass(frozen=True)
class MedianRule:
    """Optuna's median pruner over earlier trials."""

    earlier: tuple[Losses, ...]
    """Of the trials that finished."""

    def __call__(self, losses: Losses) -> bool:
        """Return whether to prune a training with these dev losses, the latest last: worse than the median."""
        import optuna

        study = _study(optuna.samplers.RandomSampler(seed=0))
        for past in self.earlier:
            study.add_trial(optuna.create_trial(value=min(past, default=0.0), intermediate_values=_numbered(past)))
        trial = optuna.create_trial(state=optuna.trial.TrialState.RUNNING, intermediate_values=_numbered(losses))
        # Optuna returns numpy's bool.
        return bool(optuna.pruners.MedianPruner(n_startup_trials=_UNPRUNED).prune(study, trial))


def suggest(train: TrainConfig, past: Sequence[Tried]) -> dict[str, Any] | None:
    """Return the settings of the trial after `past`; `None` if the space or the number of trials is exhausted."""
    search = train.search
    if search.method == "grid":
        return next(islice(grid(search), len(past), None), None)
    if len(past) >= search.trials:
        return None
    for draw in range(_DRAWS):
        settings = _draw(train, past, (train.seed + len(past) + draw * search.trials) % _SEEDS)
        if all(settings != tried.settings for tried in past):
            return settings
    return None


def _draw(train: TrainConfig, past: Sequence[Tried], seed: int) -> dict[str, Any]:
    import optuna

    search = train.search
    kinds = {name: _distribution(train, name) for name in search.space}
    study = _study(optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(1, round(search.trials * _RANDOM))))
    states = optuna.trial.TrialState
    for tried in past:
        state = states.COMPLETE if tried.score is not None else states.PRUNED if tried.losses else states.FAIL
        study.add_trial(
            optuna.create_trial(
                state=state,
                value=None if tried.score is None else -tried.score,
                params={name: _to_optuna(search, name, tried.settings[name]) for name in kinds},
                distributions=kinds,
                intermediate_values=_numbered(tried.losses),
            )
        )
    drawn = study.ask(kinds).params
    return {name: _from_optuna(search, name, drawn[name]) for name in kinds}


def _numbered(losses: Losses) -> dict[int, float]:
    # Optuna compares losses of the same number.
    return dict(enumerate(losses, start=1))


def _study(sampler: "optuna.samplers.BaseSampler") -> "optuna.Study":
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="minimize", sampler=sampler)


def _distribution(train: TrainConfig, name: str) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values = train.search.space[name]
    if not isinstance(values, Range):
        # Indices: Optuna takes no lists as values.
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
    chosen = values[value]
    # A list, as in a trial's file.
    return list(chosen) if isinstance(chosen, tuple) else chosen
