"""Answers that a model gives whatever it is asked: a label of its training data, nothing, or next to nothing."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from pipeline.metrics.tokens import tokens

#: What an answer can be instead of an answer.
KINDS = ("label", "empty", "short")
#: An output of so many training rows, and of at most so many characters, is a label.
_LABEL_ROWS, _LABEL_CHARACTERS = 3, 100
#: An answer of so few words is far shorter than the base model's if that has so many times as many.
_FEW, _TIMES = 3, 3


def collapsed(
    answers: Mapping[str, Sequence[tuple[str, bool]]], base: str, outputs: Iterable[str]
) -> dict[str, list[str]]:
    """
    Return, by model, what each of its answers is instead of an answer: one of `KINDS`, or "" for a real one.

    `answers` has each model's texts to the same questions, with whether they are right: a right one is a real one.
    `base` names the model whose length is normal, `outputs` are those of the training rows, read once.
    """
    words = {model: [tokens(text) for text, _ in texts] for model, texts in answers.items()}
    said = {" ".join(one) for found in words.values() for one in found}
    rows = Counter(
        label for output in outputs if len(output) <= _LABEL_CHARACTERS and (label := " ".join(tokens(output))) in said
    )

    def kind(own: Sequence[str], usual: Sequence[str], *, right: bool) -> str:
        if right:
            return ""
        if not own:
            return "empty"
        if rows[" ".join(own)] >= _LABEL_ROWS:
            return "label"
        return "short" if len(own) <= _FEW and len(own) * _TIMES <= len(usual) else ""

    return {
        model: [
            kind(own, usual, right=right)
            for own, usual, (_, right) in zip(words[model], words[base], texts, strict=True)
        ]
        for model, texts in answers.items()
    }
