"""Detect degenerate answers in any script: empty, truncated, or looping."""

from collections.abc import Sequence

KINDS = ("empty", "truncated", "looping")
#: Fewest repetitions of a loop.
_TIMES = 3
#: Fewest characters of a loop: a round number or an underline is none.
_LEAST = 20


def degenerate(text: str, references: Sequence[str], *, ended: bool) -> list[str]:
    """
    Return which of `empty`, `truncated`, `looping` apply to an answer.

    `ended` says whether the model generated the end token. An answer does not count as looping if a reference loops.
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

    The repetition of Holtzman et al. 2020 ("The Curious Case of Neural Text Degeneration": a phrase that repeats at
    least three times at the end), on characters, so that it needs no words, and anywhere, so that a loop that ends
    counts, too; the last repetition may be incomplete.
    """
    signs = " ".join(text.split())
    least = max(_LEAST, (len(signs) + 1) // 2)
    return any(_stretch(signs, period) >= least for period in range(1, len(signs) // _TIMES + 1))


def _stretch(signs: str, period: int) -> int:
    """
    Return the length of a stretch that repeats with `period`, at least three times and over half of the text; else 0.

    Within such a stretch the characters equal to the one a period before span at least a third of the text, so one of
    them is at a third, at two thirds or at the end, and the search starts from these.
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
