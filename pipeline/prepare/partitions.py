"""Rows on disk, parted by their prompt's hash, so that they can be sorted without holding them all in memory."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, Self

_PARTS = 64


class PartitionRow(NamedTuple):
    """One record on its way to a split."""

    place: str
    """Hexadecimal hash of salt and prompt."""
    id: str
    pinned: bool
    order: int
    """Number of its drop in the snapshot: a later drop's answers replace an earlier one's."""
    number: int
    """Its number among the drop's records, from 0."""
    drop: int
    instruction: str
    input: str
    output: str
    tags: tuple[str, ...]


class Partitions:
    """Rows on disk, parted by the first digits of their place, so that each part can be sorted in memory."""

    def __init__(self, folder: Path) -> None:
        """Keep the parts in a folder of their own in `folder`, which is gone at the end."""
        self.parts = _PARTS
        self._folder = folder / ".parts"
        self._files: dict[int, IO[str]] = {}

    def __enter__(self) -> Self:
        """Make the folder."""
        self._folder.mkdir()
        return self

    def __exit__(self, *_error: object) -> None:
        """Remove the folder."""
        self._close()
        shutil.rmtree(self._folder)

    def add(self, row: PartitionRow) -> None:
        """Keep one row."""
        part = int(row.place[:8], 16) * _PARTS >> 32
        if part not in self._files:
            self._files[part] = (self._folder / str(part)).open("w", encoding="utf-8")
        self._files[part].write(json.dumps(row, ensure_ascii=False) + "\n")

    def sorted_parts(self) -> Iterator[list[PartitionRow]]:
        """
        Yield each part's rows by prompt; of a prompt, pinned ones first, then the latest drop, in the drop's order.

        May be asked for again, once all rows are added.
        """
        self._close()
        for part in range(_PARTS):
            path = self._folder / str(part)
            rows = []
            if path.exists():
                with path.open("rb") as file:
                    rows = [PartitionRow(*json.loads(line)) for line in file]
            rows.sort(key=lambda row: (row.place, not row.pinned, -row.order, row.number))
            yield rows

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
