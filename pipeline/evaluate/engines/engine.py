"""The interface of engines, which compute answers and likelihoods, and the engine in the step's process."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.models import generation, greedy_decoding, multiple_choice
from pipeline.models.generation import Answer, AskedModel, Decoding, Likelihood, Tokens
from pipeline.models.multiple_choice import Question

#: Called with the number of complete answers and of tokens so far; it may raise to stop the batch.
Watch = Callable[[int, int], None]


class Engine(Protocol):
    """One loaded or served model that takes tokens."""

    def answers(
        self, prompts: Sequence[Tokens], decoding: Decoding, watch: Watch, may_loop: Collection[int]
    ) -> list[Answer]:
        """Return greedy answers in the order of the prompts; loops are not cut at the indices `may_loop`."""
        ...

    def likelihoods(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Likelihood]:
        """Return the likelihood of each completion after its prompt."""
        ...

    def choices(self, questions: Sequence[Question]) -> list[list[float]]:
        """Return each choice's mean negative log-likelihood in nats per token, by question."""
        ...

    def close(self) -> None:
        """Free the model's resources."""
        ...


@dataclass(frozen=True)
class InStep:
    """The engine of the training stack: a model loaded in the step's process."""

    model: AskedModel

    def answers(
        self, prompts: Sequence[Tokens], decoding: Decoding, watch: Watch, may_loop: Collection[int]
    ) -> list[Answer]:
        """Return greedy answers in the order of the prompts."""
        return greedy_decoding.answers(self.model, prompts, decoding, watch, may_loop)

    def likelihoods(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Likelihood]:
        """Return the likelihood of each completion after its prompt."""
        return generation.likelihoods(self.model, pairs)

    def choices(self, questions: Sequence[Question]) -> list[list[float]]:
        """Return each choice's mean negative log-likelihood in nats per token, by question."""
        return multiple_choice.choice_likelihoods(self.model, questions)

    def close(self) -> None:
        """Free the model's memory."""
        generation.close_model(self.model)
