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
) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """
    Yield each value that is not the number that `model` has there, with the names that lead to it and what is expected.

    Bounds that a field has in the schema alone (`pipeline.config.at_most`) are held here: stored runs may be beyond.
    """
    for key, value in values.items():
        field = model.model_fields.get(key)
        section = None if field is None else section_of(field)
        if section is not None and isinstance(value, Mapping):
            yield from no_numbers(value, section, (*place, key))
        elif field is not None and _is_number(field.annotation):
            named = {(*place, key, name): one for name, one in value.items()} if isinstance(value, Mapping) else None
            for where, one in (named or {(*place, key): value}).items():
                expected = _expected(one, field)
                if expected:
                    yield where, one, expected


def _expected(value: Any, field: FieldInfo) -> str:
    """Return what a number must be that `value` is not; nothing if it is, or is no number at all: so says Pydantic."""
    if isinstance(value, bool):
        return "a finite number"
    try:
        number = float(value)
    except OverflowError:
        number = math.inf  # a whole number beyond any float
    except (TypeError, ValueError):
        return ""
    if not math.isfinite(number):
        return "a finite number"
    bounds = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    least, most = bounds.get("minimum"), bounds.get("maximum")
    if isinstance(most, int | float) and number > most:
        return f"at most {most:,}"
    if isinstance(least, int | float) and number < least:
        return f"at least {least:,}"
    return ""


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a field that is a table of settings; `None` for any other field."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _is_number(annotation: Any) -> bool:
    """Say whether a field holds numbers, by itself or under names of their own."""
    return annotation in {int, float} or any(_is_number(part) for part in get_args(annotation))
