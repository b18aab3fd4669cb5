"""
Numbers in settings, looked at before Pydantic does: it takes true for 1, and an infinite margin is none at all.

True, false, infinity and NaN are no numbers here.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def no_numbers(
    values: Mapping[str, Any], model: type[BaseModel], place: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each value, with the names that lead to it, that stands where `model` has a number and is none."""
    for key, value in values.items():
        field = model.model_fields.get(key)
        section = None if field is None else section_of(field)
        if section is not None and isinstance(value, Mapping):
            yield from no_numbers(value, section, (*place, key))
        elif field is not None and _is_number(field.annotation):
            named = {(*place, key, name): one for name, one in value.items()} if isinstance(value, Mapping) else None
            for where, one in (named or {(*place, key): value}).items():
                if isinstance(one, bool) or not _is_finite(one):
                    yield where, one


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a field that is a table of settings; `None` for any other field."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _is_number(annotation: Any) -> bool:
    """Say whether a field holds numbers, by itself or under names of their own."""
    return annotation in {int, float} or any(_is_number(part) for part in get_args(annotation))


def _is_finite(value: Any) -> bool:
    """Say whether a value is not infinite and not NaN; a text counts as the number that Pydantic reads in it."""
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return True  # a whole number beyond any float
    except (TypeError, ValueError):
        return True  # no number at all, which is for Pydantic to say
