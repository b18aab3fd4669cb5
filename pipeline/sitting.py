"""
One model is asked about the held-out records: what is known is taken over, what is missing is computed in batches.

Where an earlier attempt was cut off does not show in the predictions: the batches are those of an attempt that was not.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline import durable
from pipeline.batch_log import BatchLog, batch_id
from pipeline.contract import Attempt
from pipeline.errors import StepFailed
from pipeline.predictions import Prediction, PredictionCache, PredictionKey, hash_tokens
from pipeline.qlora import generation
from pipeline.qlora.generation import Decoding
from pipeline.qlora.loading import chosen_device

Role = Literal["candidate", "champion"]
_LOG = ".batches.jsonl"


@dataclass(frozen=True)
class Exam:
    """What one model is asked, and what its answers will be kept under."""

    role: Role
    folder: Path
    tokenizer: Any
    key: PredictionKey
    prompts: list[list[int]]
    completions: list[list[int]]
    """Tokens of each record's reference, with the one that ends it."""


@dataclass(frozen=True)
class Result:
    """One model's predictions, in the order of the records."""

    predictions: list[Prediction]
    generated: int
    resumed: int
    seconds: float


def sit(attempt: Attempt, exam: Exam, ids: Sequence[str], decoding: Decoding, folder: Path) -> Result:
    """
    Return one model's predictions of the records `ids`, from the cache and earlier attempts where they are there.

    They are left in `folder`: all of them at the end, and each batch as it is computed. Raises `Interrupted`, and
    `StepFailed` if a likelihood is not finite or memory does not suffice.
    """
    started = time.monotonic()
    digest = exam.key.digest
    work = _Work(ids, exam, PredictionCache([attempt.root / attempt.spec.predictions / digest]))
    log = BatchLog(folder / f"{digest}{_LOG}", _earlier_logs(attempt, f"{folder.name}/{digest}{_LOG}"))
    sitting = _Sitting(attempt, exam, work, log)
    try:
        if work.without_nll or work.without_answer:
            sitting.fill_likelihoods()
            sitting.fill_answers(decoding)
    finally:
        sitting.close()
    if sitting.resumed:
        words = f"{sitting.resumed} of its {len(work.without_answer)} answers were there from an interrupted attempt"
        sys.stderr.write(f"{exam.role}: {words}\n")
    ordered = work.predictions()
    lines = b"".join(prediction.model_dump_json().encode() + b"\n" for prediction in ordered)
    durable.write_bytes(folder / f"{digest}.jsonl", lines)
    return Result(ordered, len(work.without_answer), sitting.resumed, time.monotonic() - started)


def _earlier_logs(attempt: Attempt, name: str) -> list[Path]:
    """Return the logs called `name` of the run's earlier attempts at this step, in their order."""
    folders = (attempt.folder.with_name(f"{attempt.spec.step}-{number}") for number in range(1, attempt.spec.attempt))
    return [folder / name for folder in folders if (folder / name).is_file()]


class _Work:
    """What is known of each record's prediction, by place, and what is still to be computed."""

    def __init__(self, ids: Sequence[str], exam: Exam, cache: PredictionCache) -> None:
        self.ids = ids
        self.prompts = [hash_tokens(tokens) for tokens in exam.prompts]
        self.references = [hash_tokens(tokens) for tokens in exam.completions]
        places = range(len(ids))
        known = {place: cache.likelihood(self.prompts[place], self.references[place]) for place in places}
        cached = {place: cache.answer(self.prompts[place]) for place in places}
        self.nll = {place: value for place, value in known.items() if value is not None}
        self.answers = {place: (found.text, found.tokens) for place, found in cached.items() if found is not None}
        self.without_nll = [place for place in places if place not in self.nll]
        self.without_answer = [place for place in places if place not in self.answers]

    def predictions(self) -> list[Prediction]:
        """Return the predictions of all records, now that their answers and likelihoods are there."""
        return [self._prediction(place) for place in range(len(self.ids))]

    def _prediction(self, place: int) -> Prediction:
        (text, tokens), (nll_sum, nll_tokens) = self.answers[place], self.nll[place]
        return Prediction(
            id=self.ids[place], prompt_hash=self.prompts[place], text=text, tokens=tokens,
            nll_sum=nll_sum, nll_tokens=nll_tokens, reference_hash=self.references[place],
        )  # fmt: skip


class _Sitting:
    """Computes what is missing, a batch at a time; the model is loaded once, and only if a batch needs it."""

    def __init__(self, attempt: Attempt, exam: Exam, work: _Work, log: BatchLog) -> None:
        self._attempt, self._exam, self._work, self._log = attempt, exam, work, log
        self._pace = _Pace(attempt, exam.role, len(work.without_nll) + len(work.without_answer))
        self._model: generation.AskedModel | None = None
        self.resumed = 0
        """Answers that an earlier attempt had computed."""

    def fill_likelihoods(self) -> None:
        """Compute the missing likelihoods, before the longer work: a broken model shows here."""
        work, exam = self._work, self._exam
        pairs = [(exam.prompts[place], exam.completions[place]) for place in work.without_nll]
        batch_size, vocabulary = exam.key.setup.batch_size, generation.vocabulary(exam.folder)
        for batch in generation.likelihood_batches(pairs, batch_size, vocabulary):
            asked = [pairs[index] for index in batch]
            name = batch_id("likelihood", asked)
            found = self._log.find(name, len(batch))
            if found is None:
                found = generation.likelihoods(self._asked(), asked)
                self._refuse_broken([work.without_nll[index] for index in batch], found)
                self._log.add(name, found)
                self._pace.advance(len(batch), 0)
            else:
                self._pace.skip(len(batch))
            for index, (nll, tokens) in zip(batch, found, strict=True):
                work.nll[work.without_nll[index]] = (nll, tokens)

    def fill_answers(self, decoding: Decoding) -> None:
        """Generate the missing answers."""
        work = self._work
        prompts = [self._exam.prompts[place] for place in work.without_answer]
        for batch in generation.answer_batches(prompts, decoding.batch_size):
            asked = [prompts[index] for index in batch]
            name = batch_id("answer", asked)
            found = self._log.find(name, len(batch))
            if found is None:
                found = generation.answers(self._asked(), asked, decoding, self._attempt.check_stop)
                self._log.add(name, found)
                self._pace.advance(len(batch), sum(answer.tokens for answer in found))
            else:
                self.resumed += len(batch)
                self._pace.skip(len(batch))
            for index, (text, tokens) in zip(batch, found, strict=True):
                work.answers[work.without_answer[index]] = (text, tokens)

    def close(self) -> None:
        """Free the model's memory."""
        self._log.close()
        if self._model is not None:
            generation.close_model(self._model)

    def _asked(self) -> generation.AskedModel:
        if self._model is None:
            self._model = generation.open_model(self._exam.folder, self._exam.tokenizer, chosen_device())
        return self._model

    def _refuse_broken(self, places: Sequence[int], found: Sequence[generation.Likelihood]) -> None:
        for place, likelihood in zip(places, found, strict=True):
            if not math.isfinite(likelihood.nll):
                name = self._work.ids[place][:12]
                message = f"the {self._exam.role}'s likelihood of record {name} is not a finite number"
                raise StepFailed(message, "the model is broken: train again, with a lower train.learning_rate")


class _Pace:
    """Says how far one model's part is, and stops between batches when the step is to stop."""

    def __init__(self, attempt: Attempt, role: Role, total: int) -> None:
        self._attempt, self._role, self._total = attempt, role, total
        self._started = time.monotonic()
        self._generating_since: float | None = None
        self._done = self._skipped = self._tokens = 0
        attempt.check_stop()
        attempt.progress(0, total, phase=role)

    def skip(self, records: int) -> None:
        """Count `records` that an earlier attempt had done."""
        self._done += records
        self._skipped += records
        self._attempt.progress(self._done, self._total, phase=self._role)

    def advance(self, records: int, tokens: int) -> None:
        """Count one batch of `records` in which `tokens` were generated."""
        now = time.monotonic()
        rate = None
        if tokens:
            self._tokens += tokens
            rate = self._tokens / max(now - (self._generating_since or self._started), 1e-9)
        else:
            self._generating_since = now
        self._done += records
        left = (now - self._started) / (self._done - self._skipped) * (self._total - self._done)
        self._attempt.progress(self._done, self._total, phase=self._role, tokens_per_second=rate, eta_seconds=left)
        self._attempt.check_stop()
