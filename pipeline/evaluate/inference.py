"""
Compute one model's predictions: cached ones are reused, missing ones computed in batches, the model loaded once.

A resumed evaluation gives the same predictions as an uninterrupted one: its batches are the same.
"""

import math
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.evaluate import lm_eval
from pipeline.evaluate.batch_log import BatchLog, batch_id
from pipeline.evaluate.engines import InStep, Vllm
from pipeline.evaluate.pending import Answered, Pace, Pending
from pipeline.evaluate.plan import SuiteRequests
from pipeline.evaluate.prediction_cache import PLAIN, ItemScore, Prediction
from pipeline.evaluate.suites import Suite
from pipeline.evaluate.vllm import Process
from pipeline.metrics.degenerate import is_looping
from pipeline.metrics.registry import token_f1
from pipeline.models import generation, greedy_decoding, multiple_choice
from pipeline.models.generation import Decoding
from pipeline.models.loading import chosen_device

_LOG = ".batches.jsonl"


@dataclass(frozen=True)
class Result:
    """One model's predictions, in the order of the records."""

    predictions: list[Prediction]
    generated: int
    resumed: int
    seconds: float
    suites: dict[str, dict[str, ItemScore]]
    """Scores of each suite's items, by the suite's sha256."""
    again: dict[int, str] | None
    """Answers generated a second time, by the record's index; `None` if not requested."""


def predict(attempt: Attempt, pending: Pending, folder: Path, pace: Pace) -> Result:
    """
    Return one model's predictions, from the cache and earlier attempts where possible.

    They are written to `folder`: all of them at the end, and each batch as it is computed. Raises `Interrupted`;
    `StepFailed` if memory does not suffice; `CannotTrain` if a likelihood is not finite, the model cannot be prompted,
    or its folder is the user's and now holds another model (checked only if something is missing: it reads every file).
    """
    started = time.monotonic()
    requests = pending.requests
    digest, setup = requests.key.digest, requests.key.setup
    decoding = Decoding(setup.max_new_tokens, setup.repetition_penalty, setup.batch_size, requests.window)
    log = BatchLog(folder / f"{digest}{_LOG}", attempt.earlier(f"{folder.name}/{digest}{_LOG}"))
    pace.begin(pending)
    inference = _Inference(attempt, pending, log, pace)
    try:
        if not pending.is_done():
            # The predictions are cached under the model's id.
            requests.check_folder()
        inference.fill_likelihoods()
        inference.fill_answers(decoding)
        repeated = inference.repeat(decoding) if pending.again else None
        inference.fill_suites(decoding)
    finally:
        inference.close()
    if inference.resumed:
        words = f"{inference.resumed} of its {len(pending.without_answer)} answers come from an interrupted attempt"
        sys.stderr.write(f"{requests.role}: {words}\n")
    ordered = pending.predictions()
    lines = [*ordered, *(score for scores in pending.suites.values() for score in scores.values())]
    durable.write_bytes(folder / f"{digest}.jsonl", b"".join(line.model_dump_json().encode() + b"\n" for line in lines))
    seconds = time.monotonic() - started
    return Result(ordered, len(pending.without_answer), inference.resumed, seconds, pending.suites, repeated)


class _Inference:
    """Computes missing predictions batch by batch; the model is loaded when the first batch needs it."""

    def __init__(self, attempt: Attempt, pending: Pending, log: BatchLog, pace: Pace) -> None:
        self._attempt, self._pending, self._log, self._pace = attempt, pending, log, pace
        self._requests = pending.requests
        self._opened: InStep | Vllm | None = None
        self.resumed = 0
        """Answers read from the log of an earlier attempt."""

    def fill_likelihoods(self) -> None:
        """Compute the missing likelihoods, before the slower answers: they reveal a broken model."""
        pending, requests = self._pending, self._requests
        pairs = [(requests.prompts[index], requests.completions[index]) for index in pending.without_nll]
        if not pairs:
            return
        batch_size, vocabulary = requests.key.setup.batch_size, generation.vocabulary(requests.folder)
        for batch in generation.likelihood_batches(pairs, batch_size, vocabulary):
            batch_pairs = [pairs[index] for index in batch]
            records = [pending.without_nll[index] for index in batch]
            values, _ = self._batch("likelihood", batch_pairs, partial(self._likelihoods, batch_pairs, records))
            for record, (nll, tokens) in zip(records, values, strict=True):
                pending.nll[record] = (nll, tokens)

    def fill_answers(self, decoding: Decoding) -> None:
        """Generate the missing answers."""
        for batch in self._pending.answer_batches(decoding.batch_size):
            values, known = self._answers("answer", batch, decoding)
            self.resumed += len(batch) if known else 0
            for record, (text, tokens, ended, seconds) in zip(batch, values, strict=True):
                self._pending.answers[record] = (text, tokens, ended, seconds)

    def repeat(self, decoding: Decoding) -> dict[int, str]:
        """Generate some records' answers again, in the same batches; return the texts by the record's index."""
        chosen = set(self._pending.again)
        texts: dict[int, str] = {}
        for batch in self._pending.answer_batches(decoding.batch_size):
            if chosen.issuperset(batch):
                values, _ = self._answers("again", batch, decoding)
                texts.update(zip(batch, (text for text, *_ in values), strict=True))
        return texts

    def fill_suites(self, decoding: Decoding) -> None:
        """Score the suites' items that have no score yet."""
        for suite_requests in self._requests.suites:
            known = self._pending.suites[suite_requests.suite.digest]
            if suite_requests.suite.task:
                if not known:
                    self._run_task(suite_requests.suite, decoding)
                continue
            missing = [index for index, item in enumerate(suite_requests.suite.items) if item.id not in known]
            free = [index for index in missing if not suite_requests.suite.items[index].choices]
            with_choices = [index for index in missing if suite_requests.suite.items[index].choices]
            self._choose(suite_requests, with_choices, decoding.batch_size)
            self._answer_freely(suite_requests, free, decoding)

    def close(self) -> None:
        """Free the model's memory."""
        self._log.close()
        if self._opened is not None:
            self._opened.close()

    def _choose(self, suite_requests: SuiteRequests, items: Sequence[int], size: int) -> None:
        questions = [(suite_requests.prompts[index], suite_requests.answers[index]) for index in items]
        if not questions:
            return
        for batch in multiple_choice.choice_batches(questions, size, generation.vocabulary(self._requests.folder)):
            batch_questions = [questions[index] for index in batch]
            values, _ = self._batch("choice", batch_questions, partial(self._choices, batch_questions))
            for index, losses in zip(batch, values, strict=True):
                item = suite_requests.suite.items[items[index]]
                self._note(suite_requests.suite, item.id, item.category, item.score_choice(losses))

    def _choices(self, questions: Sequence[multiple_choice.Question]) -> list[list[float]]:
        means = self._engine().choices(questions)
        if not all(math.isfinite(loss) for losses in means for loss in losses):
            message = f"the {self._requests.role}'s likelihood of a general suite's answer is not a finite number"
            raise CannotTrain(message, "the model is broken: train again, with a lower train.learning_rate")
        return means

    def _answer_freely(self, suite_requests: SuiteRequests, indices: Sequence[int], decoding: Decoding) -> None:
        if not indices:
            return
        # The track's limit fits its own answers only.
        roomy = replace(decoding, max_new_tokens=max(map(suite_requests.new_tokens, indices)))
        prompts = [suite_requests.prompts[index] for index in indices]
        for batch in greedy_decoding.answer_batches(prompts, roomy.batch_size):
            batch_prompts = [prompts[index] for index in batch]
            items = [suite_requests.suite.items[indices[index]] for index in batch]
            may_loop = {row for row, item in enumerate(items) if any(map(is_looping, item.references))}
            compute = partial(self._generate, batch_prompts, roomy, may_loop)
            values, _ = self._batch("suite answer", batch_prompts, compute, generates=True)
            for item, (text, *_) in zip(items, values, strict=True):
                score = item.score_text(text) if item.words else token_f1(text, item.references)
                self._note(suite_requests.suite, item.id, item.category, score, text)

    def _run_task(self, suite: Suite, decoding: Decoding) -> None:
        """Score an lm-eval task as one batch."""
        name = batch_id("task", [suite.task])
        values = self._log.find(name, 1)
        if values is None:
            values = [lm_eval.run_task(self._loaded(), suite.task, decoding.batch_size)]
            self._log.add(name, values)
            self._pace.resume()
        for item, score in values[0].items():
            self._note(suite, item, suite.task, score)

    def _note(self, suite: Suite, item: str, category: str, score: float, text: str | None = None) -> None:
        noted = ItemScore(suite=suite.digest, item=item, category=category, score=score, text=text)
        self._pending.suites[suite.digest][item] = noted

    def _answers(self, kind: str, batch: Sequence[int], decoding: Decoding) -> tuple[Sequence[Any], bool]:
        prompts = [self._requests.prompts[record] for record in batch]
        may_loop = {row for row, record in enumerate(batch) if self._pending.may_loop(record)}
        return self._batch(kind, prompts, partial(self._generate, prompts, decoding, may_loop), generates=True)

    def _batch(
        self, kind: str, inputs: Sequence[Any], compute: Callable[[], Sequence[Any]], *, generates: bool = False
    ) -> tuple[Sequence[Any], bool]:
        """
        Return a batch's values, one per input, and whether an earlier attempt had computed them.

        With `generates`, `compute` reports its own progress.
        """
        name = batch_id(kind, inputs)
        known = self._log.find(name, len(inputs))
        if known is not None:
            self._pace.skip(len(inputs))
            return known, True
        values = compute()
        self._log.add(name, values)
        if not generates:
            self._pace.advance(len(inputs))
        return values, False

    def _generate(
        self, prompts: Sequence[generation.Tokens], decoding: Decoding, may_loop: Collection[int]
    ) -> list[Answered]:
        """Return each answer's text, tokens, whether it ended, and its share of the batch's seconds."""
        engine = self._engine()
        started = time.monotonic()
        reported = (0, 0)

        def watch(answers: int, tokens: int) -> None:
            nonlocal reported
            self._pace.advance(answers - reported[0], tokens - reported[1])
            reported = (answers, tokens)

        answers = engine.answers(prompts, decoding, watch, may_loop)
        watch(len(answers), sum(answer.tokens for answer in answers))
        share = (time.monotonic() - started) / len(answers)
        return [(*answer, share) for answer in answers]

    def _likelihoods(self, pairs: Sequence[Any], records: Sequence[int]) -> list[generation.Likelihood]:
        likelihoods = self._engine().likelihoods(pairs)
        for record, likelihood in zip(records, likelihoods, strict=True):
            if not math.isfinite(likelihood.nll):
                name = self._pending.ids[record][:12]
                message = f"the {self._requests.role}'s likelihood of record {name} is not a finite number"
                raise CannotTrain(message, "the model is broken: train again, with a lower train.learning_rate")
        return likelihoods

    def _engine(self) -> InStep | Vllm:
        if self._opened is None:
            if self._requests.key.setup.engine == PLAIN:
                model = generation.open_model(self._requests.folder, self._requests.tokenizer, chosen_device())
                self._opened = InStep(model)
            else:
                self._opened = self._start_vllm()
            self._pace.resume()
        return self._opened

    def _loaded(self) -> generation.AskedModel:
        """Return the loaded model: lm-eval runs only on transformers."""
        engine = self._engine()
        if not isinstance(engine, InStep):
            raise CannotTrain("a task of lm-eval runs only on transformers", 'set evaluate.vllm = ""')
        return engine.model

    def _start_vllm(self) -> Vllm:
        requests, attempt = self._requests, self._attempt
        arguments = {
            "model": str(requests.folder),
            "max_model_len": requests.longest(),
            "max_num_seqs": requests.key.setup.batch_size,
            # The model's own sampling settings must not affect a greedy evaluation.
            "generation_config": "vllm",
            # Compiling the model at every start costs more than it saves on some hundred short answers.
            "enforce_eager": True,
        }
        log = attempt.folder / f"vllm-{requests.role.replace(' ', '-')}.log"
        process = Process(attempt.config.evaluate.vllm, arguments, log, attempt.check_stop)
        return Vllm(process, requests.tokenizer, generation.end_tokens(requests.folder, requests.tokenizer))
