"""What a trained adapter makes of the dev rows: their answers scored, or their likelihood where they are few."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

#: Dev rows from which on their answers are scored; fewer differ too much by chance to tell two trials apart.
METRIC_ROWS = 100
#: Dev rows asked together where the settings leave it open.
_TOGETHER = 16
NLL = "nll"


@dataclass(frozen=True)
class DevSet:
    """The dev rows, and how a model is asked them."""

    base: Path
    device: Device
    tokenizer: Any
    ends: tuple[int, ...]
    """Tokens that end an answer."""
    rows: Sequence[TokenRow]
    references: Sequence[str]
    """Of each row, the answer that it has."""
    metric: str
    decoding: Decoding

    @property
    def by(self) -> str:
        """What candidates are chosen by: the track's metric, or "nll"."""
        return self.metric if len(self.rows) >= METRIC_ROWS else NLL


@dataclass(frozen=True)
class Scored:
    """One candidate on the dev rows, in their order."""

    by: str
    scores: tuple[float, ...]
    """Higher is better: of the metric 0 to 1, or the mean log-likelihood of the answer's tokens in nats."""
    weights: tuple[float, ...]
    """1 for a metric, else the answer's tokens."""


def score_dev(dev: DevSet, adapter: Path, attempt: Attempt) -> Scored:
    """
    Return what the 16-bit base, which is merged and judged, makes of the dev rows with the adapter in a folder.

    Raises `Interrupted` if the attempt is asked to stop, `StepFailed` if memory does not suffice, or if the model says
    something that is no number.
    """
    import torch
    from peft import PeftModel

    # What trained it may still wait to be collected.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    attempt.check_stop()
    peft: Any = PeftModel
    with memory_errors():
        base: Any = load_model(dev.base, dev.device, dtype=arithmetic_dtype(dev.device))
        # The base model's own class, its layers adapted: the wrapper hides which arguments it takes.
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
    for batch in answer_batches(prompts, dev.decoding.batch_size or _TOGETHER):

        def watch(complete: int, _tokens: int, before: int = done) -> None:
            attempt.check_stop()
            attempt.progress(before + complete, len(prompts), phase="dev")

        found = answers(asked, [prompts[place] for place in batch], _decoding(dev), watch)
        for place, answer in zip(batch, found, strict=True):
            texts[place] = answer.text
        done += len(batch)
    scores = METRICS[dev.metric].scores(texts, [[reference] for reference in dev.references])
    return Scored(dev.metric, tuple(scores), (1.0,) * len(scores))


def _by_likelihood(dev: DevSet, asked: AskedModel, attempt: Attempt) -> Scored:
    pairs = [_parts(row) for row in dev.rows]
    size = asked.model.get_output_embeddings().weight.shape[0]
    scores = [0.0] * len(pairs)
    done = 0
    for batch in likelihood_batches(pairs, dev.decoding.batch_size or _TOGETHER, size):
        attempt.check_stop()
        attempt.progress(done, len(pairs), phase="dev")
        for place, one in zip(batch, likelihoods(asked, [pairs[place] for place in batch]), strict=True):
            scores[place] = -one.nll / one.tokens
        done += len(batch)
    if not all(score > -float("inf") for score in scores):
        raise StepFailed("the trained model's likelihoods of the dev rows are no numbers", "lower train.learning_rate")
    return Scored(NLL, tuple(scores), tuple(float(len(answer)) for _, answer in pairs))


def _decoding(dev: DevSet) -> Decoding:
    one = dev.decoding
    return Decoding(one.max_new_tokens, one.repetition_penalty, one.batch_size or _TOGETHER, one.window)


def _parts(row: TokenRow) -> tuple[list[int], list[int]]:
    """Return the tokens of prompt and answer."""
    answer = sum(row.completion_mask)
    return row.input_ids[:-answer], row.input_ids[-answer:]
