"""A row as small as its faults allow, for jsonschema, whose work would grow with everything that a row holds."""

from typing import TYPE_CHECKING, Any

from pipeline.records.fast_path import KEYS
from pipeline.records.records import LABELS, LONGEST_TAG, MOST_TAGS

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError


def outline(value: Any) -> Any:
    """Return a small row that breaks the schema as `value` does, so that errors stay small; without too many tags."""
    if not isinstance(value, dict):
        return _small(value)
    small = {key: _small(value[key]) for key in (*KEYS, *LABELS) if key in value}
    for key in KEYS:
        if isinstance(value.get(key), str):
            small[key] = value[key].strip()[:1]
    tags = value.get("tags")
    if isinstance(tags, list) and len(tags) > MOST_TAGS:
        del small["tags"]
    elif isinstance(tags, list):
        small["tags"] = [_small(tag) for tag in tags]
    return small


def meant(value: Any, error: "ValidationError") -> Any:
    """Return what in the row `value` an error about its outline is about."""
    for step in error.absolute_path:
        value = value[step]
    return value


def _small(value: Any) -> Any:
    if isinstance(value, str):
        return value[: LONGEST_TAG + 1]
    return type(value)() if isinstance(value, list | dict) else value
