"""Choose the metric for `evaluate.metric = "auto"` by the reference answers."""

from collections.abc import Sequence

from pipeline.metrics import json_fields
from pipeline.metrics.tokens import is_short

#: Most words of a short answer.
SHORT_WORDS = 5
#: Share of the answers that must be JSON, or short.
_MOST = 0.8


def metric_of(answers: Sequence[str]) -> str | None:
    """
    Return the metric's name for these reference answers, or `None` if there are none.

    It is `json_f1` if at least 80 % are JSON objects or arrays, else `exact_match` if as many have at most
    `SHORT_WORDS` words, else `rougeL`.
    """
    if not answers:
        return None
    if sum(json_fields.parse(text) is not None for text in answers) >= _MOST * len(answers):
        return "json_f1"
    short = sum(is_short(text, SHORT_WORDS) for text in answers)
    return "exact_match" if short >= _MOST * len(answers) else "rougeL"
