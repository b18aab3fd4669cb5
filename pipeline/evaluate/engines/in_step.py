"""The engine of the training stack, in the step's own process."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pipeline.evaluate.engines.engine import Watch
from pipeline.models import generation, greedy_decoding, multiple_choice
from pipeline.models.generation import Answer, AskedModel, Decoding, Likelihood, Tokens
from pipeline.models.multiple_choice import Question


@dataclass(frozen=True)
class InStep:
    """A model that is loaded here."""

    model: AskedModel

    def answers(
        self, prompts: Sequence[Tokens], decoding: Decoding, watch: Watch, may_loop: Collection[int]
    ) -> list[Answer]:
        """Return greedy answers in the order of the prompts."""
        return greedy_decoding.answers(self.model, prompts, decoding, watch, may_loop)

    def likelihoods(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Likelihood]:
        """Return how likely each completion is after its prompt."""
        return generation.likelihoods(self.model, pairs)

    def choices(self, questions: Sequence[Question]) -> list[list[float]]:
        """Return each question's choices' mean negative log-likelihoods, in nats a token."""
        return multiple_choice.choice_likelihoods(self.model, questions)

    def close(self) -> None:
        """Free the model's memory."""
        generation.close_model(self.model)
