"""Rows sorted by their prompt's hash, a group a prompt → which of its answers count and which side it is on."""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from pipeline.config import SplitConfig

_PARTS = 64


class SpilledRow(NamedTuple):
    """One record on its way to a side."""

    place: str
    """Hexadecimal hash of salt and prompt."""
    id: str
    pinned: bool
    order: int
    """Number of its drop in the snapshot: a later drop's answers replace an earlier one's."""
    line: int
    drop: int
    instruction: str
    input: str
    output: str
    tokens: int
    short: bool


class Spill:
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

    def add(self, row: SpilledRow) -> None:
        """Keep one row."""
        part = int(row.place[:8], 16) * _PARTS >> 32
        if part not in self._files:
            self._files[part] = (self._folder / str(part)).open("w", encoding="utf-8")
        self._files[part].write(json.dumps(row, ensure_ascii=False) + "\n")

    def sorted_parts(self) -> Iterator[list[SpilledRow]]:
        """Yield each part's rows by prompt; of a prompt, pinned ones first, then the latest drop, then by line."""
        self._close()
        for part in range(_PARTS):
            path = self._folder / str(part)
            rows = []
            if path.exists():
                with path.open("rb") as file:
                    rows = [SpilledRow(*json.loads(line)) for line in file]
            rows.sort(key=lambda row: (row.place, not row.pinned, -row.order, row.line))
            yield rows

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


@dataclass
class Answers:
    """What is known of the answers of one side."""

    count: int = 0
    short: int = 0
    """Answers of few words."""
    longest: int = 0
    """Estimated tokens."""

    def add(self, row: SpilledRow) -> None:
        """Count one answer."""
        self.count += 1
        self.short += row.short
        self.longest = max(self.longest, row.tokens)


@dataclass
class Totals:
    """What became of all rows."""

    rows: int = 0
    train_rows: int = 0
    dev_rows: int = 0
    heldout_rows: int = 0
    """Rows of held-out prompts, scored or not."""
    duplicates: int = 0
    replaced: int = 0
    removed_heldout: int = 0
    heldout_ids: list[str] = field(default_factory=list)
    """Scored prompts."""
    heldout_answers: Answers = field(default_factory=Answers)
    train_answers: Answers = field(default_factory=Answers)


class Sides:
    """Writes the three files; rows must come sorted by prompt, from the lowest hash to the highest."""

    def __init__(self, folder: Path, split: SplitConfig, least_dev: int, *, pinned: bool, judged: bool) -> None:
        """
        Write into `folder`; fewer than `least_dev` dev rows go to training.

        `pinned`: only prompts of held-out drops are held out. `judged`: held-out prompts are scored at all.
        """
        self._split = split
        self._least_dev = least_dev
        self._pinned = pinned
        self._judged = judged
        self._totals = Totals()
        self._early_dev: list[SpilledRow] = []
        self._train, self._dev, self._heldout = (
            (folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") for name in ("train", "dev", "heldout")
        )

    def __enter__(self) -> Self:
        """Give the files that are open already."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Close the files."""
        for file in (self._train, self._dev, self._heldout):
            file.close()

    def add(self, rows: Iterable[SpilledRow]) -> None:
        """Take in whole groups of rows with the same prompt."""
        for _place, group in groupby(rows, key=lambda row: row.place):
            self._add_prompt(list(group))

    def finish(self) -> Totals:
        """Write what was kept back and return what was counted."""
        # Nothing is lost if there are too few: they are the last rows of the training file then.
        if self._totals.dev_rows == 0:
            for row in self._early_dev:
                self._write_train(row)
        return self._totals

    def _add_prompt(self, rows: list[SpilledRow]) -> None:
        self._totals.rows += len(rows)
        pinned = [row for row in rows if row.pinned]
        if pinned:
            self._totals.removed_heldout += len(rows) - len(pinned)
            self._hold_out(self._current(pinned))
            return
        kept = self._current(rows)
        # 52 bits: exact as a float, and always below 1.
        u = int(rows[0].place[:13], 16) / 2**52
        if u < self._split.heldout and not self._pinned:
            self._hold_out(kept)
        elif self._split.heldout <= u < self._split.heldout + self._split.dev:
            for row in kept:
                self._add_dev(row)
        else:
            for row in kept:
                self._write_train(row)

    def _current(self, rows: list[SpilledRow]) -> list[SpilledRow]:
        """Return the latest drop's rows of one prompt, each answer once; count the others."""
        latest = rows[0].order
        kept: dict[str, SpilledRow] = {}
        for row in rows:
            if row.output in kept:
                self._totals.duplicates += 1
            elif row.order == latest:
                kept[row.output] = row
            else:
                self._totals.replaced += 1
        return list(kept.values())

    def _hold_out(self, rows: list[SpilledRow]) -> None:
        self._totals.heldout_rows += len(rows)
        if not self._judged or len(self._totals.heldout_ids) >= self._split.scored_records:
            return
        self._totals.heldout_ids.append(rows[0].id)
        for row in rows:
            self._totals.heldout_answers.add(row)
        _write(self._heldout, rows[0], references=[row.output for row in rows])

    def _add_dev(self, row: SpilledRow) -> None:
        if self._totals.dev_rows == 0:
            self._early_dev.append(row)
            if len(self._early_dev) < self._least_dev:
                return
            for early in self._early_dev:
                _write(self._dev, early)
            self._totals.dev_rows = len(self._early_dev)
        else:
            _write(self._dev, row)
            self._totals.dev_rows += 1

    def _write_train(self, row: SpilledRow) -> None:
        _write(self._train, row)
        self._totals.train_rows += 1
        self._totals.train_answers.add(row)


def _write(file: IO[str], row: SpilledRow, **more: Any) -> None:
    value = {
        "id": row.id,
        "instruction": row.instruction,
        "input": row.input,
        "output": row.output,
        **more,
        "drop": row.drop,
    }
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
