"""
Find near-duplicate texts exactly, by the runs of words that they share.

Words are those of `pipeline.metrics.tokens` (single characters in scripts without spaces). Runs are compared by
Python's 64-bit hash, so two different runs are taken for equal with a probability of about 2^-64.
"""

import math
from array import array
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import NamedTuple

from pipeline.metrics.tokens import runs_of_three

SHINGLE = 3
LONG_RUN = 13
#: Least common shingles if a text is compared in part or the similarity is low: fewer are chance (a name, a date).
LEAST_SHARED = 3
_ROUNDING = 1e-9


class Text(NamedTuple):
    """The words and shingles of a text."""

    words: Sequence[str]
    every: AbstractSet[int]
    """The hashes of its 3-word runs."""
    shingles: AbstractSet[int]
    """Those that are compared."""

    @property
    def partly(self) -> bool:
        """Whether some shingles are not compared."""
        return len(self.shingles) < len(self.every)


def long_runs(words: Sequence[str]) -> set[int]:
    """Return the hashes of the 13-word runs of a text; a shorter text has none."""
    # The shingles at a run's words 0, 3, 6, 9 and 10 cover it.
    at = list(runs_of_three(words))
    return set(map(hash, zip(at, at[3:], at[6:], at[9:], at[10:], strict=False)))


class RunIndex:
    """An index of texts by their runs of 13 words."""

    def __init__(self, common: AbstractSet[int]) -> None:
        """Create an empty index that ignores the runs whose hashes are in `common`."""
        self._common = common
        self._numbers: dict[int, int] = {}
        self._some: set[int] = set()

    def add(self, number: int, text: Text) -> None:
        """
        Add a text, which `find` returns as `number`; common runs are ignored.

        A run that a text added before has, too, is from now on found as `number` alone.
        """
        self._numbers.update(dict.fromkeys(long_runs(text.words) - self._common, number))
        # Of the eleven shingles of any of its runs, one is among these.
        self._some.update(islice(runs_of_three(text.words), 0, None, LONG_RUN - SHINGLE + 1))

    def find(self, text: Text) -> set[int]:
        """Return the numbers of the added texts that share a 13-word run with `text`; common runs are ignored."""
        if self._some.isdisjoint(text.every):
            return set()
        return {self._numbers[run] for run in self._numbers.keys() & long_runs(text.words)}


class SimilarityIndex:
    """
    An inverted index from shingles to texts that finds texts by their Jaccard similarity.

    Two similar texts share a minimum number of shingles, so a text without that many less one of its shingles still
    shares one of the rest (prefix filtering, Chaudhuri et al. 2006). Only the rest, the rarest shingles, is indexed.
    """

    def __init__(self, similarity: float, least_shared: int = 1) -> None:
        """Create an empty index for texts with at least this Jaccard similarity and number of shared shingles."""
        self._similarity = similarity
        self._least_shared = least_shared
        self._index: dict[int, tuple[int, ...]] = {}
        self._texts: dict[int, tuple[array[int], bool]] = {}

    def add(self, number: int, text: Text) -> None:
        """Add a text, which `find` returns as `number`, different for each text; it takes about 200 bytes per word."""
        self._texts[number] = array("q", text.shingles), text.partly
        shared = max(math.ceil(self._similarity * len(text.shingles) - _ROUNDING), 1)
        rarest = sorted(text.shingles, key=lambda shingle: len(self._index.get(shingle, ())))
        for shingle in rarest[: len(rarest) - shared + 1]:
            self._index[shingle] = (*self._index.get(shingle, ()), number)

    def find(self, text: Text) -> set[int]:
        """
        Return the numbers of the added texts that are at least as similar to `text` as the index requires.

        Similarity is the Jaccard index of the shingles to compare. If either text has shingles that are not compared,
        three must be in common.
        """
        candidates = {number for shingle in self._index.keys() & text.shingles for number in self._index[shingle]}
        return {number for number in candidates if self._is_similar(text, number)}

    def _is_similar(self, text: Text, number: int) -> bool:
        other, partly = self._texts[number]
        shared = sum(map(text.shingles.__contains__, other))
        union = len(text.shingles) + len(other) - shared
        least = LEAST_SHARED if partly or text.partly else self._least_shared
        return shared >= self._similarity * union - _ROUNDING and shared >= least
