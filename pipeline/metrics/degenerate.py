"""
Detect degenerate and collapsed answers, in any script.

A degenerate answer is empty, truncated or looping. A collapsed answer to a general question is a label of the training
data, empty or very short.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from pipeline.metrics.tokens import tokens

DEGENERATE = ("empty", "truncated", "looping")
COLLAPSED = ("label", "empty", "short")
#: Fewest repetitions of a loop.
_TIMES = 3
#: Fewest characters of a loop: a round number or an underline is none.
_LEAST = 20
#: An output of at least so many training rows and at most so many characters is a label.
_LABEL_ROWS, _LABEL_CHARACTERS = 3, 100
#: Most words of a short answer, and the least ratio of the base model's words to them.
_FEW_WORDS, _RATIO = 3, 3


def degenerate(text: str, references: Sequence[str], *, ended: bool) -> list[str]:
    """
    Return which of `empty`, `truncated`, `looping` apply to an answer; an empty list for a sound answer.

    `ended` is whether the model generated the end token; without it the answer is truncated. An answer of whitespace is
    empty. An answer does not count as looping (see `is_looping`) if a reference loops.
    """
    kinds = [] if text.strip() else ["empty"]
    if not ended:
        kinds.append("truncated")
    if is_looping(text) and not any(map(is_looping, references)):
        kinds.append("looping")
    return kinds


def is_looping(text: str) -> bool:
    """
    Return whether one phrase, repeated at least three times without a break, makes up half of the text or more.

    The repetitions must have at least 20 characters in all; any whitespace counts as a space. It is the repetition of
    Holtzman et al. 2020 ("The Curious Case of Neural Text Degeneration": a phrase that repeats at least three times at
    the end) on characters instead of words, and anywhere in the text. The last repetition may be incomplete.
    """
    signs = " ".join(text.split())
    least = max(_LEAST, (len(signs) + 1) // 2)
    return any(_stretch(signs, period) >= least for period in range(1, len(signs) // _TIMES + 1))


def _stretch(signs: str, period: int) -> int:
    """
    Return the length of the first found stretch that repeats with `period` at least three times; 0 if none is found.

    Of a stretch over half of the text, the characters equal to the character a period before span at least a third of
    the text, so one of them is at a third, at two thirds or at the end of the text, where the search starts.
    """
    third = len(signs) // _TIMES
    for anchor in (third, 2 * third, 3 * third):
        first = last = anchor
        while first >= period and first < len(signs) and signs[first] == signs[first - period]:
            first -= 1
        while period <= last < len(signs) and signs[last] == signs[last - period]:
            last += 1
        # Characters after `first` and before `last` are equal; the stretch begins a period earlier.
        length = last - first - 1 + period
        if last > anchor and length >= _TIMES * period:
            return length
    return 0


def collapsed(
    answers: Mapping[str, Sequence[tuple[str, bool]]], base: str, outputs: Iterable[str]
) -> dict[str, list[str]]:
    """
    Return, by model, how each of its answers has collapsed: one of `COLLAPSED`, or "" for a real answer.

    `answers` has each model's texts for the same questions, each with whether it is right; right answers are real.
    An empty answer has no words; a label equals, compared by words, at least 3 of `outputs`, the training rows' (read
    once), of at most 100 characters; a short answer has at most 3 words, and at most a third of those of the model
    `base`.
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
        return "short" if len(answer) <= _FEW_WORDS and len(answer) * _RATIO <= len(usual) else ""

    return {
        model: [
            kind(answer, usual, right=right)
            for answer, usual, (_, right) in zip(words[model], words[base], texts, strict=True)
        ]
        for model, texts in answers.items()
    }
