"""Answers that are JSON: whether they can be read, and how many of their fields are right."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any


def parse(text: str) -> Any:
    """
    Return the JSON object or array that `text` is; `None` if it is neither.

    As strict as a program that will read the answer: no words and no code fence around it, no NaN.
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
    not count, an array's does: its places are part of the path. Numbers are compared as numbers, strings exactly. Zero
    if either is no JSON object or array.
    """
    said, wanted = parse(answer), parse(reference)
    if said is None or wanted is None:
        return 0.0
    mine, theirs = Counter(_leaves(said)), Counter(_leaves(wanted))
    return 2 * (mine & theirs).total() / (mine.total() + theirs.total())


def _leaves(value: Any) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """
    Yield path and canonical value of every leaf, in no order; an empty object or array is a leaf, too.

    Without recursion: what is just not too deep for the JSON reader would be too deep for a function that calls itself.
    """
    todo: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while todo:
        path, here = todo.pop()
        if isinstance(here, dict) and here:
            todo += [((*path, key), part) for key, part in here.items()]
        elif isinstance(here, list) and here:
            todo += [((*path, place), part) for place, part in enumerate(here)]
        else:
            whole = isinstance(here, float) and here.is_integer()
            yield path, json.dumps(int(here) if whole else here)


def _refuse(word: str) -> None:
    raise ValueError(word)
