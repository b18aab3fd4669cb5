"""Choose the metric for `evaluate.metric = "auto"` by the reference answers."""

from collections.abc import Iterable

from pipeline.metrics import json_fields
from pipeline.metrics.tokens import is_short

#: Most words of a short answer.
SHORT_WORDS = 5
#: Share of the answers that must be JSON, or short.
_MOST = 0.8


def metric_of(answers: Iterable[str]) -> str | None:
    """
    Return the metric's name for these reference answers, or `None` if there are none.

    It is `json_f1` if at least 80 % are JSON objects or arrays, else `exact_match` if as many have at most
    `SHORT_WORDS` words, else `rougeL`.
    """
    total = short = in_json = 0
    for text in answers:
        total += 1
        short += is_short(text, SHORT_WORDS)
        in_json += json_fields.parse(text) is not None
    if not total:
        return None
    if in_json >= _MOST * total:
        return "json_f1"
    return "exact_match" if short >= _MOST * total else "rougeL"
