"""
Compute one model's predictions: cached ones are reused, missing ones computed in batches, the model loaded once.

A resumed evaluation gives the same predictions as an uninterrupted one: its batches are the same. An engine computes
answers and likelihoods: transformers in the step's process, or vLLM in a separate one.
"""

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, StepFailed
from pipeline.evaluate.plan import ModelRequests
from pipeline.evaluate.prediction_cache import PLAIN, Request, append_values, read_values
from pipeline.evaluate.vllm import Process
from pipeline.models import generation, greedy_decoding
from pipeline.models.generation import Answer, AskedModel, Decoding, Likelihood, Question
from pipeline.models.greedy_decoding import Watch, answer_batches
from pipeline.models.loading import chosen_device, free_memory
from pipeline.models.manifest import require_start
from pipeline.models.memory_estimate import MARGIN
from pipeline.models.placement import key_value_bytes, weight_bytes
from pipeline.models.prefill import Tokens
from pipeline.models.template import Template
from pipeline.words import count

#: What vLLM reports for a probability of 0.
_NOTHING = -9999.0
#: vLLM reserves keys and values in blocks of 16 tokens, on a CPU of 128.
_BLOCK_TOKENS = 128


class InStep(AskedModel):
    """The transformers engine: a model loaded in the step's process."""

    answers = greedy_decoding.answers
    likelihoods = generation.likelihoods
    choices = generation.choice_likelihoods
    close = generation.close_model


def cache_bytes(folder: Path, longest: int, sequences: int) -> int:
    """
    Return the bytes of the keys and values of `sequences` sequences of `longest` tokens, for vLLM to reserve.

    `longest` is rounded up to blocks of 128 tokens. At least one sequence's, and otherwise at most what the model's
    weights leave of 90 % of the free memory.
    """
    each = key_value_bytes(folder, -(-longest // _BLOCK_TOKENS) * _BLOCK_TOKENS)
    left = int(MARGIN * free_memory(chosen_device())) - weight_bytes(folder, "none")
    return max(each, min(sequences * each, left))


@dataclass(frozen=True)
class Vllm:
    """
    The engine of a model that vLLM has loaded; looping answers are not cut, as they cost vLLM little.

    Its methods raise `StepFailed` if vLLM exits or takes too long, and `Interrupted` if the attempt is stopped.
    """

    process: Process
    template: Template

    def answers(
        self, prompts: Sequence[Tokens], decoding: Decoding, watch: Watch, may_loop: Collection[int]
    ) -> list[Answer]:
        """
        Return greedy answers in the order of `prompts`; `watch` and `may_loop` are ignored.

        Also raises `StepFailed` if an answer has neither an end token nor its full length.
        """
        del watch, may_loop
        sampling = {"repetition_penalty": decoding.repetition_penalty, "stop_token_ids": self.template.ends}
        rooms = [decoding.room(prompt) for prompt in prompts]
        replies = self.process.ask(
            [(prompt, {**sampling, "max_tokens": room}) for prompt, room in zip(prompts, rooms, strict=True)]
        )
        return [self._answer(tokens, room) for (tokens, _), room in zip(replies, rooms, strict=True)]

    def likelihoods(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Likelihood]:
        """Return the likelihood of each completion after its prompt; the NLL is infinite at a probability of 0."""
        replies = self.process.ask(
            [([*prompt, *completion], {"max_tokens": 1, "prompt_logprobs": 0}) for prompt, completion in pairs]
        )
        likelihoods = []
        for (prompt, completion), (_, given) in zip(pairs, replies, strict=True):
            logprobs = [value if value > _NOTHING else -math.inf for value in given[len(prompt) :]]
            likelihoods.append(Likelihood(-sum(logprobs), len(completion)))
        return likelihoods

    def choices(self, questions: Sequence[Question]) -> list[list[float]]:
        """Return each choice's mean NLL in nats per token, by question."""
        flat = iter(self.likelihoods([(prompt, choice) for prompt, choices in questions for choice in choices]))
        return [[(likelihood := next(flat)).nll / likelihood.tokens for _ in choices] for _, choices in questions]

    def close(self) -> None:
        """Kill vLLM's process with its group and wait for its end; it may have exited already."""
        self.process.close()

    def _answer(self, tokens: Sequence[int], room: int) -> Answer:
        ended = [index for index, token in enumerate(tokens) if token in self.template.ends]
        if ended != [len(tokens) - 1] and (ended or len(tokens) != room):
            message = f"vLLM gave an answer of {count(len(tokens), 'token')} that neither ended nor reached {room}"
            raise StepFailed(message, "retry the run; if it happens again, see its log")
        return Answer(self.template.read(tokens), len(tokens), ended=bool(ended))


def open_engine(attempt: Attempt, requests: ModelRequests) -> InStep | Vllm:
    """
    Load the model of `requests` and return its engine, which the caller closes.

    The output of vLLM is logged in the attempt's folder. Raises `CannotTrain` if the model cannot be loaded,
    `StepFailed` if memory does not suffice or vLLM fails, `Interrupted` if stopped.
    """
    if requests.key.engine == PLAIN:
        model = generation.open_model(
            requests.model.folder, requests.template, chosen_device(), requests.model.quantization
        )
        return InStep(model.model, model.template)
    longest, sequences = requests.longest(), requests.key.batch_size
    arguments = {
        "model": str(requests.model.folder),
        "max_model_len": longest,
        "max_num_seqs": sequences,
        # By default vLLM takes nine tenths of all memory, and ends if anything else is there. With the bytes of its
        # cache given, the share is only what must be free at the start.
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": cache_bytes(requests.model.folder, longest, sequences),
        # The model's own sampling settings must not affect a greedy evaluation.
        "generation_config": "vllm",
        # Compiling the model at every start costs more than it saves on some hundred short answers.
        "enforce_eager": True,
    }
    log = attempt.folder / f"vllm-{requests.model.role.replace(' ', '-')}.log"
    return Vllm(Process(attempt.config.evaluate.vllm, arguments, log, attempt.check_stop), requests.template)


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
        """Add the values of each missing batch: from `earlier` if complete there, else computed and put in `store`."""
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
        """Yield the keys of the missing requests in batches, each of one part and kind, and of answers of one limit."""
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
        """Return the values of a batch of one kind, in order. Raises `CannotTrain` if a likelihood is not finite."""
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
        """Report progress, with the current batch's `answers` and `tokens` so far. Raises `Interrupted` if stopped."""
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
