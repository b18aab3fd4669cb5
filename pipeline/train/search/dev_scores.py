"""Score a trained adapter on the dev rows: by the track's metric, or by likelihood below `METRIC_ROWS` rows."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.artifacts import Frozen
from pipeline.contract import Attempt
from pipeline.errors import StepFailed
from pipeline.metrics.registry import METRICS
from pipeline.models.generation import (
    AskedModel,
    Decoding,
    close_model,
    likelihood_batches,
    likelihoods,
    memory_errors,
)
from pipeline.models.greedy_decoding import answer_batches, answers
from pipeline.models.loading import Device, arithmetic_dtype, load_model
from pipeline.train.trainer import TokenRow

#: Fewest dev rows for scoring by the metric; with fewer its error is too large to compare trials.
METRIC_ROWS = 100
#: Dev rows per batch where the settings leave it open.
_BATCH_ROWS = 16
NLL = "nll"


@dataclass(frozen=True)
class DevSet:
    """The dev rows with their references, and how answers to them are generated and scored."""

    base: Path
    device: Device
    tokenizer: Any
    ends: tuple[int, ...]
    """Tokens that end an answer."""
    rows: Sequence[TokenRow]
    references: Sequence[str]
    """Each row's answer."""
    metric: str
    decoding: Decoding

    @property
    def by(self) -> str:
        """The criterion for comparing trials: the track's metric, or "nll" below `METRIC_ROWS` rows."""
        return self.metric if len(self.rows) >= METRIC_ROWS else NLL


class Scored(Frozen):
    """One trial's scores on the dev rows, in their order."""

    by: str
    scores: tuple[float, ...]
    """Per row, higher is better: the metric from 0 to 1, or the mean log-likelihood of the answer's tokens in nats."""
    weights: tuple[float, ...]
    """Per row: 1 for a metric, else the number of answer tokens."""


def score_dev(dev: DevSet, adapter: Path, attempt: Attempt) -> Scored:
    """
    Return the dev scores of the unquantised base with the adapter in the folder `adapter`, as if merged.

    Raises `Interrupted` if the attempt is stopped, `StepFailed` if memory does not suffice or a likelihood is not
    finite.
    """
    import torch
    from peft import PeftModel

    # The trainer may still wait for garbage collection.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    attempt.check_stop()
    peft: Any = PeftModel
    with memory_errors():
        base: Any = load_model(dev.base, dev.device, dtype=arithmetic_dtype(dev.device))
        # The base model's own class with adapted layers: the wrapper hides its arguments.
        model = peft.from_pretrained(base, adapter).get_base_model().eval()
    asked = AskedModel(model, dev.tokenizer, dev.ends)
    try:
        return _by_metric(dev, asked, attempt) if dev.by != NLL else _by_likelihood(dev, asked, attempt)
    finally:
        close_model(asked)


def _by_metric(dev: DevSet, asked: AskedModel, attempt: Attempt) -> Scored:
    prompts = [_parts(row)[0] for row in dev.rows]
    texts = [""] * len(prompts)
    done = 0
    decoding = replace(dev.decoding, batch_size=dev.decoding.batch_size or _BATCH_ROWS)
    for batch in answer_batches(prompts, decoding.batch_size):

        def watch(complete: int, _tokens: int, before: int = done) -> None:
            attempt.check_stop()
            attempt.progress(before + complete, len(prompts), phase="dev")

        batch_answers = answers(asked, [prompts[index] for index in batch], decoding, watch)
        for index, answer in zip(batch, batch_answers, strict=True):
            texts[index] = answer.text
        done += len(batch)
    scores = METRICS[dev.metric].scores(texts, [[reference] for reference in dev.references])
    return Scored(by=dev.metric, scores=tuple(scores), weights=(1.0,) * len(scores))


def _by_likelihood(dev: DevSet, asked: AskedModel, attempt: Attempt) -> Scored:
    pairs = [_parts(row) for row in dev.rows]
    size = asked.model.get_output_embeddings().weight.shape[0]
    scores = [0.0] * len(pairs)
    done = 0
    for batch in likelihood_batches(pairs, dev.decoding.batch_size or _BATCH_ROWS, size):
        attempt.check_stop()
        attempt.progress(done, len(pairs), phase="dev")
        for index, likelihood in zip(batch, likelihoods(asked, [pairs[index] for index in batch]), strict=True):
            scores[index] = -likelihood.nll / likelihood.tokens
        done += len(batch)
    if not all(score > -float("inf") for score in scores):
        raise StepFailed("the trained model's likelihoods of the dev rows are not finite", "lower train.learning_rate")
    return Scored(by=NLL, scores=tuple(scores), weights=tuple(float(len(answer)) for _, answer in pairs))


def _parts(row: TokenRow) -> tuple[list[int], list[int]]:
    """Return a row's prompt tokens and answer tokens."""
    answer = sum(row.completion_mask)
    return row.input_ids[:-answer], row.input_ids[-answer:]
