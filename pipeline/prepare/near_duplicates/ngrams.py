"""
Runs of words as 64-bit hashes, for many texts at once.

A run's hash is a polynomial over the mixed hashes of its words, modulo 2^64 (Karp and Rabin 1987), put together from
runs of half its length; two different runs have the same one with a chance of about 2^-64.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]

_BASE = 0x9E37_79B9_7F4A_7C15
_SKETCH_BITS = 22


@dataclass(frozen=True)
class Texts:
    """Some texts, as the hashes of their words."""

    words: npt.NDArray[np.uint32]
    """[all words], text after text."""
    starts: Indices
    """[texts + 1]: where each one begins, and where the last one ends."""

    @property
    def lengths(self) -> Indices:
        """[texts], in words."""
        return np.diff(self.starts)

    def __len__(self) -> int:
        """Return how many texts there are."""
        return len(self.starts) - 1

    def take(self, chosen: npt.NDArray[Any]) -> "Texts":
        """Return the texts at `chosen`, indices or a mask, in that order."""
        return cut(self.words, self.starts[:-1][chosen], self.lengths[chosen])


def cut(words: npt.NDArray[np.uint32], begins: Indices, lengths: Indices) -> Texts:
    """Return the texts that begin at `begins` in `words` and have `lengths` words."""
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return Texts(words[positions(begins, lengths)], starts)


def join(parts: list[Texts]) -> Texts:
    """Return all texts of `parts` as one."""
    words = np.concatenate([part.words for part in parts]) if parts else np.zeros(0, np.uint32)
    lengths = np.concatenate([part.lengths for part in parts]) if parts else np.zeros(0, np.int64)
    return Texts(words, np.concatenate(([0], np.cumsum(lengths))).astype(np.int64))


def mix(values: Hashes) -> Hashes:
    """Spread every bit of 64-bit values over all of them (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return values ^ (values >> np.uint64(31))


def ngrams(texts: Texts, size: int) -> tuple[Hashes, Indices]:
    """Return the hash of every run of `size` words, and the text that each is of; shorter texts have none."""
    counts = np.maximum(texts.lengths - size + 1, 0)
    rolled = _rolled(_mixed(texts), size)
    return mix(rolled[positions(texts.starts[:-1], counts)]), _repeated(counts)


def shingles(texts: Texts, size: int) -> tuple[Hashes, Indices]:
    """Do as `ngrams` does, but a shorter text that is not empty is one run as a whole."""
    hashes, rows = ngrams(texts, size)
    words, lengths = _mixed(texts), texts.lengths
    for length in range(1, size):
        short = np.flatnonzero(lengths == length)
        if len(short):
            whole = _rolled(words, length)[texts.starts[:-1][short]]
            hashes = np.concatenate((hashes, mix(whole + np.uint64(length))))
            rows = np.concatenate((rows, short))
    return hashes, rows


def distinct(hashes: Hashes, rows: Indices) -> tuple[Hashes, Indices]:
    """Return each pair of hash and row once, sorted by row, then by hash."""
    order = np.lexsort((hashes, rows))
    hashes, rows = hashes[order], rows[order]
    if len(hashes) == 0:
        return hashes, rows
    fresh = np.concatenate(([True], (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])))
    return hashes[fresh], rows[fresh]


def members(hashes: npt.NDArray[Any], known: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Say of each value whether it is in `known`, which is sorted."""
    if len(known) == 0:
        return np.zeros(len(hashes), np.bool_)
    places = np.searchsorted(known, hashes)
    places[places == len(known)] = 0
    found: npt.NDArray[np.bool_] = known[places] == hashes
    return found


class HashFilter:
    """Says quickly which hashes are certainly not among some; it may let others pass, never the reverse."""

    def __init__(self, hashes: Hashes) -> None:
        """Note `hashes`."""
        self._seen = np.zeros(1 << _SKETCH_BITS, np.bool_)
        self._seen[_bucket(hashes)] = True

    def passes(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Return a mask of those that may be among them."""
        return self._seen[_bucket(hashes)]


class FrequentHashes:
    """
    Finds the hashes that are in more than `most` rows, exactly and in bounded memory, in two passes over all rows.

    The first counts by the hashes' first bits, which can only be too many; the second counts those few that remain.
    """

    def __init__(self, most: int) -> None:
        """Begin the first pass."""
        self._most = most
        self._load = np.zeros(1 << _SKETCH_BITS, np.uint32)
        self._heavy: npt.NDArray[np.bool_] | None = None
        self._hashes = np.zeros(0, np.uint64)
        self._counts = np.zeros(0, np.int64)

    def note(self, hashes: Hashes) -> None:
        """Take in hashes in the first pass, a row's repetitions among them."""
        np.add.at(self._load, _bucket(hashes), np.uint32(1))

    def count(self, hashes: Hashes, rows: Indices) -> None:
        """Take in whole rows in the second pass."""
        if self._heavy is None:
            self._heavy = self._load > self._most
        picked = self._heavy[_bucket(hashes)]
        found, counts = np.unique(distinct(hashes[picked], rows[picked])[0], return_counts=True)
        self._hashes, places = np.unique(np.concatenate((self._hashes, found)), return_inverse=True)
        self._counts = np.bincount(places, np.concatenate((self._counts, counts)), len(self._hashes)).astype(np.int64)

    def found(self) -> Hashes:
        """Return them, sorted."""
        return self._hashes[self._counts > self._most]


def _bucket(hashes: Hashes) -> Hashes:
    return hashes >> np.uint64(64 - _SKETCH_BITS)


def _mixed(texts: Texts) -> Hashes:
    return mix(texts.words.astype(np.uint64) + np.uint64(_BASE))


def _rolled(words: Hashes, size: int) -> Hashes:
    """Return the polynomial of every window of `size` words, by the binary digits of `size`."""
    done: Hashes | None = None
    have, run, length = 0, words, 1
    while True:
        factor = np.uint64(pow(_BASE, length, 1 << 64))
        if size & length:
            # `have` words so far, then the `length` words after them.
            done = run if done is None else done[: max(len(run) - have, 0)] * factor + run[have:]
            have += length
        if 2 * length > size:
            return done if done is not None else run
        run = run[: max(len(run) - length, 0)] * factor + run[length:]
        length *= 2


def _repeated(counts: Indices) -> Indices:
    return np.repeat(np.arange(len(counts)), counts)


def positions(begins: Indices, counts: Indices) -> Indices:
    """Return the numbers from each `begin` on, so many of each as `counts` says, one after another."""
    before = np.cumsum(counts) - counts
    return np.repeat(begins - before, counts) + np.arange(int(counts.sum()))
