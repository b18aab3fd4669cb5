"""Engines compute answers and likelihoods: transformers in the step's process, or vLLM in a process of its own."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.contract import Attempt
from pipeline.errors import StepFailed
from pipeline.evaluate.plan import ModelRequests
from pipeline.evaluate.prediction_cache import PLAIN
from pipeline.evaluate.vllm import Process
from pipeline.models import generation, greedy_decoding
from pipeline.models.generation import Answer, AskedModel, Decoding, Likelihood, Question
from pipeline.models.greedy_decoding import Watch
from pipeline.models.loading import chosen_device, free_memory
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

    At least one sequence's, and otherwise at most what the model's weights leave of 90 % of the free memory.
    """
    each = key_value_bytes(folder, -(-longest // _BLOCK_TOKENS) * _BLOCK_TOKENS)
    left = int(MARGIN * free_memory(chosen_device())) - weight_bytes(folder, "none")
    return max(each, min(sequences * each, left))


@dataclass(frozen=True)
class Vllm:
    """The engine of a model that vLLM has loaded; looping answers are not cut, as they cost vLLM little."""

    process: Process
    template: Template

    def answers(
        self, prompts: Sequence[Tokens], decoding: Decoding, watch: Watch, may_loop: Collection[int]
    ) -> list[Answer]:
        """
        Return greedy answers in order; `watch` is not called, and loops are not cut, whatever `may_loop` holds.

        Raises `StepFailed` if vLLM exits or takes too long, or if an answer has neither an end token nor its full
        length.
        """
        del watch, may_loop
        sampling = {"repetition_penalty": decoding.repetition_penalty, "stop_token_ids": self.template.ends}
        rooms = [decoding.room(prompt) for prompt in prompts]
        replies = self.process.ask(
            [(prompt, {**sampling, "max_tokens": room}) for prompt, room in zip(prompts, rooms, strict=True)]
        )
        return [self._answer(tokens, room) for (tokens, _), room in zip(replies, rooms, strict=True)]

    def likelihoods(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Likelihood]:
        """Return each completion's likelihood after its prompt. Raises `StepFailed` if vLLM exits or takes too long."""
        replies = self.process.ask(
            [([*prompt, *completion], {"max_tokens": 1, "prompt_logprobs": 0}) for prompt, completion in pairs]
        )
        likelihoods = []
        for (prompt, completion), (_, given) in zip(pairs, replies, strict=True):
            logprobs = [value if value > _NOTHING else -math.inf for value in given[len(prompt) :]]
            likelihoods.append(Likelihood(-sum(logprobs), len(completion)))
        return likelihoods

    def choices(self, questions: Sequence[Question]) -> list[list[float]]:
        """Return each choice's mean NLL in nats per token, by question. Raises `StepFailed` as `likelihoods` does."""
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

    Raises `CannotTrain` if it cannot be loaded, `StepFailed` if memory does not suffice or vLLM fails, `Interrupted` if
    stopped.
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
