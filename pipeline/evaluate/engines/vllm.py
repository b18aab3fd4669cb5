"""The vLLM engine: concurrent requests, each of which must get one complete answer or the step fails."""

import math
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pipeline.errors import StepFailed
from pipeline.evaluate.engines.engine import Watch
from pipeline.evaluate.engines.vllm_server import Server
from pipeline.models.generation import Answer, Decoding, Likelihood, Tokens
from pipeline.models.multiple_choice import Question
from pipeline.words import count

_LOOK_SECONDS = 0.5
#: What vLLM reports for a probability of 0.
_NOTHING = -9999.0
T = TypeVar("T")


@dataclass(frozen=True)
class Vllm:
    """A model served by vLLM."""

    server: Server
    tokenizer: Any
    ends: tuple[int, ...]
    """Tokens that end an answer."""
    together: int
    """Most concurrent requests."""
    check_stop: Callable[[], None]

    def answers(
        self, prompts: Sequence[Tokens], decoding: Decoding, watch: Watch, may_loop: Collection[int]
    ) -> list[Answer]:
        """
        Return greedy answers in the order of the prompts; loops are not cut, as they cost vLLM little.

        Raises `StepFailed` if an answer is missing or incomplete.
        """
        del may_loop

        def look(done: Sequence[Answer]) -> None:
            watch(len(done), sum(answer.tokens for answer in done))

        return self._all([partial(self._answer, prompt, decoding) for prompt in prompts], look)

    def likelihoods(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Likelihood]:
        """Return the likelihood of each completion after its prompt. Raises `StepFailed` if one is missing."""
        return self._all([partial(self._likelihood, *pair) for pair in pairs], lambda _done: self.check_stop())

    def choices(self, questions: Sequence[Question]) -> list[list[float]]:
        """Return each choice's mean negative log-likelihood in nats per token, by question."""
        flat = iter(self.likelihoods([(prompt, choice) for prompt, choices in questions for choice in choices]))
        return [[(found := next(flat)).nll / found.tokens for _ in choices] for _, choices in questions]

    def close(self) -> None:
        """Stop the server."""
        self.server.stop()

    def _answer(self, prompt: Tokens, decoding: Decoding) -> Answer:
        choice = self.server.complete(
            {
                "prompt": list(prompt),
                "max_tokens": decoding.room(prompt),
                "repetition_penalty": decoding.repetition_penalty,
                "stop_token_ids": list(self.ends),
            }
        )
        tokens = choice["token_ids"]
        ended = [index for index, token in enumerate(tokens) if token in self.ends]
        if ended != [len(tokens) - 1] and (ended or len(tokens) != decoding.room(prompt)):
            message = f"vLLM gave an answer of {count(len(tokens), 'token')} that neither ended nor reached "
            raise StepFailed(f"{message}{decoding.room(prompt)}", "retry the run; if it happens again, see its log")
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(text, len(tokens), ended=bool(ended))

    def _likelihood(self, prompt: Tokens, completion: Tokens) -> Likelihood:
        whole = [*prompt, *completion]
        choice = self.server.complete({"prompt": whole, "max_tokens": 1, "prompt_logprobs": 0})
        given = choice.get("prompt_logprobs")
        if not isinstance(given, list) or len(given) != len(whole):
            message = f"vLLM gave {len(given or ())} log-probabilities for {len(whole)} tokens"
            raise StepFailed(message, "retry the run; if it happens again, see its log")
        found = [_log_probability(one, token) for one, token in zip(given[len(prompt) :], completion, strict=True)]
        return Likelihood(-sum(found), len(completion))

    def _all(self, asks: Sequence[Callable[[], T]], look: Callable[[Sequence[T]], None]) -> list[T]:
        """Return all results in order; the first error, or what `look` raises, stops the server and is raised."""
        with ThreadPoolExecutor(self.together) as pool:
            futures: list[Future[T]] = [pool.submit(ask) for ask in asks]
            left = set(futures)
            try:
                while left:
                    _, left = wait(left, _LOOK_SECONDS, FIRST_COMPLETED)
                    look([future.result() for future in futures if future.done()])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.server.stop()
                raise
            return [future.result() for future in futures]


def _log_probability(given: object, token: int) -> float:
    """Return a token's log-probability; minus infinity if it is missing, as for a broken model."""
    try:
        value = float(given[str(token)]["logprob"])  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        return -math.inf
    return value if value > _NOTHING else -math.inf
