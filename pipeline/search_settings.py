"""The table [train.search]: which settings of [train] are tried, how, and how often."""

import difflib
from collections.abc import Collection, Iterator, Mapping
from itertools import product
from math import prod
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from pipeline.described import Frozen

Bound = Annotated[float, Field(allow_inf_nan=False)]
Value = bool | int | float | str | tuple[str, ...]
T = TypeVar("T", bound=BaseModel)


class Range(Frozen):
    """Numbers from `low` to `high`, both included."""

    low: int | Bound
    high: int | Bound
    log: bool = False
    """Whether the number's logarithm is drawn: for one that is to be doubled or halved."""


class SearchConfig(Frozen):
    """Several trainings a run with other settings; the dev rows choose the one that is merged and judged."""

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
    """Return `train` with other settings, without a search. Raises `ValidationError`."""
    plain = train.model_dump(exclude={"search", "soup"})
    return type(train).model_validate({**plain, **settings})


def check_search(search: SearchConfig, train: BaseModel, fixed: set[str]) -> None:
    """
    Raise `ValueError` unless each setting of the space is one of `train`'s that can be tried, with values for it.

    `fixed` are settings that all trials have in common.
    """
    for name, values in search.space.items():
        _check_name(name, type(train).model_fields, fixed)
        tried = (values.low, values.high) if isinstance(values, Range) else values
        if len(tried) != len({repr(value) for value in tried}) or not tried:
            raise ValueError(f"search.space.{name} must have values that differ, as {name} = [1, 2]")
        if isinstance(values, Range):
            _check_range(values, search.method, train, name)
        for value in tried:
            _check_value(train, name, value)
    methods = {_of(train, "method"), *_listed(search, "method")} if search.space else set()
    if methods - {"lora", "dora"}:
        msg = 'search chooses among adapters: set method and search.space.method to "lora" or "dora", or space = {}'
        raise ValueError(msg)
    if search.space and search.method == "grid" and (size := grid_size(search)) > search.trials:
        msg = (
            f"search.space has {size} combinations, and search.trials = {search.trials}: raise search.trials, name "
            'fewer values, or set search.method = "tpe"'
        )
        raise ValueError(msg)


def check_soup(soup: Collection[str], search: SearchConfig, train: BaseModel) -> None:
    """Raise `ValueError` if the adapters that these settings train cannot be combined as `soup` says."""
    if soup and _of(train, "start") != "base":
        raise ValueError('soup combines adapters over the base: set start = "base", or soup = []')
    made = {name: {_of(train, name)} | set(_listed(search, name)) for name in ("method", "rslora")}
    if soup and (made["method"] != {"lora"} or made["rslora"] != {False}):
        raise ValueError('soup combines plain LoRA alone: set method = "lora" and rslora = false, or soup = []')
    if {"ties", "dare_ties"} & set(soup) and "rank" in search.space:
        msg = 'soup has "ties" or "dare_ties", which need equal ranks, and search.space tries ranks: use "cat" or "svd"'
        raise ValueError(msg)


def _of(train: BaseModel, name: str) -> Any:
    return getattr(train, name)


def _listed(search: SearchConfig, name: str) -> tuple[Value, ...]:
    values = search.space.get(name, ())
    return () if isinstance(values, Range) else values


def grid_size(search: SearchConfig) -> int:
    """Return how many combinations a space of lists has."""
    return prod(len(values) for values in search.space.values() if not isinstance(values, Range))


def grid(search: SearchConfig) -> Iterator[dict[str, Value]]:
    """Yield all combinations of a space of lists, the last setting changing first."""
    lists = [values for values in search.space.values() if not isinstance(values, Range)]
    for values in product(*lists):
        yield dict(zip(search.space, values, strict=True))


def largest(search: SearchConfig, name: str, alone: float) -> float:
    """Return the largest value of a numeric setting that is tried; `alone` where the search has it not."""
    values = search.space.get(name)
    if isinstance(values, Range):
        return values.high
    return max((value for value in values or () if isinstance(value, int | float)), default=alone)


def most_trials(search: SearchConfig) -> int:
    """Return how many trials a search has at most."""
    return grid_size(search) if search.method == "grid" else search.trials


def _check_name(name: str, known: Mapping[str, object], fixed: set[str]) -> None:
    free = sorted(known.keys() - fixed)
    if name in fixed:
        raise ValueError(f"search.space.{name}: all trials have it in common; what can be tried: {', '.join(free)}")
    if name not in known:
        near = difflib.get_close_matches(name, free, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"what can be tried: {', '.join(free)}"
        raise ValueError(f"search.space.{name}: there is no setting train.{name}; {hint}")


def _check_range(values: Range, method: str, train: BaseModel, name: str) -> None:
    if values.low >= values.high or (values.log and values.low <= 0):
        raise ValueError(f"search.space.{name}: low must be below high, and with log = true above 0")
    if method == "grid":
        msg = f'search.space.{name} is a range, of which a grid has no values: name them, or set search.method = "tpe"'
        raise ValueError(msg)
    if type(getattr(train, name)) not in {int, float}:
        msg = f"search.space.{name} is a range, and train.{name} is no number: name its values, as in {name} = [...]"
        raise ValueError(msg)


def _check_value(train: BaseModel, name: str, value: Value) -> None:
    try:
        with_settings(train, {name: value})
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"search.space.{name} has {value!r}: {problem}") from error
