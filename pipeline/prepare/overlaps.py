"""Where each row is while held-out and training rows are compared, and some of those that leave, as examples."""

from collections.abc import Iterator, Sequence
from enum import IntEnum
from functools import cached_property
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.artifacts import Overlap
from pipeline.models.prompt import fold
from pipeline.prepare.partitions import PartitionRow

Rule = Literal["answer", "ngram", "minhash"]
RULES: tuple[Rule, ...] = ("answer", "ngram", "minhash")
MOST_EXAMPLES = 10
_SHOWN = 200
#: Hexadecimal digits of half of an id.
_HALF = 16


class Part(IntEnum):
    """What a row of a drop is in the split; a prompt's first row stands for it."""

    NONE = 0
    """In no split: a duplicate, replaced, or with a special token."""
    TRAIN = 1
    """Training or dev."""
    TRAIN_MORE = 2
    """Another answer to the same prompt."""
    HELDOUT = 3
    HELDOUT_MORE = 4
    REMOVED = 5
    """Of a training drop, but its prompt is pinned, and judged on."""


class Overlaps:
    """Where the rows of the drops are in the split, and which of them leave: about 22 bytes a row."""

    def __init__(self, counts: Sequence[int]) -> None:
        """Begin with drops of so many rows, none of which is in a split yet."""
        self.parts: list[npt.NDArray[np.uint8]] = [np.zeros(count, np.uint8) for count in counts]
        """A drop each, [rows] of `Part`."""
        self.units: list[npt.NDArray[np.int32]] = [np.full(count, -1, np.int32) for count in counts]
        """A drop each, [rows]: the number, by hash, of the held-out prompt that a row is of; of a training row that
        leaves, the one that it is near to; else -1."""
        self.rules: list[npt.NDArray[np.uint8]] = [np.zeros(count, np.uint8) for count in counts]
        """A drop each, [rows]: 1 + the number in `RULES` of what a training row leaves by; 0 if it stays."""
        self.ids: list[npt.NDArray[np.uint64]] = [np.zeros((count, 2), np.uint64) for count in counts]
        """A drop each, [rows, halves]: the id of a row that is in a split or removed."""
        self._near: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]] = []
        self.heldout = 0
        """Held-out prompts."""
        self.repeats: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        """[held-out prompts]: an earlier one that it is near to, so that it is not scored; -1 if there is none."""

    def train(self, rows: Sequence[PartitionRow]) -> None:
        """Note the rows of a prompt that is not held out."""
        for number, row in enumerate(rows):
            self._note(row, Part.TRAIN_MORE if number else Part.TRAIN)

    def hold_out(self, rows: Sequence[PartitionRow], removed: Sequence[PartitionRow] = ()) -> None:
        """Note the rows of the next held-out prompt, and those of training drops that ask the same."""
        for number, row in enumerate(rows):
            self._note(row, Part.HELDOUT_MORE if number else Part.HELDOUT)
        for row in removed:
            self._note(row, Part.REMOVED)
        for row in (*rows, *removed):
            self.units[row.order][row.number] = self.heldout
        self.heldout += 1

    def _note(self, row: PartitionRow, part: Part) -> None:
        self.parts[row.order][row.number] = part
        self.ids[row.order][row.number, 0] = int(row.id[:_HALF], 16)
        self.ids[row.order][row.number, 1] = int(row.id[_HALF:], 16)

    def note_near(self, drop: int, rows: npt.NDArray[np.int64], units: npt.NDArray[np.int64]) -> None:
        """Note rows of a drop, each near to the held-out prompt at the same place of `units`."""
        # What has this number already is the prompt's own, or a training row that was noted as it was marked.
        other = self.units[drop][rows] != units
        self._near.append((units[other], self.ids[drop][rows[other]]))

    def near(self, unit: int | None = None) -> list[str]:
        """Return the ids of the other prompts that are near to a held-out one, or to any: sorted, each once."""
        begins, ids = self._hits
        part = ids if unit is None else ids[begins[unit] : begins[unit + 1]]
        return sorted({f"{first:0{_HALF}x}{second:0{_HALF}x}" for first, second in part.tolist()})

    @cached_property
    def _hits(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Where each held-out prompt's begin, and the ids of the rows near to each. Once all are noted."""
        units = np.concatenate([units for units, _ in self._near] or [np.zeros(0, np.int64)])
        ids = np.concatenate([ids for _, ids in self._near] or [np.zeros((0, 2), np.uint64)])
        order = np.argsort(units, kind="stable")
        return np.searchsorted(units[order], np.arange(self.heldout + 1)), ids[order]

    def kept(self, rows: Sequence[PartitionRow]) -> list[PartitionRow]:
        """Return of a training prompt's rows those that stay: all go with their prompt, one alone by its answer."""
        rules = [int(self.rules[row.order][row.number]) for row in rows]
        if rules and rules[0] > 1 + RULES.index("answer"):
            return []
        return [row for row, rule in zip(rows, rules, strict=True) if not rule]

    def counts(self) -> list[int]:
        """Return how many prompts, or single answers, leave by each of `RULES`."""
        return [sum(int((rules == 1 + number).sum()) for rules in self.rules) for number in range(len(RULES))]

    def some(self) -> Iterator[tuple[int, int, Rule, int]]:
        """Yield a few rows that leave, of each rule in turn: drop, number, rule, and the held-out prompt's number."""
        found = [list(islice(self._leaving(1 + number), MOST_EXAMPLES)) for number in range(len(RULES))]
        for turn in range(MOST_EXAMPLES):
            for rule, places in zip(RULES, found, strict=True):
                if turn < len(places):
                    drop, row = places[turn]
                    yield drop, row, rule, int(self.units[drop][row])

    def _leaving(self, rule: int) -> Iterator[tuple[int, int]]:
        for drop, rules in enumerate(self.rules):
            yield from ((drop, int(row)) for row in np.flatnonzero(rules == rule)[:MOST_EXAMPLES])


class Examples:
    """Collects both texts of some rows that leave, as their prompts come by."""

    def __init__(self, overlaps: Overlaps) -> None:
        """Choose the rows."""
        self._wanted = {(drop, row): (rule, unit) for drop, row, rule, unit in islice(overlaps.some(), MOST_EXAMPLES)}
        self._units = {unit for _rule, unit in self._wanted.values()}
        self._heldout: dict[int, list[PartitionRow]] = {}
        self._train: dict[tuple[int, int], PartitionRow] = {}
        self._prompts: list[Overlap] = []

    def hold_out(self, unit: int, rows: list[PartitionRow], removed: list[PartitionRow]) -> None:
        """Look at the held-out prompt with this number, and at the training rows that ask the same."""
        if unit in self._units:
            self._heldout[unit] = rows
        if removed and len(self._prompts) < MOST_EXAMPLES:
            self._prompts.append(_overlap("prompt", removed[0], rows[0]))

    def train(self, rows: list[PartitionRow]) -> None:
        """Look at the rows of a training prompt."""
        self._train.update({place: row for row in rows if (place := (row.order, row.number)) in self._wanted})

    def found(self) -> tuple[Overlap, ...]:
        """Return the examples; of equal prompts only where there is room."""
        near = []
        for place, (rule, unit) in self._wanted.items():
            row, rivals = self._train[place], self._heldout[unit]
            same = (rival for rival in rivals if rule == "answer" and rival.output == row.output)
            near.append(_overlap(rule, row, next(same, rivals[0])))
        return tuple([*near, *self._prompts][:MOST_EXAMPLES])


def _overlap(rule: Literal["prompt"] | Rule, row: PartitionRow, heldout: PartitionRow) -> Overlap:
    texts = (row.output, heldout.output) if rule == "answer" else _prompts(row, heldout)
    return Overlap(
        rule=rule, train_id=row.id, heldout_id=heldout.id, train_text=texts[0][:_SHOWN], heldout_text=texts[1][:_SHOWN]
    )


def _prompts(row: PartitionRow, heldout: PartitionRow) -> tuple[str, str]:
    """Return both prompts, without an instruction that they share: there is room for their beginning only."""
    if row.instruction == heldout.instruction and row.input and heldout.input:
        return row.input, heldout.input
    return fold(row.instruction, row.input), fold(heldout.instruction, heldout.input)
