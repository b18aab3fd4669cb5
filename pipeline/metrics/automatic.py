"""Which metric `evaluate.metric = "auto"` stands for, by the answers."""

from collections.abc import Sequence

from pipeline.metrics import json_fields
from pipeline.metrics.tokens import is_short

#: An answer of so many words is short.
SHORT_WORDS = 5
#: So large a share of the answers decides.
_MOST = 0.8


def metric_of(answers: Sequence[str]) -> str | None:
    """Return the metric for answers: field F1 of JSON, exact match of short ones, else ROUGE-L; `None` for none."""
    if not answers:
        return None
    if sum(json_fields.parse(text) is not None for text in answers) >= _MOST * len(answers):
        return "json_f1"
    short = sum(is_short(text, SHORT_WORDS) for text in answers)
    return "exact_match" if short >= _MOST * len(answers) else "rougeL"
