"""
Compute one model's predictions: cached ones are reused, missing ones computed in batches, the model loaded once.

A resumed evaluation gives the same predictions as an uninterrupted one: its batches are the same.
"""

import math
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.evaluate.engines import InStep, Vllm, cache_bytes
from pipeline.evaluate.plan import ModelRequests, SuiteRequests
from pipeline.evaluate.prediction_cache import PLAIN, append_values, read_values, request_hash
from pipeline.evaluate.vllm import Process
from pipeline.metrics.degenerate import is_looping
from pipeline.metrics.registry import token_f1
from pipeline.models import generation, greedy_decoding
from pipeline.models.generation import Answer, Decoding, Likelihood
from pipeline.models.loading import chosen_device
from pipeline.models.prefill import Tokens
from pipeline.records.heldout import HeldoutRecord


class Prediction(NamedTuple):
    """One answer, and the likelihood of one reference."""

    answer: Answer
    likelihood: Likelihood


class ItemScore(NamedTuple):
    """A model's score on one item of a general suite."""

    score: float
    """0 to 1."""
    text: str = ""
    """The answer to a free question."""


@dataclass(frozen=True)
class Result:
    """One model's predictions, in the order of the records."""

    predictions: list[Prediction]
    generated: int
    """Answers that were not in the cache."""
    seconds: float
    suites: list[dict[str, ItemScore]]
    """Scores of each suite's items, by the item's id."""


class _Requests:
    """Requests of one kind, their keys, and the indices of those that are not cached."""

    def __init__(self, kind: str, inputs: Sequence[Any], cached: Container[str], limit: int = 0) -> None:
        self.kind, self.inputs, self.limit = kind, inputs, limit
        self.keys = [request_hash(f"{kind}{limit or ''}", request) for request in inputs]
        self.missing = [index for index, key in enumerate(self.keys) if key not in cached]


class Inference:
    """One model's predictions: the cached ones, and the missing ones, which `run` computes."""

    def __init__(
        self, attempt: Attempt, requests: ModelRequests, records: Sequence[HeldoutRecord], cached: Path
    ) -> None:
        """Look up `requests`, for `records` and the suites, in the folder `cached`, which need not exist."""
        self._attempt, self._requests = attempt, requests
        self._values = read_values(sorted(cached.glob("*.jsonl")))
        pairs = list(zip(requests.prompts, requests.completions, strict=True))
        self._pairs = _Requests("likelihood", pairs, self._values)
        self._prompts = _Requests("answer", requests.prompts, self._values)
        self._references = [record.references for record in records]
        self._suites = [self._suite_requests(part) for part in requests.suites]
        every = [self._pairs, self._prompts, *chain(*self._suites)]
        self.left = self._total = sum(len(asked.missing) for asked in every)
        """Number of requests that are neither cached nor computed."""
        setup = requests.key.setup
        self._decoding = Decoding(setup.max_new_tokens, setup.repetition_penalty, setup.batch_size, requests.window)
        self._opened: InStep | Vllm | None = None

    def _suite_requests(self, part: SuiteRequests) -> tuple[_Requests, _Requests]:
        """Return the requests of a suite's items with choices, and of its free questions."""
        items = list(zip(part.suite.items, part.prompts, part.answers, strict=True))
        choices = [(prompt, answers) for item, prompt, answers in items if item.choices]
        free = [prompt for item, prompt, _ in items if not item.choices]
        # The track's limit fits its own answers only.
        longest = (part.new_tokens(index) for index, item in enumerate(part.suite.items) if not item.choices)
        limit = max(longest, default=0)
        return _Requests("choice", choices, self._values), _Requests("answer", free, self._values, limit)

    def run(self, folder: Path, models: Sequence["Inference"]) -> Result:
        """
        Return all predictions: the cached ones, those of earlier attempts, and the rest, computed now.

        The model is loaded only if a prediction is computed, and freed at the end. Values that are not cached are
        written to `<key>.jsonl` in `folder`, in this attempt's folder: those of earlier attempts at once, each batch as
        it is computed. The reported ETA is that of all `models`. Raises `Interrupted` if stopped; `StepFailed` if
        memory does not suffice or vLLM fails; `CannotTrain` if a likelihood is not finite, the model cannot be loaded
        or has no key-value cache, or its folder is the user's and now holds another model (checked only if a prediction
        is not cached, as it reads every file).
        """
        started = time.monotonic()
        requests, self._models = self._requests, models
        self._store = folder / f"{requests.key.digest}.jsonl"
        self._earlier = read_values(self._attempt.earlier(f"{folder.name}/{self._store.name}"))
        if self._earlier:
            append_values(self._store, self._earlier)
        self._report()
        try:
            if self.left:
                # The predictions are cached under the model's id.
                requests.check_folder()
            # Likelihoods before the slower answers: they reveal a broken model.
            likelihoods = self._score(self._pairs, generation.likelihood_batches)
            answers = self._answer(self._prompts, self._references, self._decoding)
            suites = [
                self._score_suite(part, *asked) for part, asked in zip(requests.suites, self._suites, strict=True)
            ]
        finally:
            if self._opened is not None:
                self._opened.close()
        return Result(
            [Prediction(Answer(*said), Likelihood(*nll)) for said, nll in zip(answers, likelihoods, strict=True)],
            len(self._prompts.missing),
            time.monotonic() - started,
            suites,
        )

    def _score_suite(self, part: SuiteRequests, choices: _Requests, free: _Requests) -> dict[str, ItemScore]:
        """Return the scores of a suite's items, by their ids."""
        references = [item.answers for item in part.suite.items if not item.choices]
        losses = iter(self._score(choices, generation.choice_batches))
        answers = iter(self._answer(free, references, replace(self._decoding, max_new_tokens=free.limit)))
        scores = {}
        for item in part.suite.items:
            if item.choices:
                scores[item.id] = ItemScore(item.score_choice(next(losses)))
            else:
                text = next(answers)[0]
                score = item.score_text(text) if item.words else token_f1(text, item.answers)
                scores[item.id] = ItemScore(score, text)
        return scores

    def _score(self, asked: _Requests, batches: Callable[[Sequence[Any], int, int], list[list[int]]]) -> list[Any]:
        """Return the likelihoods of each request. Raises `CannotTrain` if one is not finite."""

        def compute(indices: Sequence[int]) -> Sequence[Any]:
            engine = self._engine()
            chosen = [asked.inputs[index] for index in indices]
            values: Sequence[Any] = (engine.likelihoods if asked is self._pairs else engine.choices)(chosen)
            if not all(math.isfinite(number) for value in values for number in value):
                raise CannotTrain(
                    f"a {asked.kind} of the {self._requests.role} is not a finite number",
                    "the model is broken: train again, with a lower train.learning_rate",
                )
            return values

        inputs = [asked.inputs[index] for index in asked.missing]
        vocabulary = generation.vocabulary(self._requests.folder) if inputs else 0
        return self._compute(asked, batches(inputs, self._decoding.batch_size, vocabulary), compute)

    def _answer(self, asked: _Requests, references: Sequence[Sequence[str]], decoding: Decoding) -> list[Any]:
        """Return the fields of each request's answer, which may loop if one of its references does."""

        def compute(indices: Sequence[int]) -> Sequence[Any]:
            may_loop = {row for row, index in enumerate(indices) if any(map(is_looping, references[index]))}
            engine, started = self._engine(), time.monotonic()

            def watch(complete: int, tokens: Sequence[Tokens]) -> None:
                self._report(complete, sum(map(len, tokens)), time.monotonic() - started)

            return engine.answers([asked.inputs[index] for index in indices], decoding, watch, may_loop)

        inputs = [asked.inputs[index] for index in asked.missing]
        return self._compute(asked, greedy_decoding.answer_batches(inputs, decoding.batch_size), compute)

    def _compute(
        self,
        asked: _Requests,
        batches: Sequence[Sequence[int]],
        compute: Callable[[Sequence[int]], Sequence[Any]],
    ) -> list[Any]:
        """Return the values of all requests; `batches` of the missing ones are an earlier attempt's or computed."""
        for batch in batches:
            indices = [asked.missing[row] for row in batch]
            keys = [asked.keys[index] for index in indices]
            values = {key: self._earlier[key] for key in keys if key in self._earlier}
            if len(values) < len(set(keys)):
                values = dict(zip(keys, compute(indices), strict=True))
                append_values(self._store, values)
            self._values |= values
            self.left -= len(batch)
            self._report()
        return [self._values[key] for key in asked.keys]

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
                self._opened = InStep(model.model, model.template)
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
