"""Parse answers that are JSON, and score their fields."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any


def parse(text: str) -> Any:
    """
    Return the JSON object or array that `text` consists of; `None` if it is anything else.

    As strict as a consuming program: no text and no code fence around it, no NaN.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def field_f1(answer: str, reference: str) -> float:
    """
    Return the F1 of an answer's fields against a reference's, 0 to 1.

    Both are flattened to a bag of (path, value) pairs, and precision and recall are counted over them, as slots and
    their values are in information extraction (MUC-5; Chinchor and Sundheim 1993). The order of an object's keys does
    not count, an array's does: its indices are part of the path. Numbers are compared as numbers, strings exactly. Zero
    if either is not a JSON object or array.
    """
    value, expected = parse(answer), parse(reference)
    if value is None or expected is None:
        return 0.0
    fields, wanted = Counter(_leaves(value)), Counter(_leaves(expected))
    return 2 * (fields & wanted).total() / (fields.total() + wanted.total())


def _leaves(value: Any) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """
    Yield path and canonical value of every leaf, in no order; an empty object or array is a leaf, too.

    Without recursion: a value that the JSON parser accepts may be too deep for a recursive function.
    """
    todo: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while todo:
        path, here = todo.pop()
        if isinstance(here, dict) and here:
            todo += [((*path, key), part) for key, part in here.items()]
        elif isinstance(here, list) and here:
            todo += [((*path, index), part) for index, part in enumerate(here)]
        else:
            whole = isinstance(here, float) and here.is_integer()
            yield path, json.dumps(int(here) if whole else here)


def _refuse(word: str) -> None:
    raise ValueError(word)
