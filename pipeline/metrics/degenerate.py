"""Answers that are none: nothing, cut off, or a loop; whatever the script."""

from collections.abc import Sequence

KINDS = ("empty", "truncated", "looping")
#: A loop says one thing at least so often.
_TIMES = 3
#: Characters that a loop has at least: a round number or an underline is none.
_LEAST = 20


def degenerate(text: str, references: Sequence[str], *, ended: bool) -> list[str]:
    """
    Return what is wrong with an answer: some of `empty`, `truncated`, `looping`.

    `ended` says whether the model ended the answer by itself. An answer is no loop where a reference is one.
    """
    found = [] if text.strip() else ["empty"]
    if not ended:
        found.append("truncated")
    if is_looping(text) and not any(map(is_looping, references)):
        found.append("looping")
    return found


def is_looping(text: str) -> bool:
    """
    Say whether one phrase, repeated three times or more without a break, makes up half of the text or more.

    The repetition of Holtzman et al. 2020 ("The Curious Case of Neural Text Degeneration": a phrase that repeats at
    least three times at the end), on characters, so that it needs no words, and anywhere, so that a loop that is left
    again counts too; the last round may be cut off.
    """
    signs = " ".join(text.split())
    least = max(_LEAST, (len(signs) + 1) // 2)
    return any(_stretch(signs, period) >= least for period in range(1, len(signs) // _TIMES + 1))


def _stretch(signs: str, period: int) -> int:
    """
    Return the length of a stretch that repeats with `period`, three times or more and over half of the text; else 0.

    Within such a stretch the places that equal the one a period before fill a third of the text at least, so one of
    them is at a third, at two thirds or at the end, and the rest is found from there.
    """
    third = len(signs) // _TIMES
    for anchor in (third, 2 * third, 3 * third):
        first = last = anchor
        while first >= period and first < len(signs) and signs[first] == signs[first - period]:
            first -= 1
        while period <= last < len(signs) and signs[last] == signs[last - period]:
            last += 1
        # Equal are the places after `first` and before `last`; the stretch begins a period earlier.
        length = last - first - 1 + period
        if last > anchor and length >= _TIMES * period:
            return length
    return 0
