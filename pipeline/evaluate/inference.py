"""
Compute one model's predictions: cached ones are reused, missing ones computed in batches, the model loaded once.

A resumed evaluation gives the same predictions as an uninterrupted one: its batches are the same.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.evaluate.engines import InStep, Vllm, open_engine
from pipeline.evaluate.plan import ModelRequests
from pipeline.evaluate.prediction_cache import Request, append_values, read_values
from pipeline.models import generation
from pipeline.models.generation import Answer, Decoding, Likelihood
from pipeline.models.greedy_decoding import answer_batches
from pipeline.models.manifest import require_start
from pipeline.models.prefill import Tokens


@dataclass(frozen=True)
class Result:
    """One model's predictions, in the order of the records."""

    answers: list[Answer]
    likelihoods: list[Likelihood]
    """Of the references."""
    generated: int
    """Answers that were not in the cache."""
    seconds: float
    suites: list[list[Any]]
    """Of each suite the value of each item's request."""


class Inference:
    """One model's predictions: the cached ones, and the missing ones, which `run` computes."""

    def __init__(self, attempt: Attempt, requests: ModelRequests) -> None:
        """Look up `requests` in the cache."""
        self._attempt, self._requests = attempt, requests
        cached = attempt.root / attempt.spec.predictions / requests.key.digest
        self._values = read_values(sorted(cached.glob("*.jsonl")))
        self._missing: dict[str, Request] = {}
        #: The keys that share batches: of one part, so that each model answers a suite in the same batches.
        self._alike: dict[tuple[int, str, int], list[str]] = {}
        for number, part in enumerate(requests.parts()):
            for request in part:
                if (key := request.key) not in self._values and key not in self._missing:
                    self._missing[key] = request
                    self._alike.setdefault((number, request.kind, request.limit), []).append(key)
        self.left = len(self._missing)
        """Number of requests that are neither cached nor computed."""

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
        store = folder / f"{requests.key.digest}.jsonl"
        stored = read_values(self._attempt.earlier(f"{folder.name}/{store.name}"))
        # Another run may have brought some into the cache since: those are used.
        earlier = {key: value for key, value in stored.items() if key in self._missing}
        if earlier:
            append_values(store, earlier)
        self._report()
        if self.left:
            # The base's folder is the user's, without a manifest; predictions are cached under the model's id.
            if requests.key.model_id == self._attempt.config.base_model_id:
                require_start(self._attempt, None)
            self._compute_missing(earlier, store)
        return Result(
            [Answer(*self._values[answer.key]) for _, answer in requests.records],
            [Likelihood(*self._values[likelihood.key]) for likelihood, _ in requests.records],
            sum(answer.key in self._missing for _, answer in requests.records),
            time.monotonic() - started,
            [[self._values[request.key] for request in suite] for suite in requests.suites],
        )

    def _compute_missing(self, earlier: Mapping[str, Any], store: Path) -> None:
        """Add the missing values: a batch that `earlier` has all values of, else computed and appended to `store`."""
        with ExitStack() as opened:
            engine: InStep | Vllm | None = None
            for keys in self._batches():
                values = {key: earlier[key] for key in keys if key in earlier}
                if len(values) < len(keys):
                    engine = engine or opened.enter_context(closing(open_engine(self._attempt, self._requests)))
                    values = dict(zip(keys, self._compute(engine, [self._missing[key] for key in keys]), strict=True))
                    append_values(store, values)
                self._values |= values
                self.left -= len(keys)
                self._report()

    def _batches(self) -> Iterator[list[str]]:
        """Yield the keys of the missing requests, batch by batch: each has one kind, and answers of one limit."""
        size = self._requests.key.batch_size
        for (_, kind, _), keys in self._alike.items():
            pairs = [(self._missing[key].tokens, self._missing[key].target) for key in keys]
            if kind == "answer":
                batches = answer_batches([tokens for tokens, _ in pairs], size)
            else:
                form = generation.likelihood_batches if kind == "likelihood" else generation.choice_batches
                batches = form(pairs, size, generation.vocabulary(self._requests.model.folder))
            for batch in batches:
                yield [keys[index] for index in batch]

    def _compute(self, engine: InStep | Vllm, batch: Sequence[Request]) -> Sequence[Any]:
        """Return the values of a batch of one kind. Raises `CannotTrain` if a likelihood is not finite."""
        started, kind = time.monotonic(), batch[0].kind
        if kind == "answer":
            key = self._requests.key
            decoding = Decoding(batch[0].limit, key.repetition_penalty, key.batch_size, self._requests.window)

            def watch(complete: int, tokens: Sequence[Tokens]) -> None:
                self._report(complete, sum(map(len, tokens)), time.monotonic() - started)

            may_loop = {row for row, request in enumerate(batch) if request.may_loop}
            return engine.answers([request.tokens for request in batch], decoding, watch, may_loop)
        compute = engine.likelihoods if kind == "likelihood" else engine.choices
        values: Sequence[Any] = compute([(request.tokens, request.target) for request in batch])
        if not all(math.isfinite(number) for value in values for number in value):
            raise CannotTrain(
                f"a {kind} of the {self._requests.model.role} is not a finite number",
                "the model is broken: train again, with a lower train.learning_rate",
            )
        return values

    def _report(self, answers: int = 0, tokens: int = 0, seconds: float = 0.0) -> None:
        """Report progress, with `answers` and `tokens` of the current batch after `seconds`. Raises `Interrupted`."""
        self._attempt.check_stop()
        left = sum(model.left for model in self._models) - answers
        self._attempt.progress(
            len(self._missing) - self.left + answers,
            len(self._missing),
            phase=self._requests.model.role,
            tokens_per_second=tokens / seconds if tokens else None,
            # At the speed of the current batch; likelihoods take less time than answers.
            eta_seconds=seconds / answers * left if answers else None,
        )
