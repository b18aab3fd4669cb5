"""
What is compared of a drop's rows, worked out once a drop: the hashes of the words of their prompts, and of the answers.

A file holds blocks of rows, so memory depends on a block alone; its checksums tell a damaged one, which is made again.
A record is known by its number in its drop, from 0, good or not for training.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pipeline.near_duplicates.word_hashes import WordHasher

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


class SignatureWriter:
    """Writes the signatures of one drop, row by row."""

    def __init__(self, path: Path, hasher: WordHasher) -> None:
        """Write to `path`, whose folder must exist."""
        self._hasher = hasher
        self._file = zipfile.ZipFile(path, "w")
        self._rows: list[tuple[int, int, int, int]] = []
        self._words: list[int] = []
        self._block = 0
        self._total = 0

    def __enter__(self) -> Self:
        """Give the file that is open already."""
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        """Write what is left, and how many rows there are; after an error only close the file."""
        if kind is None:
            self._flush()
            self._write("total", np.array([self._total], "<u8"))
        self._file.close()

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
        self._total += 1
        if len(self._rows) >= _BLOCK_ROWS or len(self._words) >= _BLOCK_WORDS:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        self._write(f"rows-{self._block}", np.array(self._rows, ROW))
        self._write(f"words-{self._block}", np.array(self._words, "<u4"))
        self._block += 1
        self._rows, self._words = [], []

    def _write(self, name: str, values: npt.NDArray[Any]) -> None:
        # ZipInfo's own time stamp: the same drop gives the same bytes.
        with self._file.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
            np.lib.format.write_array(member, values, allow_pickle=False)


def holds(path: Path, rows: int) -> bool:
    """Say whether `path` is a whole file of the signatures of so many rows; every byte is held to its checksum."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None and int(_read(file, "total")[0]) == rows
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, RuntimeError):
        # A bit that says "encrypted" is a RuntimeError, another method of compression one, too.
        return False


def read_blocks(path: Path) -> Iterator[Block]:
    """Yield the blocks of a file that `holds`, in the order of the rows."""
    first = 0
    with zipfile.ZipFile(path) as file:
        for number in range(sum(name.startswith("rows-") for name in file.namelist())):
            block = Block(first, _read(file, f"rows-{number}"), _read(file, f"words-{number}"))
            first += len(block.rows)
            yield block


def _read(file: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    with file.open(name) as member:
        values: npt.NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
    return values


def _text_hash(words: list[int]) -> int:
    """Return 64 bits of words in their order, never 0."""
    return int.from_bytes(blake2b(np.array(words, "<u4").tobytes(), digest_size=8).digest(), "little") or 1
