"""Which metric `evaluate.metric = "auto"` stands for, by the answers."""

from collections.abc import Sequence

from pipeline.metrics import json_fields
from pipeline.metrics.tokens import is_short

#: An answer of so many words is short.
SHORT_WORDS = 5
#: So large a share of the answers decides.
_MOST = 0.8


def auto_metric(short: float, json: float) -> str:
    """Return the metric by the shares of short answers and of JSON: field F1, exact match, or ROUGE-L for long ones."""
    if json >= _MOST:
        return "json_f1"
    return "exact_match" if short >= _MOST else "rougeL"


def metric_of(answers: Sequence[str]) -> str | None:
    """Return the metric for these answers; `None` of none."""
    if not answers:
        return None
    short = sum(is_short(text, SHORT_WORDS) for text in answers)
    json = sum(json_fields.parse(text) is not None for text in answers)
    return auto_metric(short / len(answers), json / len(answers))
