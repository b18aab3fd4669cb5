"""Detect collapsed answers to general questions: a label of the training data, an empty or a very short answer."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from pipeline.metrics.tokens import tokens

#: Kinds of collapsed answers.
KINDS = ("label", "empty", "short")
#: An output of at least so many training rows and at most so many characters is a label.
_LABEL_ROWS, _LABEL_CHARACTERS = 3, 100
#: Most words of a short answer, and the least ratio of the base model's words to them.
_FEW, _TIMES = 3, 3


def collapsed(
    answers: Mapping[str, Sequence[tuple[str, bool]]], base: str, outputs: Iterable[str]
) -> dict[str, list[str]]:
    """
    Return, by model, how each of its answers has collapsed: one of `KINDS`, or "" for a real answer.

    `answers` has each model's texts for the same questions, with whether they are right; right ones are real. `base`
    names the model with which lengths are compared, `outputs` are those of the training rows, read once.
    """
    words = {model: [tokens(text) for text, _ in texts] for model, texts in answers.items()}
    texts_seen = {" ".join(answer) for of_model in words.values() for answer in of_model}
    rows = Counter(
        label
        for output in outputs
        if len(output) <= _LABEL_CHARACTERS and (label := " ".join(tokens(output))) in texts_seen
    )

    def kind(answer: Sequence[str], usual: Sequence[str], *, right: bool) -> str:
        if right:
            return ""
        if not answer:
            return "empty"
        if rows[" ".join(answer)] >= _LABEL_ROWS:
            return "label"
        return "short" if len(answer) <= _FEW and len(answer) * _TIMES <= len(usual) else ""

    return {
        model: [
            kind(answer, usual, right=right)
            for answer, usual, (_, right) in zip(words[model], words[base], texts, strict=True)
        ]
        for model, texts in answers.items()
    }
