"""What every engine can do: answer, and say how likely it finds what others answered."""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from pipeline.models.generation import Answer, Decoding, Likelihood, Tokens
from pipeline.models.multiple_choice import Question

#: Told how many answers are complete and how many tokens there are; what it raises ends the batch.
Watch = Callable[[int, int], None]


class Engine(Protocol):
    """One model, ready to be asked by tokens."""

    def answers(
        self, prompts: Sequence[Tokens], decoding: Decoding, watch: Watch, may_loop: Collection[int]
    ) -> list[Answer]:
        """Return greedy answers in the order of the prompts; the places `may_loop` are never cut for a loop."""
        ...

    def likelihoods(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Likelihood]:
        """Return how likely each completion is after its prompt."""
        ...

    def choices(self, questions: Sequence[Question]) -> list[list[float]]:
        """Return each question's choices' mean negative log-likelihoods, in nats a token."""
        ...

    def close(self) -> None:
        """Free what the model holds."""
        ...
