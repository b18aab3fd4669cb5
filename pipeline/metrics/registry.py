"""
All metrics: each scores an answer against its references from 0 (nothing in common) to 1 (equal), in any script.

With several references the best score counts. Adding a metric is one entry in METRICS, and its name in
`pipeline.config.MetricName`.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

from pipeline.metrics import json_fields
from pipeline.metrics.tokens import normalise, tokens

Scores = Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]


@dataclass(frozen=True)
class Metric:
    """A metric: its name, its function, and the records that it applies to (all, or some by their references)."""

    name: str
    title: str
    """Name in sentences."""
    scores: Scores
    """Scores each prediction against the references at the same index, 0 to 1, higher is better."""
    applies_to: Callable[[Sequence[str]], bool] = lambda _references: True
    """Whether it applies to a record with these references."""


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the normalised prediction is one of the normalised references, else 0."""
    return float(normalise(prediction) in {normalise(reference) for reference in references})


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """
    Return the F1 of the bags of `tokens` (Rajpurkar et al. 2016, SQuAD), 0 to 1, the best over the references.

    A reference without any token (a dash, say) is compared by `exact_match`. 0 without references.
    """
    return max((_f1(prediction, reference) for reference in references), default=0.0)


def rouge(kind: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """
    Return each prediction's ROUGE F-measure (Lin 2004), 0 to 1, the best over the references at the same index.

    `kind` is rouge1, rouge2 or rougeL. It is computed by rouge_score with `tokens`, through `evaluate.Metric`. Each
    prediction needs a reference; one without any token (a dash, say) is compared by `exact_match`.
    """
    if not predictions:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        metric = _rouge_class()(config_name=kind, keep_in_memory=True, cache_dir=scratch)
        result = metric.compute(predictions=list(predictions), references=[list(some) for some in references])
    return [
        max(score, exact_match(prediction, [text for text in some if not tokens(text)]))
        for score, prediction, some in zip(result[kind], predictions, references, strict=True)
    ]


def chrf(prediction: str, references: Sequence[str]) -> float:
    """
    Return chrF2, the F2 of character n-grams up to 6 without spaces (Popovi\u0107 2015), by sacrebleu, from 0 to 1.

    With several references the best score counts, as in sacrebleu; 0 without references.
    """
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().sentence_score(prediction, list(references)).score) / 100 if references else 0.0


def json_valid(prediction: str, _references: Sequence[str]) -> float:
    """Return 1 if the prediction is a JSON object or array and nothing else, else 0."""
    return float(json_fields.parse(prediction) is not None)


def json_f1(prediction: str, references: Sequence[str]) -> float:
    """
    Return the F1 of the prediction's fields (`json_fields.field_f1`), the best over the references; 0 without any.

    A reference that is not a JSON object or array is compared by `exact_match`.
    """
    return max(
        (
            exact_match(prediction, [reference])
            if json_fields.parse(reference) is None
            else json_fields.field_f1(prediction, reference)
            for reference in references
        ),
        default=0.0,
    )


def _all_json(references: Sequence[str]) -> bool:
    return bool(references) and all(json_fields.parse(text) is not None for text in references)


def _f1(prediction: str, reference: str) -> float:
    predicted, wanted = Counter(tokens(prediction)), Counter(tokens(reference))
    if not wanted:
        return exact_match(prediction, [reference])
    shared = (predicted & wanted).total()
    return 2 * shared / (predicted.total() + wanted.total())


@cache
def _rouge_class() -> Any:
    """Return the metric's class, defined on first use: `evaluate.load` would query a hub, imports take seconds."""
    import datasets
    import evaluate
    from rouge_score import rouge_scorer

    class UnicodeRouge(evaluate.Metric):  # type: ignore[misc]
        """ROUGE F-measures per record, the best over its references."""

        def _info(self) -> Any:
            text = datasets.Value("string")
            return evaluate.MetricInfo(
                description="ROUGE with Unicode tokens",
                citation="Lin 2004",
                features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
            )

        def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, list[float]]:
            kind = self.config_name
            scorer = rouge_scorer.RougeScorer([kind], tokenizer=SimpleNamespace(tokenize=tokens))
            pairs = zip(predictions, references, strict=True)
            return {kind: [float(scorer.score_multi(some, answer)[kind].fmeasure) for answer, some in pairs]}

    return UnicodeRouge


def _each(score: Callable[[str, Sequence[str]], float]) -> Scores:
    return lambda predictions, references: list(map(score, predictions, references))


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact_match", "exact match", _each(exact_match)),
        Metric("token_f1", "token F1", _each(token_f1)),
        Metric("rouge1", "ROUGE-1", partial(rouge, "rouge1")),
        Metric("rouge2", "ROUGE-2", partial(rouge, "rouge2")),
        Metric("rougeL", "ROUGE-L", partial(rouge, "rougeL")),
        Metric("chrf", "chrF", _each(chrf)),
        Metric("json_valid", "valid JSON", _each(json_valid), _all_json),
        Metric("json_f1", "field F1", _each(json_f1), _all_json),
    )
}
