"""
Numbers in settings, looked at before Pydantic does: it takes true for 1, and an infinite margin is none at all.

True, false, infinity and NaN are no numbers here, and neither is what is beyond any sense.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def no_numbers(
    values: Mapping[str, Any], model: type[BaseModel], place: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each value that is no number where `model` has one, with the names that lead to it."""
    for key, value in values.items():
        field = model.model_fields.get(key)
        section = None if field is None else section_of(field)
        if section is not None and isinstance(value, Mapping):
            yield from no_numbers(value, section, (*place, key))
        elif field is not None and _is_number(field.annotation):
            named = {(*place, key, name): one for name, one in value.items()} if isinstance(value, Mapping) else None
            yield from ((where, one) for where, one in (named or {(*place, key): value}).items() if not _is_finite(one))


def _is_finite(value: Any) -> bool:
    """Say whether a value is a finite number, or none at all: then Pydantic says so."""
    if isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False  # a whole number beyond any float
    except (TypeError, ValueError):
        return True


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a field that is a table of settings; `None` for any other field."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _is_number(annotation: Any) -> bool:
    """Say whether a field holds numbers, by itself or under names of their own."""
    return annotation in {int, float} or any(_is_number(part) for part in get_args(annotation))
