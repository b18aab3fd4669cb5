"""Estimate how many rows are longer than the window, and which window would fit them, by a sample of the drops."""

import json
import math
from collections.abc import Iterator
from itertools import islice

from pipeline.artifacts import Drop
from pipeline.contract import Attempt
from pipeline.models.template import fold
from pipeline.models.token_counts import Window
from pipeline.records.records import Row, record_of

_SAMPLE = 1000
#: From this share of the rows on they are worth a warning.
_MANY = 0.1
#: The advised window fits this share of the rows: one row of a million tokens must not choose it.
_FITTED = 0.98
_STEP = 256
#: Longer texts are counted by their beginning.
_COUNTED_CHARACTERS = 20_000


def long_rows(attempt: Attempt, window: Window) -> tuple[int, list[str]]:
    """
    Estimate by 1,000 rows how many of all rows exceed `window`; from a tenth on, add a warning with one that would fit.

    What a chat template adds to a row is not counted. Returns 0 for a base model without a tokenizer.json.
    """
    if not window.counts:
        return 0, []
    total = sum(drop.rows for drop in attempt.spec.drops)
    stride = math.ceil(total / _SAMPLE)
    lengths = sorted(length for drop in attempt.spec.drops for length in _lengths(attempt, drop, stride, window))
    share = sum(length > window.tokens for length in lengths) / max(1, len(lengths))
    number = round(share * total)
    if share < _MANY:
        return number, []
    fits = math.ceil(lengths[math.ceil(_FITTED * len(lengths)) - 1] / _STEP) * _STEP
    words = f"about {number:,} of {total:,} rows are longer than {window.tokens:,} tokens and left out whole: "
    if fits <= window.limit:
        return number, [f"{words}train.max_length = {fits} would fit {_FITTED:.0%} of all rows"]
    return number, [f"{words}the base model's window is {window.limit:,}: shorten them, or use another base model"]


def _lengths(attempt: Attempt, drop: Drop, stride: int, window: Window) -> Iterator[int]:
    """Yield the tokens of each `stride`-th row; of a row that certainly fits, its bytes."""
    with attempt.path(drop.path).open("rb") as lines:
        for number, line in enumerate(islice(lines, 0, None, max(1, stride))):
            attempt.check_stop()
            record = record_of(Row(number, json.loads(line))) if line.strip() else None
            if record is not None:
                text = f"{fold(record.instruction, record.input)}\n{record.output}"
                yield _length(text, window)


def _length(text: str, window: Window) -> int:
    octets = len(text.encode())
    if octets <= window.tokens:
        return octets
    beginning = text[:_COUNTED_CHARACTERS]
    return round(window.count(beginning) * len(text) / len(beginning))
