"""
Compute one model's predictions: cached ones are reused, missing ones computed in batches, the model loaded once.

A resumed evaluation gives the same predictions as an uninterrupted one: its batches are the same.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipeline import durable
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.evaluate.batch_log import BatchLog, batch_id
from pipeline.evaluate.engines import InStep, Vllm, cache_bytes
from pipeline.evaluate.plan import ModelRequests, SuiteRequests
from pipeline.evaluate.prediction_cache import PLAIN, ItemScore, Prediction, PredictionCache, hash_tokens
from pipeline.evaluate.vllm import Process
from pipeline.metrics.degenerate import is_looping
from pipeline.metrics.registry import token_f1
from pipeline.models import generation, greedy_decoding
from pipeline.models.generation import Answer, Decoding
from pipeline.models.loading import chosen_device
from pipeline.models.prefill import Tokens
from pipeline.records.heldout import HeldoutRecord

_LOG = ".batches.jsonl"


@dataclass(frozen=True)
class Result:
    """One model's predictions, in the order of the records."""

    predictions: list[Prediction]
    generated: int
    """Answers that were not in the cache."""
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
        self._answers: dict[int, Answer] = {}
        for index, (prompt, reference) in enumerate(zip(self._prompts, self._references, strict=True)):
            if (likelihood := cache.likelihood(prompt, reference)) is not None:
                self._nll[index] = likelihood
            if (found := cache.answer(prompt)) is not None:
                self._answers[index] = Answer(found.text, found.tokens, found.ended)
        self._without_nll = [index for index in range(len(self._prompts)) if index not in self._nll]
        self._without_answer = [index for index in range(len(self._prompts)) if index not in self._answers]
        self._suites = {part.suite.digest: cache.items(part.suite.digest) for part in requests.suites}
        missing = sum(len(self._missing_items(part)) for part in requests.suites)
        self.left = len(self._without_nll) + len(self._without_answer) + missing
        """Number of requests that are neither cached nor computed."""
        self._total = self.left
        setup = requests.key.setup
        self._decoding = Decoding(setup.max_new_tokens, setup.repetition_penalty, setup.batch_size, requests.window)
        self._opened: InStep | Vllm | None = None

    def run(self, folder: Path, models: Sequence["Inference"]) -> Result:
        """
        Return all predictions: the cached ones, those that earlier attempts logged, and the rest, computed now.

        The model is loaded only if a prediction is computed, and freed at the end. Predictions are written to `folder`,
        in this attempt's folder: each batch to a log as it is computed, which the next attempt reads, and all of them
        at the end. The reported ETA is that of all `models`. Raises `Interrupted` if stopped; `StepFailed` if memory
        does not suffice or vLLM fails; `CannotTrain` if a likelihood is not finite, the model cannot be loaded or has
        no key-value cache, or its folder is the user's and now holds another model (checked only if a prediction is not
        cached, as it reads every file).
        """
        started = time.monotonic()
        requests, self._models = self._requests, models
        digest = requests.key.digest
        self._log = BatchLog(folder / f"{digest}{_LOG}", self._attempt.earlier(f"{folder.name}/{digest}{_LOG}"))
        self._report()
        try:
            if self.left:
                # The predictions are cached under the model's id.
                requests.check_folder()
            self._fill_likelihoods()
            self._fill_answers()
            for part in requests.suites:
                self._fill_choices(part)
                self._fill_free_answers(part)
        finally:
            if self._opened is not None:
                self._opened.close()
        predictions = [self._prediction(index) for index in range(len(self._prompts))]
        lines = [*predictions, *(score for scores in self._suites.values() for score in scores.values())]
        data = b"".join(line.model_dump_json().encode() + b"\n" for line in lines)
        durable.write_bytes(folder / f"{digest}.jsonl", data)
        return Result(predictions, len(self._without_answer), time.monotonic() - started, self._suites)

    def _prediction(self, index: int) -> Prediction:
        nll_sum, nll_tokens = self._nll[index]
        return Prediction(
            id=self._records[index].id,
            prompt_hash=self._prompts[index],
            **self._answers[index]._asdict(),
            nll_sum=nll_sum,
            nll_tokens=nll_tokens,
            reference_hash=self._references[index],
        )

    def _fill_likelihoods(self) -> None:
        """Compute the missing likelihoods, before the slower answers: they reveal a broken model."""
        missing, requests = self._without_nll, self._requests
        pairs = [(requests.prompts[index], requests.completions[index]) for index in missing]
        for index, (nll, tokens) in self._score("likelihood", pairs, generation.likelihood_batches):
            self._nll[missing[index]] = (nll, tokens)

    def _fill_answers(self) -> None:
        missing = self._without_answer
        prompts = [self._requests.prompts[index] for index in missing]
        references = [self._records[index].references for index in missing]
        for index, answer in self._answer("answer", prompts, references, self._decoding):
            self._answers[missing[index]] = answer

    def _missing_items(self, part: SuiteRequests) -> list[int]:
        """Return the indices of a suite's items without a score."""
        known = self._suites[part.suite.digest]
        return [index for index, item in enumerate(part.suite.items) if item.id not in known]

    def _fill_choices(self, part: SuiteRequests) -> None:
        missing = [index for index in self._missing_items(part) if part.suite.items[index].choices]
        questions = [(part.prompts[index], part.answers[index]) for index in missing]
        for index, losses in self._score("choice", questions, generation.choice_batches):
            self._note(part, missing[index], part.suite.items[missing[index]].score_choice(losses))

    def _fill_free_answers(self, part: SuiteRequests) -> None:
        missing = [index for index in self._missing_items(part) if not part.suite.items[index].choices]
        # The track's limit fits its own answers only.
        roomy = replace(self._decoding, max_new_tokens=max(map(part.new_tokens, missing), default=0))
        items = [part.suite.items[index] for index in missing]
        prompts, references = [part.prompts[index] for index in missing], [item.answers for item in items]
        for index, (text, *_) in self._answer("suite answer", prompts, references, roomy):
            item = items[index]
            score = item.score_text(text) if item.words else token_f1(text, item.answers)
            self._note(part, missing[index], score, text)

    def _note(self, part: SuiteRequests, index: int, score: float, text: str | None = None) -> None:
        item, suite = part.suite.items[index].id, part.suite.digest
        self._suites[suite][item] = ItemScore(suite=suite, item=item, score=score, text=text)

    def _score(
        self,
        kind: Literal["likelihood", "choice"],
        inputs: Sequence[Any],
        batches: Callable[[Sequence[Any], int, int], list[list[int]]],
    ) -> Iterator[tuple[int, Any]]:
        """Yield the index of each input with its likelihoods. Raises `CannotTrain` if one is not finite."""

        def compute(chosen: Sequence[Any]) -> Sequence[Any]:
            engine = self._engine()
            values: Sequence[Any] = (engine.likelihoods if kind == "likelihood" else engine.choices)(chosen)
            if not all(math.isfinite(number) for value in values for number in value):
                raise CannotTrain(
                    f"a {kind} of the {self._requests.role} is not a finite number",
                    "the model is broken: train again, with a lower train.learning_rate",
                )
            return values

        if inputs:
            for batch in batches(inputs, self._decoding.batch_size, generation.vocabulary(self._requests.folder)):
                yield from self._batch(kind, inputs, batch, compute)

    def _answer(
        self, kind: str, prompts: Sequence[Tokens], references: Sequence[Sequence[str]], decoding: Decoding
    ) -> Iterator[tuple[int, Answer]]:
        """Yield the index of each prompt with its answer, which may loop if one of its references does."""
        for batch in greedy_decoding.answer_batches(prompts, decoding.batch_size):
            may_loop = {row for row, index in enumerate(batch) if any(map(is_looping, references[index]))}
            generate = partial(self._generate, decoding=decoding, may_loop=may_loop)
            yield from ((index, Answer(*value)) for index, value in self._batch(kind, prompts, batch, generate))

    def _batch(
        self,
        kind: str,
        inputs: Sequence[Any],
        batch: Sequence[int],
        compute: Callable[[Sequence[Any]], Sequence[Any]],
    ) -> Iterator[tuple[int, Any]]:
        """Return the indices `batch` with their values, from an earlier attempt's log or computed and logged."""
        chosen = [inputs[index] for index in batch]
        name = batch_id(kind, chosen)
        values = self._log.known.get(name)
        if values is None:
            values = list(compute(chosen))
            self._log.add(name, values)
        self.left -= len(batch)
        self._report()
        return zip(batch, values, strict=True)

    def _generate(self, prompts: Sequence[Tokens], decoding: Decoding, may_loop: Collection[int]) -> list[Answer]:
        engine = self._engine()
        started = time.monotonic()

        def watch(answers: int, tokens: int) -> None:
            self._report(answers, tokens, time.monotonic() - started)

        return engine.answers(prompts, decoding, watch, may_loop)

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
                model = generation.open_model(
                    requests.folder, requests.template, chosen_device(), requests.quantization
                )
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
            # By default vLLM takes nine tenths of all memory, and ends if anything else is there. With the bytes of its
            # cache given, the share is only what must be free at the start.
            "gpu_memory_utilization": 0.1,
            "kv_cache_memory_bytes": cache_bytes(requests.folder, requests.longest(), requests.key.setup.batch_size),
            # The model's own sampling settings must not affect a greedy evaluation.
            "generation_config": "vllm",
            # Compiling the model at every start costs more than it saves on some hundred short answers.
            "enforce_eager": True,
        }
        log = attempt.folder / f"vllm-{requests.role.replace(' ', '-')}.log"
        process = Process(attempt.config.evaluate.vllm, arguments, log, attempt.check_stop)
        return Vllm(process, requests.template)
