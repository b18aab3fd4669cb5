"""Rows sorted by their prompt's hash, a group a prompt → which of its answers count, and the split that it is in."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Self

from pipeline.config import SplitConfig
from pipeline.metrics import json_fields
from pipeline.models.prompt import fold
from pipeline.models.token_counts import Window
from pipeline.prepare.partitions import PartitionRow

SplitName = Literal["train", "dev", "heldout"]
#: Fewer dev rows say nothing and go to training.
LEAST_DEV_ROWS = 20
#: Tags whose training rows are counted: there may be as many as rows.
_MOST_TAGS = 10_000


class Prompt(NamedTuple):
    """One prompt and what counts of its rows."""

    split: SplitName
    rows: list[PartitionRow]
    """The latest drop's, each answer once; the first one stands for the prompt."""
    drops: tuple[int, ...]
    """Those since which the answers are what they are now, the earliest first."""
    removed: list[PartitionRow]
    """Training rows of a pinned prompt."""
    duplicates: int
    replaced: int
    changed: bool
    """Whether an earlier drop gave other answers."""


def prompts(rows: Iterable[PartitionRow], split: SplitConfig, *, pinned: bool) -> Iterator[Prompt]:
    """
    Yield the prompts of sorted rows, in their order.

    With `pinned` the prompts of held-out drops are held out, and no others. Without, a prompt's split depends on its
    hash alone, and a held-out drop does no more than keep its prompts out of training: whoever may drop such a file
    would choose what is judged on.
    """
    for place, group in groupby(rows, key=lambda row: row.place):
        everything = list(group)
        own = [row for row in everything if row.pinned]
        others = everything[len(own) :]
        chosen: SplitName = "heldout" if own and pinned else _split_of(place, split, pinned=pinned)
        counted, removed = others, []
        if own and (pinned or chosen != "heldout"):
            counted, removed = own if pinned else [], others
        if not counted:
            yield Prompt("train", [], (), removed, 0, 0, changed=False)
            continue
        kept, duplicates = _current(counted)
        since = _since(counted)
        changed = len({row.order for row in counted}) > len(since)
        yield Prompt(chosen, kept, since, removed, duplicates, len(counted) - len(kept) - duplicates, changed)


def _split_of(place: str, split: SplitConfig, *, pinned: bool) -> SplitName:
    # 52 bits: exact as a float, and always below 1.
    u = int(place[:13], 16) / 2**52
    if u < split.heldout:
        return "train" if pinned else "heldout"
    return "dev" if u < split.heldout + split.dev else "train"


def _current(rows: list[PartitionRow]) -> tuple[list[PartitionRow], int]:
    """Return the latest drop's rows of one prompt, each answer once, and how many say the same as one of these."""
    latest = rows[0].order
    kept: dict[str, PartitionRow] = {}
    duplicates = 0
    for row in rows:
        if row.output in kept:
            duplicates += 1
        elif row.order == latest:
            kept[row.output] = row
    return list(kept.values()), duplicates


def _since(rows: list[PartitionRow]) -> tuple[int, ...]:
    """Return the drops with these rows of one prompt up to the one that last changed its answers, that one first."""
    answers: dict[int, set[str]] = {}
    for row in rows:
        answers.setdefault(row.order, set()).add(row.output)
    latest = answers[rows[0].order]
    same = takewhile(lambda order: answers[order] == latest, answers)
    names = {row.order: row.drop for row in rows}
    return tuple(names[order] for order in same)[::-1]


@dataclass
class Totals:
    """What became of all rows."""

    rows: int = 0
    train_rows: int = 0
    train_drops: Counter[int] = field(default_factory=Counter)
    """Training rows by drop."""
    train_tags: Counter[str] = field(default_factory=Counter)
    """Training rows by tag, of the first `_MOST_TAGS` tags."""
    heldout_tags: set[str] = field(default_factory=set)
    """Tags of scored prompts."""
    dev_rows: int = 0
    heldout_rows: int = 0
    """Rows of held-out prompts, scored or not."""
    heldout_prompts: int = 0
    duplicates: int = 0
    replaced: int = 0
    removed_heldout: Counter[int] = field(default_factory=Counter)
    """Training rows whose prompt is pinned, by drop."""
    near_duplicates: int = 0
    """Rows of the training and dev split that are too near to a held-out record."""
    heldout_duplicates: int = 0
    """Held-out prompts that are too near to another one."""
    seen_by_champion: int = 0
    """Held-out prompts that would be scored if the champion had not been trained on them or on a near one."""
    trained_before: Counter[int] = field(default_factory=Counter)
    """Of those, the ones that it was trained on themselves, by a drop of its that has them; 0 if none has them now."""
    scored: list[Prompt] = field(default_factory=list)
    """Scored prompts, by their hash."""
    pins_changed: Counter[int] = field(default_factory=Counter)
    """Scored pinned prompts to which a later drop gave other answers than an earlier one, by that drop."""
    not_json: Counter[int] = field(default_factory=Counter)
    """Scored answers that are no JSON object or array, by drop."""
    first_not_json: tuple[int, int] | None = None
    """Drop and number among its records, from 0, of the first one in the files."""
    heldout_answers: int = 0
    """References of the scored prompts."""
    longest_answer: int = 0
    """Tokens of the longest of those, with the one that ends it."""
    too_long: int = 0
    """Rows of prompts that would be scored if they fitted into the window with their answers."""

    @property
    def train_rows_of(self) -> dict[str, int]:
        """Training rows by slice: each drop, and each tag of the scored prompts."""
        by_drop = {f"drop {drop}": rows for drop, rows in sorted(self.train_drops.items())}
        return by_drop | {f"tag {tag}": self.train_tags[tag] for tag in sorted(self.heldout_tags)}


class Familiar(NamedTuple):
    """What the champion was trained on."""

    ids: frozenset[str] = frozenset()
    """Of held-out prompts, and of others that are near to one."""
    drops: frozenset[int] = frozenset()


class SplitWriter:
    """Writes the three files; prompts of a split must come from the lowest hash to the highest."""

    def __init__(self, folder: Path, window: Window, *, most_scored: int) -> None:
        """Write into `folder`; at most `most_scored` held-out prompts are scored, all of which fit into `window`."""
        self._window = window
        self._most_scored = most_scored
        self._totals = Totals()
        self._early_dev: list[PartitionRow] = []
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

    def add(self, prompt: Prompt, kept: Sequence[PartitionRow]) -> None:
        """Take in the next prompt that is not held out; `kept` are those of its rows that are no near-duplicates."""
        self._count(prompt)
        self._totals.near_duplicates += len(prompt.rows) - len(kept)
        for row in kept:
            own = row._replace(drop=prompt.drops[0])
            if prompt.split == "dev":
                self._add_dev(own)
            else:
                self._write_train(own)

    def finish(self) -> Totals:
        """Write what was kept back and return what was counted."""
        # Nothing is lost if there are too few: they are the last rows of the training file then.
        if self._totals.dev_rows == 0:
            for row in self._early_dev:
                self._write_train(row)
        return self._totals

    def hold_out(self, prompt: Prompt, near: AbstractSet[str] | None, champion: Familiar) -> None:
        """Take in the next held-out prompt, with the ids of those near to it; `None` if it repeats an earlier one."""
        self._count(prompt)
        totals, rows = self._totals, prompt.rows
        totals.heldout_prompts += 1
        totals.heldout_rows += len(rows)
        if near is None:
            totals.heldout_duplicates += 1
        elif len(totals.scored) >= self._most_scored:
            return
        elif not champion.ids.isdisjoint([rows[0].id, *near]):
            totals.seen_by_champion += 1
            if rows[0].id in champion.ids:
                by = (row.drop for row in (*prompt.removed, *rows) if row.drop in champion.drops)
                totals.trained_before[next(by, 0)] += 1
        elif self._fits(rows):
            totals.scored.append(prompt)
            totals.heldout_answers += len(rows)
            tags = sorted({tag for row in rows for tag in row.tags})
            totals.heldout_tags.update(tags)
            more = {"pinned": rows[0].pinned, "tags": tags, "near": sorted(near)}
            # A drop that came back may stand before those that the champion knows and that say the same.
            drop = next((drop for drop in prompt.drops if drop in champion.drops), prompt.drops[0])
            own = rows[0]._replace(drop=drop)
            if rows[0].pinned and prompt.changed:
                totals.pins_changed[drop] += 1
            for row in rows:
                self._look_for_json(row)
            _write(self._heldout, own, {"references": [row.output for row in rows]}, more)

    def _count(self, prompt: Prompt) -> None:
        totals = self._totals
        totals.rows += len(prompt.rows) + len(prompt.removed) + prompt.duplicates + prompt.replaced
        totals.duplicates += prompt.duplicates
        totals.replaced += prompt.replaced
        totals.removed_heldout.update(row.drop for row in prompt.removed)

    def _fits(self, rows: list[PartitionRow]) -> bool:
        """Say whether a prompt fits into the window with each of its answers, and note the longest one."""
        answer = max(self._window.count(row.output) for row in rows) + 1
        asked = self._window.count(fold(rows[0].instruction, rows[0].input)) if self._window.counts else 0
        if self._window.counts and asked + answer > self._window.tokens:
            self._totals.too_long += len(rows)
            return False
        self._totals.longest_answer = max(self._totals.longest_answer, answer)
        return True

    def _look_for_json(self, row: PartitionRow) -> None:
        totals = self._totals
        if json_fields.parse(row.output) is None:
            totals.not_json[row.drop] += 1
            place = (row.drop, row.number)
            totals.first_not_json = min(totals.first_not_json or place, place)

    def _add_dev(self, row: PartitionRow) -> None:
        if self._totals.dev_rows == 0:
            self._early_dev.append(row)
            if len(self._early_dev) < LEAST_DEV_ROWS:
                return
            for early in self._early_dev:
                _write(self._dev, early)
            self._totals.dev_rows = len(self._early_dev)
        else:
            _write(self._dev, row)
            self._totals.dev_rows += 1

    def _write_train(self, row: PartitionRow) -> None:
        _write(self._train, row)
        totals = self._totals
        totals.train_rows += 1
        totals.train_drops[row.drop] += 1
        tags = totals.train_tags
        tags.update(tag for tag in set(row.tags) if tag in tags or len(tags) < _MOST_TAGS)


def _write(file: IO[str], row: PartitionRow, *more: Mapping[str, Any]) -> None:
    """Write one row; `more` stands before and after its drop."""
    before, after = more or ({}, {})
    value = {
        "id": row.id,
        "instruction": row.instruction,
        "input": row.input,
        "output": row.output,
        **before,
        "drop": row.drop,
        **after,
    }
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
