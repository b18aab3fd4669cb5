"""Hyperparameter search: the settings of [train.search], and a trial in words."""

from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from pipeline.artifacts import Frozen, Trial
from pipeline.words import duration, listed, plain

Bound = Annotated[float, Field(allow_inf_nan=False)]
Value = bool | int | float | str | tuple[str, ...]
T = TypeVar("T", bound=BaseModel)


class Range(Frozen):
    """Numbers from `low` to `high`, both included."""

    low: int | Bound
    high: int | Bound
    log: bool = False
    """Whether values are drawn on a logarithmic scale."""


class SearchConfig(Frozen):
    """Hyperparameter search: several trainings per run; the dev records choose the one that is merged and evaluated."""

    when: Literal["always", "asked"] = "always"
    """`asked`: only a run that `dropforge search` began; all others train as [train] says."""
    method: Literal["grid", "tpe"] = "grid"
    """`grid` tries all combinations; `tpe` lets Optuna draw near those that did well."""
    space: dict[str, Range | tuple[Value, ...]] = Field(default_factory=dict)
    """Settings with their values: rank = [8, 32], learning_rate = { low = 1e-4, high = 1e-3, log = true }; {}: none."""
    trials: int = Field(default=8, ge=2, le=1000)
    """Most trainings; a grid of more is refused."""
    hours: float = Field(default=0.0, ge=0, le=8760)
    """Hours for the trainings together: none begins that would not fit, by the longest before it; 0: no limit."""


def with_settings(train: T, settings: Mapping[str, Any]) -> T:
    """Return a copy of `train` with `settings` and no search; all else stays. Raises pydantic's `ValidationError`."""
    return type(train).model_validate({**train.model_dump(exclude={"search"}), **settings})


def check_search(search: SearchConfig, train: Any, fixed: set[str]) -> None:
    """
    Raise `ValueError` unless `search.space` is empty or valid for the training settings `train`.

    Each name must be a setting of `train` that is not in `fixed` (settings that all trials share), with values that
    differ and are valid there. A range needs the method tpe and a numeric setting, `low` below `high` and, if `log`,
    above 0; a grid may have at most `search.trials` combinations; only the methods lora and dora can be searched.
    """
    for name, values in search.space.items():
        _check_name(name, type(train).model_fields, fixed)
        tried = (values.low, values.high) if isinstance(values, Range) else values
        if len(tried) != len({repr(value) for value in tried}) or not tried:
            raise ValueError(f"search.space.{name} must have values that differ, as {name} = [1, 2]")
        if isinstance(values, Range):
            _check_range(values, search.method, name)
        for value in tried:
            try:
                trial = with_settings(train, {name: value})
            except ValidationError as error:
                raise ValueError(f"search.space.{name} has {value!r}: {first_problem(error)[1]}") from error
            if isinstance(values, Range) and type(getattr(trial, name)) not in {int, float}:
                raise ValueError(
                    f"search.space.{name} is a range, and train.{name} is not a number: "
                    f"list its values, as in {name} = [...]"
                )
    methods = search.space.get("method", ())
    if search.space and not {train.method, *(methods if isinstance(methods, tuple) else ())} <= {"lora", "dora"}:
        raise ValueError(
            'search chooses among adapters: set method and search.space.method to "lora" or "dora", or space = {}'
        )
    if search.space and search.method == "grid" and most_trials(search) > search.trials:
        raise ValueError(
            f"search.space has {most_trials(search)} combinations, and search.trials = {search.trials}: raise "
            'search.trials, name fewer values, or set search.method = "tpe"'
        )


def first_problem(error: ValidationError) -> tuple[tuple[str, ...], str, Any]:
    """
    Return the first error's field as a path, its message and the value that was found.

    A value that is neither "auto" nor a valid number has two errors: that of the number is returned.
    """
    errors = error.errors()
    first = next((detail for detail in errors if detail["type"] != "literal_error"), errors[0])
    # The marks of a dictionary's key and of a union's members are no fields.
    place = [str(part) for part in first["loc"] if part not in {"[key]", "constrained-float", "constrained-int"}]
    return tuple(place), first["msg"].removeprefix("Value error, "), first["input"]


def grid(search: SearchConfig) -> Iterator[dict[str, Value]]:
    """Yield a space's combinations as {setting: value}, the last fastest. Raises `ValueError` if it has a `Range`."""
    lists = [values for values in search.space.values() if not isinstance(values, Range)]
    for values in product(*lists):
        yield dict(zip(search.space, values, strict=True))


def largest_rank(search: SearchConfig, default: float) -> float:
    """Return the largest rank in the search's space; `default` if it has none."""
    values = search.space.get("rank")
    if isinstance(values, Range):
        return values.high
    return max((value for value in values or () if isinstance(value, int | float)), default=default)


def most_trials(search: SearchConfig) -> int:
    """Return the most trials of a search: its `trials` with tpe, the number of combinations with a grid."""
    if search.method == "tpe":
        return search.trials
    return prod(len(values) for values in search.space.values() if not isinstance(values, Range))


def _check_name(name: str, known: Mapping[str, object], fixed: set[str]) -> None:
    free = sorted(known.keys() - fixed)
    if name not in free:
        problem = "all trials share it" if name in fixed else f"there is no setting train.{name}"
        raise ValueError(f"search.space.{name}: {problem}; what can be tried: {', '.join(free)}")


def _check_range(values: Range, method: str, name: str) -> None:
    if values.low >= values.high or (values.log and values.low <= 0):
        raise ValueError(f"search.space.{name}: low must be below high, and with log = true above 0")
    if method == "grid":
        raise ValueError(
            f'search.space.{name} is a range, and a grid needs values: list them, or set search.method = "tpe"'
        )


def settings_words(settings: dict[str, Any]) -> str:
    """Return settings in one line, as "learning_rate 0.0004, rank 16"; floats have at most 3 significant digits."""
    return ", ".join(f"{name} {_value_words(value)}" for name, value in settings.items())


def trial_words(trial: Trial) -> str:
    """Return a trial in one line: number, settings, outcome, dev loss, duration, whether chosen, why it failed."""
    parts = [f"{trial.number}. {settings_words(trial.settings)}: {trial.outcome}"]
    if trial.dev_loss is not None:
        parts.append(f"dev loss {plain(trial.dev_loss, 3)}")
    parts.append(duration(trial.seconds))
    words = ", ".join(parts) + (", chosen" if trial.chosen else "")
    return f"{words}; {trial.why}" if trial.why else words


def _value_words(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return listed([str(item) for item in value]) if isinstance(value, (tuple, list)) else str(value)
