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
from pipeline.evaluate.batch_log import BatchLog, batch_id
from pipeline.evaluate.engines import InStep, Vllm
from pipeline.evaluate.plan import ModelRequests, SuiteRequests
from pipeline.evaluate.prediction_cache import PLAIN, ItemScore, Prediction, PredictionCache, hash_tokens
from pipeline.evaluate.suites import Suite
from pipeline.evaluate.vllm import Process
from pipeline.metrics.degenerate import is_looping
from pipeline.metrics.registry import token_f1
from pipeline.models import generation, greedy_decoding
from pipeline.models.generation import Decoding
from pipeline.models.loading import chosen_device
from pipeline.records.heldout import HeldoutRecord

_LOG = ".batches.jsonl"
_ANSWER = "answer"

#: Text, tokens, whether it ended, and its share of the batch's seconds.
Answered = tuple[str, int, bool, float]


@dataclass(frozen=True)
class Result:
    """One model's predictions, in the order of the records."""

    predictions: list[Prediction]
    generated: int
    resumed: int
    """Answers read from the log of an earlier attempt."""
    seconds: float
    suites: dict[str, dict[str, ItemScore]]
    """Scores of each suite's items, by the suite's sha256."""


class Inference:
    """One model's predictions by the record's index: the cached ones, and the missing ones, which `run` computes."""

    def __init__(
        self, attempt: Attempt, requests: ModelRequests, records: Sequence[HeldoutRecord], cache: PredictionCache
    ) -> None:
        """Look up `records` and the suites of `requests` in `cache`."""
        self._attempt, self._requests, self._records = attempt, requests, records
        self._prompts = [hash_tokens(tokens) for tokens in requests.prompts]
        self._references = [hash_tokens(tokens) for tokens in requests.completions]
        self._nll: dict[int, tuple[float, int]] = {}
        self._answers: dict[int, Answered] = {}
        for index, (prompt, reference) in enumerate(zip(self._prompts, self._references, strict=True)):
            if (likelihood := cache.likelihood(prompt, reference)) is not None:
                self._nll[index] = likelihood
            if (found := cache.answer(prompt)) is not None:
                self._answers[index] = (found.text, found.tokens, found.ended, found.seconds)
        self._without_nll = [index for index in range(len(self._prompts)) if index not in self._nll]
        self.without_answer = [index for index in range(len(self._prompts)) if index not in self._answers]
        self._suites = {part.suite.digest: cache.items(part.suite.digest) for part in requests.suites}
        missing = sum(len(self._missing_items(part)) for part in requests.suites)
        self.left = len(self._without_nll) + len(self.without_answer) + missing
        """Number of requests that are neither cached nor computed."""
        self._total = self._resumed = 0
        setup = requests.key.setup
        self._decoding = Decoding(setup.max_new_tokens, setup.repetition_penalty, setup.batch_size, requests.window)
        self._opened: InStep | Vllm | None = None

    def run(self, folder: Path, models: Sequence["Inference"]) -> Result:
        """
        Return all predictions, computing the missing ones.

        They are written to `folder`: all of them at the end, and each batch as it is computed, for the next attempt to
        read. The ETA is that of all `models`. Raises `Interrupted` if stopped; `StepFailed` if memory does not suffice;
        `CannotTrain` if a likelihood is not finite, the model cannot be prompted, or its folder is the user's and now
        holds another model (checked only if a prediction is missing, as it reads every file).
        """
        started = time.monotonic()
        requests, self._models, self._total = self._requests, models, self.left
        digest = requests.key.digest
        self._log = BatchLog(folder / f"{digest}{_LOG}", self._attempt.earlier(f"{folder.name}/{digest}{_LOG}"))
        self._report()
        try:
            if self.left:
                # The predictions are cached under the model's id.
                requests.check_folder()
            self._fill_likelihoods()
            self._fill_answers()
            self._fill_suites()
        finally:
            if self._opened is not None:
                self._opened.close()
        if self._resumed:
            words = f"{self._resumed} of its {len(self.without_answer)} answers come from an interrupted attempt"
            sys.stderr.write(f"{requests.role}: {words}\n")
        predictions = [self._prediction(index) for index in range(len(self._prompts))]
        lines = [*predictions, *(score for scores in self._suites.values() for score in scores.values())]
        data = b"".join(line.model_dump_json().encode() + b"\n" for line in lines)
        durable.write_bytes(folder / f"{digest}.jsonl", data)
        seconds = time.monotonic() - started
        return Result(predictions, len(self.without_answer), self._resumed, seconds, self._suites)

    def _prediction(self, index: int) -> Prediction:
        (text, tokens, ended, seconds), (nll_sum, nll_tokens) = self._answers[index], self._nll[index]
        return Prediction(
            id=self._records[index].id,
            prompt_hash=self._prompts[index],
            text=text,
            tokens=tokens,
            ended=ended,
            seconds=seconds,
            nll_sum=nll_sum,
            nll_tokens=nll_tokens,
            reference_hash=self._references[index],
        )

    def _fill_likelihoods(self) -> None:
        """Compute the missing likelihoods, before the slower answers: they reveal a broken model."""
        requests = self._requests
        pairs = [(requests.prompts[index], requests.completions[index]) for index in self._without_nll]
        if not pairs:
            return
        vocabulary = generation.vocabulary(requests.folder)
        for batch in generation.likelihood_batches(pairs, self._decoding.batch_size, vocabulary):
            batch_pairs = [pairs[index] for index in batch]
            records = [self._without_nll[index] for index in batch]
            values = self._batch("likelihood", batch_pairs, partial(self._likelihoods, batch_pairs, records))
            self._nll.update((record, (nll, tokens)) for record, (nll, tokens) in zip(records, values, strict=True))

    def _likelihoods(self, pairs: Sequence[Any], records: Sequence[int]) -> list[generation.Likelihood]:
        likelihoods = self._engine().likelihoods(pairs)
        for record, likelihood in zip(records, likelihoods, strict=True):
            if not math.isfinite(likelihood.nll):
                name = f"record {self._records[record].id[:12]}"
                raise CannotTrain(
                    f"the {self._requests.role}'s likelihood of {name} is not a finite number",
                    "the model is broken: train again, with a lower train.learning_rate",
                )
        return likelihoods

    def _fill_answers(self) -> None:
        prompts = [self._requests.prompts[index] for index in self.without_answer]
        for batch in greedy_decoding.answer_batches(prompts, self._decoding.batch_size):
            batch_prompts = [prompts[index] for index in batch]
            indices = [self.without_answer[index] for index in batch]
            references = [self._records[index].references for index in indices]
            may_loop = {row for row, texts in enumerate(references) if any(map(is_looping, texts))}
            generate = partial(self._generate, batch_prompts, self._decoding, may_loop)
            for index, (text, tokens, ended, seconds) in zip(
                indices, self._batch(_ANSWER, batch_prompts, generate), strict=True
            ):
                self._answers[index] = (text, tokens, ended, seconds)

    def _missing_items(self, part: SuiteRequests) -> list[int]:
        """Return the indices of a suite's items without a score."""
        known = self._suites[part.suite.digest]
        return [index for index, item in enumerate(part.suite.items) if item.id not in known]

    def _fill_suites(self) -> None:
        """Score the suites' items that have no score yet."""
        for part in self._requests.suites:
            suite, missing = part.suite, self._missing_items(part)
            self._choose(part, [index for index in missing if suite.items[index].choices])
            self._answer_freely(part, [index for index in missing if not suite.items[index].choices])

    def _choose(self, part: SuiteRequests, items: Sequence[int]) -> None:
        questions = [(part.prompts[index], part.answers[index]) for index in items]
        if not questions:
            return
        vocabulary = generation.vocabulary(self._requests.folder)
        for batch in generation.choice_batches(questions, self._decoding.batch_size, vocabulary):
            batch_questions = [questions[index] for index in batch]
            values = self._batch("choice", batch_questions, partial(self._choices, batch_questions))
            for index, losses in zip(batch, values, strict=True):
                item = part.suite.items[items[index]]
                self._note(part.suite, item.id, item.category, item.score_choice(losses))

    def _choices(self, questions: Sequence[generation.Question]) -> list[list[float]]:
        means = self._engine().choices(questions)
        if not all(math.isfinite(loss) for losses in means for loss in losses):
            raise CannotTrain(
                f"the {self._requests.role}'s likelihood of a general suite's answer is not a finite number",
                "the model is broken: train again, with a lower train.learning_rate",
            )
        return means

    def _answer_freely(self, part: SuiteRequests, indices: Sequence[int]) -> None:
        if not indices:
            return
        # The track's limit fits its own answers only.
        roomy = replace(self._decoding, max_new_tokens=max(map(part.new_tokens, indices)))
        prompts = [part.prompts[index] for index in indices]
        for batch in greedy_decoding.answer_batches(prompts, roomy.batch_size):
            batch_prompts = [prompts[index] for index in batch]
            items = [part.suite.items[indices[index]] for index in batch]
            may_loop = {row for row, item in enumerate(items) if any(map(is_looping, item.references))}
            values = self._batch("suite answer", batch_prompts, partial(self._generate, batch_prompts, roomy, may_loop))
            for item, (text, *_) in zip(items, values, strict=True):
                score = item.score_text(text) if item.words else token_f1(text, item.references)
                self._note(part.suite, item.id, item.category, score, text)

    def _note(self, suite: Suite, item: str, category: str, score: float, text: str | None = None) -> None:
        noted = ItemScore(suite=suite.digest, item=item, category=category, score=score, text=text)
        self._suites[suite.digest][item] = noted

    def _batch(self, kind: str, inputs: Sequence[Any], compute: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """Return a batch's values, one per input: from an earlier attempt's log, or computed and logged."""
        name = batch_id(kind, inputs)
        values = self._log.find(name)
        if values is None:
            values = list(compute())
            self._log.add(name, values)
        elif kind == _ANSWER:
            self._resumed += len(inputs)
        self.left -= len(inputs)
        self._report()
        return values

    def _generate(
        self, prompts: Sequence[generation.Tokens], decoding: Decoding, may_loop: Collection[int]
    ) -> list[Answered]:
        """Generate answers; return each one's text, tokens, whether it ended, and its share of the batch's time."""
        engine = self._engine()
        started = time.monotonic()

        def watch(answers: int, tokens: int) -> None:
            self._report(answers, tokens, time.monotonic() - started)

        answers = engine.answers(prompts, decoding, watch, may_loop)
        share = (time.monotonic() - started) / len(answers)
        return [(*answer, share) for answer in answers]

    def _report(self, answers: int = 0, tokens: int = 0, seconds: float = 0.0) -> None:
        """Report progress, with `answers` and `tokens` of the current batch after `seconds`. Raises `Interrupted`."""
        self._attempt.check_stop()
        left = sum(model.left for model in self._models) - answers
        self._attempt.progress(
            self._total - self.left + answers,
            self._total,
            phase=self._requests.role,
            tokens_per_second=tokens / seconds if tokens else None,
            # At the speed of the current batch; likelihoods take less time than answers.
            eta_seconds=seconds / answers * left if answers else None,
        )

    def _engine(self) -> InStep | Vllm:
        if self._opened is None:
            requests = self._requests
            if requests.key.setup.engine == PLAIN:
                model = generation.open_model(requests.folder, requests.tokenizer, chosen_device())
                self._opened = InStep(model)
            else:
                self._opened = self._start_vllm()
        return self._opened

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
