"""
What is compared of a drop's rows: the hashes of the words of their prompts, and of the answers.

A record is known by its number in its drop, from 0, good or not for training.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.prepare.near_duplicates.word_hashes import WordHasher

#: Fewer words make no answer that would be known again.
LONG_ANSWER_WORDS = 8
_BLOCK_ROWS = 8_192
_BLOCK_WORDS = 1 << 18
#: `words` is all of a row's, `instruction_words` those before its input; `instruction` and `answer` are 64-bit hashes,
#: 0 for an answer that is not long.
ROW = np.dtype([("words", "<u4"), ("instruction_words", "<u4"), ("instruction", "<u8"), ("answer", "<u8")])

Words = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Block:
    """Some rows of a drop, one after another."""

    first: int
    """Number of the first row."""
    rows: npt.NDArray[Any]
    """[rows] of `ROW`."""
    words: Words
    """[sum of rows["words"]], the prompts' words: instruction, then input."""


class Signatures:
    """The signatures of one drop, in memory: 24 bytes a row, and 4 a word of its prompt."""

    def __init__(self, hasher: WordHasher) -> None:
        """Begin with no rows."""
        self._hasher = hasher
        self._blocks: list[Block] = []
        self._rows: list[tuple[int, int, int, int]] = []
        self._words: list[int] = []
        self._total = 0

    def add(self, instruction: str, given: str, output: str) -> None:
        """Add the next row."""
        before, after = self._hasher.hashes(instruction), self._hasher.hashes(given)
        answer = self._hasher.hashes(output)
        self._rows.append(
            (
                len(before) + len(after),
                len(before),
                _text_hash(before),
                _text_hash(answer) if len(answer) >= LONG_ANSWER_WORDS else 0,
            )
        )
        self._words += before
        self._words += after
        if len(self._rows) >= _BLOCK_ROWS or len(self._words) >= _BLOCK_WORDS:
            self._close_block()

    def close(self) -> None:
        """Pack the rows that are left: there are no more."""
        if self._rows:
            self._close_block()

    def blocks(self) -> Iterator[Block]:
        """Yield the rows block by block, in their order."""
        self.close()
        yield from self._blocks

    def _close_block(self) -> None:
        self._blocks.append(Block(self._total, np.array(self._rows, ROW), np.array(self._words, "<u4")))
        self._total += len(self._rows)
        self._rows, self._words = [], []


def _text_hash(words: list[int]) -> int:
    """Return 64 bits of words in their order, never 0."""
    return int.from_bytes(blake2b(np.array(words, "<u4").tobytes(), digest_size=8).digest(), "little") or 1
