"""Slices of the held-out records: by drop, by tag, and by whether the champion knows the record's drop."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

from pipeline.artifacts import SliceResult
from pipeline.decide import statistics
from pipeline.decide.comparison import Comparison, Flags, Places
from pipeline.decide.policy import LEAST_EXACT, MOST_SMALL

Name = TypeVar("Name", int, str)
POINTS = 100


@dataclass(frozen=True)
class Known:
    """The drops that the champion was trained on; held-out records of other drops, unless pinned, are new to it."""

    drops: Collection[int] | None = None
    """Those that the champion was trained on; `None` for a base model, to which no record is new."""
    names: Mapping[int, str] = field(default_factory=dict)
    """File names of drops, for labels."""

    def seen(self, comparison: Comparison) -> Flags:
        """Return the mask of a comparison's records that `among` describes."""
        return self.among(comparison.drops, comparison.pinned)

    def among(self, drops: Places, pinned: Flags) -> Flags:
        """
        Return the mask of records whose drop is in `self.drops` or that are pinned; of all if `self.drops` is `None`.

        A pinned record always counts as seen: a person chose it for the evaluation set, and it has no training rows.
        """
        if self.drops is None:
            return np.ones(drops.size, dtype=np.bool_)
        return np.asarray(np.isin(drops, list(self.drops)) | pinned)

    def label(self, drop: int) -> str:
        """Return a drop's number, with its file's name if that is known: `drop 3 (answers.jsonl)`."""
        return f"drop {drop} ({self.names[drop]})" if drop in self.names else f"drop {drop}"


def judged_on(on: str, known: Known, drops: Places, pinned: Flags) -> Flags:
    """
    Return a mask of the records that the gate judges on by its setting `on`.

    `drops` (the number of its drop) and `pinned` have an entry per record. "seen" includes pinned records; "all", and
    "pinned" without a pinned record, select all records.
    """
    if on == "pinned" and pinned.any():
        return pinned
    if on == "seen":
        return known.among(drops, pinned)
    return np.ones(drops.size, dtype=np.bool_)


@dataclass(frozen=True)
class Slice:
    """A subset of the records: its kind, label and mask, and for a drop that is seen its number."""

    kind: Literal["seen", "unseen", "drop", "tag"]
    label: str
    mask: Flags
    drop: int | None = None
    """Number of the drop, if the slice is a drop whose records are all seen (`Known.seen`)."""


def find_slices(comparison: Comparison, known: Known) -> tuple[Slice, ...]:
    """
    Return the slices of the records: seen and unseen records, drops, tags; none is empty.

    Unseen records are a slice if there are any, and seen ones if there are both; drops if there are several; tags if
    some records, but not all, have them. Of drops and tags with fewer than `LEAST_EXACT` records there are at most
    `MOST_SMALL` each.
    """
    slices, seen = [], known.seen(comparison)
    if not seen.all():
        if seen.any():
            slices.append(Slice("seen", "records of drops that the champion knows", seen))
        slices.append(Slice("unseen", "records of new drops", ~seen))
    drops, tags = _drops(comparison), _tags(comparison)
    for drop in _kept(drops, newest=True):
        mask = comparison.drops == drop
        slices.append(Slice("drop", known.label(drop), mask, drop if seen[mask].all() else None))
    slices += [Slice("tag", f"tag {tag}", comparison.tags[tag]) for tag in _kept(tags, newest=False)]
    return tuple(slices)


def count_unlisted(comparison: Comparison) -> int:
    """Return how many drops and tags `find_slices` leaves out because there are too many small ones."""
    counts = (_drops(comparison).values(), _tags(comparison).values())
    return sum(max(0, sum(count < LEAST_EXACT for count in kind) - MOST_SMALL) for kind in counts)


def _drops(comparison: Comparison) -> dict[int, int]:
    drops, counts = np.unique(comparison.drops, return_counts=True)
    return dict(zip(drops.tolist(), counts.tolist(), strict=True)) if drops.size > 1 else {}


def _tags(comparison: Comparison) -> dict[str, int]:
    counts = {tag: int(mask.sum()) for tag, mask in comparison.tags.items()}
    some = [(tag, count) for tag, count in counts.items() if 0 < count < len(comparison.ids)]
    return dict(sorted(some, key=lambda item: (-item[1], item[0])))


def _kept(counts: Mapping[Name, int], *, newest: bool) -> list[Name]:
    """
    Return the names to list: all with enough records for a test, and at most `MOST_SMALL` others, in their order.

    Of the others the last are kept if `newest`, else the first.
    """
    small = [name for name, count in counts.items() if count < LEAST_EXACT]
    left_out = set(small[:-MOST_SMALL] if newest else small[MOST_SMALL:])
    return [name for name in counts if name not in left_out]


def measure_slices(comparison: Comparison, slices: tuple[Slice, ...], seed: int) -> tuple[SliceResult, ...]:
    """Return the primary metric on each slice in points, with 98 % interval and unadjusted p-value of the gain."""
    results = []
    for part in slices:
        differences = comparison.differences(part.mask)
        candidate, champion = comparison.pairs(part.mask).mean(axis=0) * POINTS
        low, high = statistics.interval(differences, seed)
        results.append(
            SliceResult(
                kind=part.kind,
                label=part.label,
                records=int(part.mask.sum()),
                groups=differences.size,
                candidate=float(candidate),
                champion=float(champion),
                gain=float(differences.mean()) * POINTS,
                interval=(low * POINTS, high * POINTS),
                p_value=statistics.one_sided_p(differences),
            )
        )
    return tuple(results)
