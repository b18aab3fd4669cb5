"""
Which of many texts share a long run of words with some, or most of their short runs: near-duplicates.

Two rules: one run of 13 words in common, or a Jaccard index of the sets of 3-word runs (shingles, Broder 1997) from a
threshold on. MinHash estimates that index; here it is computed, for the pairs that can reach it: a text that has a
share t of its shingles in common with another has one of its rarest 1 - t in common with it (prefix filtering,
Chaudhuri et al. 2006). Runs that many rows have in common say nothing and are not counted.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.prepare.near_duplicates.ngrams import (
    Hashes,
    HashFilter,
    Indices,
    Texts,
    distinct,
    members,
    mix,
    ngrams,
    positions,
    shingles,
)

SHINGLE = 3
LONG_RUN = 13
#: Where a part of a text is not counted, or little is asked, fewer shingles in common than this are chance: a product's
#: name, a date.
LEAST_SHARED = 3
_MOST_AT_ONCE = 1 << 22
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Boilerplate:
    """Runs of words that too many rows have in common, sorted hashes of each length."""

    shingles: Hashes
    runs: Hashes


@dataclass(frozen=True)
class ShingleSets:
    """The shingles of some texts that count."""

    hashes: Hashes
    """Each once a text, sorted by text, then by hash."""
    rows: Indices
    sizes: Indices
    """[texts]"""
    partly: npt.NDArray[np.bool_]
    """[texts]: whether some of its shingles do not count."""


def shingle_sets(texts: Texts, common: Hashes) -> ShingleSets:
    """Return the sets of the texts' 3-word shingles without those in `common`."""
    hashes, rows = distinct(*shingles(texts, SHINGLE))
    dull = members(hashes, common)
    partly = np.bincount(rows[dull], minlength=len(texts)) > 0
    hashes, rows = hashes[~dull], rows[~dull]
    return ShingleSets(hashes, rows, np.bincount(rows, minlength=len(texts)), partly)


class NearTexts:
    """Finds texts that are near to the ones that it was made of."""

    def __init__(self, texts: Texts, common: Boilerplate, similarity: float, least_shared: int = 1) -> None:
        """Make the look-up tables, about 40 bytes a word. Texts that share fewer shingles than asked are not near."""
        self._common = common
        self._similarity = similarity
        self._least_shared = least_shared
        self.sets = shingle_sets(texts, common.shingles)
        self._keys = np.sort(_keyed(self.sets.hashes, self.sets.rows))
        self._rare, self._rare_rows = self._rarest()
        self._rare_filter = HashFilter(self._rare)
        runs, rows = distinct(*ngrams(texts, LONG_RUN))
        fresh = ~members(runs, common.runs)
        runs, rows = runs[fresh], rows[fresh]
        #: Sorted by run, then by text, as `distinct` has sorted by text already.
        order = np.argsort(runs, kind="stable")
        self.runs, self.run_rows = runs[order], rows[order]
        self._run_filter = HashFilter(self.runs)

    def _rarest(self) -> tuple[Hashes, Indices]:
        """Return of each text the shingles one of which any near text has, sorted."""
        sets = self.sets
        if len(sets.hashes) == 0:
            return sets.hashes, sets.rows
        _, places, counts = np.unique(sets.hashes, return_inverse=True, return_counts=True)
        order = np.lexsort((sets.hashes, counts[places], sets.rows))
        shared = np.ceil(self._similarity * sets.sizes - _ROUNDING).astype(np.int64)
        wanted = sets.sizes - np.maximum(shared, 1) + 1
        number = np.arange(len(order)) - np.repeat(np.cumsum(sets.sizes) - sets.sizes, sets.sizes)
        order = order[number < wanted[sets.rows]]
        order = order[np.argsort(sets.hashes[order], kind="stable")]
        return sets.hashes[order], sets.rows[order]

    def sharing_runs(self, texts: Texts) -> tuple[Indices, Indices]:
        """Return pairs (one of `texts`, the first of ours that has the run of 13 words which they share), sorted."""
        runs, rows = ngrams(texts, LONG_RUN)
        maybe = self._run_filter.passes(runs)
        runs, rows = runs[maybe], rows[maybe]
        same = members(runs, self.runs)
        runs, rows = runs[same], rows[same]
        ours = self.run_rows[np.searchsorted(self.runs, runs)]
        pairs = np.unique(rows * len(self.sets.sizes) + ours)
        return pairs // len(self.sets.sizes), pairs % len(self.sets.sizes)

    def similar(self, texts: Texts) -> tuple[Indices, Indices]:
        """Return all pairs (one of `texts`, one of ours) whose shingles are similar, sorted."""
        hashes, rows = shingles(texts, SHINGLE)
        maybe = self._rare_filter.passes(hashes)
        hashes, rows = distinct(hashes[maybe], rows[maybe])
        begins = np.searchsorted(self._rare, hashes, "left")
        counts = np.searchsorted(self._rare, hashes, "right") - begins
        if int(counts.sum()) > _MOST_AT_ONCE and len(texts) > 1:
            half = len(texts) // 2
            first = self.similar(texts.take(np.arange(half)))
            second = self.similar(texts.take(np.arange(half, len(texts))))
            return np.concatenate((first[0], second[0] + half)), np.concatenate((first[1], second[1]))
        ours = self._rare_rows[positions(begins, counts)]
        pairs = np.unique(np.repeat(rows, counts) * len(self.sets.sizes) + ours)
        return self._verified(texts, pairs // len(self.sets.sizes), pairs % len(self.sets.sizes))

    def _verified(self, texts: Texts, theirs: Indices, ours: Indices) -> tuple[Indices, Indices]:
        """Return the candidate pairs that are similar; those of one text stand together."""
        asked, places = np.unique(theirs, return_inverse=True)
        sets = shingle_sets(texts.take(asked), self._common.shingles)
        begins = np.cumsum(sets.sizes) - sets.sizes
        shared = np.zeros(len(theirs), np.int64)
        ends = np.cumsum(sets.sizes[places])
        start = 0
        while start < len(theirs):
            before = int(ends[start - 1]) if start else 0
            stop = max(int(np.searchsorted(ends, before + _MOST_AT_ONCE, "right")), start + 1)
            part = slice(start, stop)
            sizes = sets.sizes[places[part]]
            hashes = sets.hashes[positions(begins[places[part]], sizes)]
            hit = members(_keyed(hashes, np.repeat(ours[part], sizes)), self._keys)
            shared[part] = np.bincount(np.repeat(np.arange(stop - start), sizes)[hit], minlength=stop - start)
            start = stop
        union = sets.sizes[places] + self.sets.sizes[ours] - shared
        partly = sets.partly[places] | self.sets.partly[ours]
        least = np.where(partly, LEAST_SHARED, self._least_shared)
        near = (shared >= self._similarity * union - _ROUNDING) & (shared >= least)
        return theirs[near], ours[near]


def _keyed(hashes: Hashes, rows: Indices) -> Hashes:
    """Return one hash for each pair of hash and row."""
    return mix(hashes + mix(rows.astype(np.uint64) + np.uint64(1)))
