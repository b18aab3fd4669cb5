"""
Which training rows are too near to a held-out record, and which held-out records are too near to another one.

Compared is what varies: an instruction that more than 1 % of the prompts share does not count, nor does a run of words
or a long answer that more than 1 % of them have. (Nor can copies of one text be told from the form of a task, where
they are more than that.) In the order of their hash, a held-out record joins the held-out set unless it is near to one
that joined before it; whatever else is near to one that joined, leaves, and is noted at each that it is near to: a
model may have been trained on it once. Nothing in here can move a record to another split.

Memory: about 95 bytes a row, 4 a word of a prompt, 24 for each held-out record that a row is near to, and the tables of
a part of the held-out split.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.prepare.near_duplicates.jaccard import LONG_RUN, SHINGLE, Boilerplate, NearTexts
from pipeline.prepare.near_duplicates.ngrams import (
    FrequentHashes,
    Hashes,
    Indices,
    Texts,
    cut,
    join,
    members,
    ngrams,
    shingles,
)
from pipeline.prepare.near_duplicates.signatures import Block, Signatures
from pipeline.prepare.overlaps import RULES, Overlaps, Part

#: What is in more than this share of the prompts, and in more than so many of them, is the task's, not the row's.
COMMON_SHARE = 0.01
COMMON_ROWS = 3
#: A long answer to more prompts than that is a label of the task; to fewer it may be one case, asked in other words.
LABEL_ROWS = 10
_SLICE_WORDS = 1 << 19
Pairs = tuple[tuple[Indices, Indices], tuple[Indices, Indices]]


@dataclass(frozen=True)
class HeldoutTexts:
    """What held-out prompts are compared by, joined or not, by their number."""

    texts: Texts
    common: Boilerplate
    answers: Hashes
    """Long ones that are no label of the task, some of them several times."""
    answered: Indices
    """[answers]: the prompt that each is of."""


@dataclass
class _Heldout:
    """The held-out split, by hash."""

    texts: Texts
    answers: list[list[int]]
    """Of each prompt, the hashes of its long answers."""
    near: npt.NDArray[np.int32]
    """[prompts]: the one that joined and that it is near to; -1 if it joins itself."""
    named: tuple[Hashes, Indices]
    """Long answers that are no label of the task, and the prompt that each is of."""
    owners: dict[int, int] = field(default_factory=dict)
    """Long answer → the prompt that joined with it."""


def find_overlaps(
    signatures: Sequence[Signatures], overlaps: Overlaps, similarity: float, check_stop: Callable[[], None]
) -> HeldoutTexts:
    """
    Note in `overlaps`, which knows the split of every row, which training rows leave and which held-out ones repeat.

    Noted is also each held-out record that such a row is near to, not only the first one that it leaves by. Returned is
    what the held-out prompts were compared by.

    `signatures` are the drops', in their order. `check_stop` is called again and again.
    """
    source = _Source(signatures, overlaps, check_stop)
    source.learn()
    heldout = source.heldout()
    for part in slices(heldout.texts):
        _settle(source, heldout, part, similarity)
    source.mark_answers(heldout)
    overlaps.repeats = heldout.near
    return HeldoutTexts(heldout.texts, source.common, *heldout.named)


class _Source:
    """The drops' rows, block by block, cut down to what varies."""

    def __init__(self, signatures: Sequence[Signatures], overlaps: Overlaps, check_stop: Callable[[], None]) -> None:
        self._signatures = signatures
        self._overlaps = overlaps
        self._check_stop = check_stop
        self._instructions = self._answers = self._labels = np.zeros(0, np.uint64)
        self.common = Boilerplate(self._instructions, self._instructions)

    def blocks(self) -> Iterator[tuple[int, Block]]:
        for drop, signatures in enumerate(self._signatures):
            for block in signatures.blocks():
                self._check_stop()
                yield drop, block

    def learn(self) -> None:
        """Find out what too many prompts have in common."""
        instructions, answers = [], []
        prompts = 0
        for drop, block in self.blocks():
            parts = self.parts(drop, block)
            firsts = block.rows[_is(parts, Part.TRAIN, Part.HELDOUT)]
            prompts += len(firsts)
            instructions.append(firsts["instruction"])
            answers.append(block.rows["answer"][~_is(parts, Part.NONE, Part.REMOVED) & (block.rows["answer"] != 0)])
        most = max(int(COMMON_SHARE * prompts), COMMON_ROWS)
        self._instructions = _frequent(instructions, most)
        self._answers = _frequent(answers, most)
        self._labels = _frequent(answers, max(most, LABEL_ROWS))
        short, long = FrequentHashes(most), FrequentHashes(most)
        for step in ("note", "count"):
            for drop, block in self.blocks():
                texts = self.texts(block, _is(self.parts(drop, block), Part.TRAIN, Part.HELDOUT))
                for frequent, (hashes, rows) in ((short, shingles(texts, SHINGLE)), (long, ngrams(texts, LONG_RUN))):
                    if step == "note":
                        frequent.note(hashes)
                    else:
                        frequent.count(hashes, rows)
        self.common = Boilerplate(short.found(), long.found())

    def parts(self, drop: int, block: Block) -> npt.NDArray[np.uint8]:
        return self._overlaps.parts[drop][block.first : block.first + len(block.rows)]

    def texts(self, block: Block, chosen: npt.NDArray[Any]) -> Texts:
        """Return what varies of the prompts of the chosen rows: instruction and input, or the input alone."""
        rows = block.rows
        lengths = rows["words"].astype(np.int64)
        ends = np.cumsum(lengths)
        skipped = np.where(members(rows["instruction"], self._instructions), rows["instruction_words"], 0)
        return cut(block.words, (ends - lengths + skipped)[chosen], (lengths - skipped)[chosen])

    def heldout(self) -> _Heldout:
        parts, units = [], []
        answers: list[list[int]] = [[] for _ in range(self._overlaps.heldout)]
        named, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for drop, block in self.blocks():
            place = self.parts(drop, block)
            unit = self._overlaps.units[drop][block.first : block.first + len(block.rows)]
            first = place == Part.HELDOUT
            parts.append(self.texts(block, first))
            units.append(unit[first])
            answer = block.rows["answer"]
            long = _is(place, Part.HELDOUT, Part.HELDOUT_MORE) & (answer != 0) & ~members(answer, self._labels)
            named.append(answer[long])
            owners.append(unit[long].astype(np.int64))
            long &= ~members(answer, self._answers)
            for number, value in zip(unit[long].tolist(), answer[long].tolist(), strict=True):
                answers[number].append(value)
        order = np.argsort(np.concatenate(units)) if units else np.zeros(0, np.int64)
        near = np.full(self._overlaps.heldout, -1, np.int32)
        return _Heldout(join(parts).take(order), answers, near, (np.concatenate(named), np.concatenate(owners)))

    def mark(self, near: NearTexts, names: Indices) -> None:
        """Note which prompts are near to a text of `near`, and mark the training rows; `names` are its prompts."""
        for drop, block in self.blocks():
            parts = self.parts(drop, block)
            # A held-out prompt that is near to one that joined repeats it: on whichever side of it by hash, in
            # whichever part, it was settled or will be.
            chosen = np.flatnonzero(_is(parts, Part.TRAIN, Part.HELDOUT))
            pairs = near_pairs(near, self.texts(block, chosen))
            for theirs, ours in pairs:
                self._overlaps.note_near(drop, block.first + chosen[theirs], names[ours])
            rules, units = nearest(len(chosen), pairs)
            hit = (rules > 0) & (parts[chosen] == Part.TRAIN)
            rows = block.first + chosen[hit]
            fresh = self._overlaps.rules[drop][rows] == 0
            self._overlaps.rules[drop][rows[fresh]] = rules[hit][fresh]
            self._overlaps.units[drop][rows[fresh]] = names[units[hit][fresh]]

    def mark_answers(self, heldout: _Heldout) -> None:
        """Note whose answer is a long one of a held-out prompt that joined, and mark the training rows."""
        known = np.array(sorted(heldout.owners), np.uint64)
        for drop, block in self.blocks() if len(known) else ():
            parts = self.parts(drop, block)
            rows = np.flatnonzero((parts != Part.NONE) & members(block.rows["answer"], known))
            units = np.array([heldout.owners[answer] for answer in block.rows["answer"][rows].tolist()], np.int64)
            places = block.first + rows
            self._overlaps.note_near(drop, places, units)
            train = _is(parts[rows], Part.TRAIN, Part.TRAIN_MORE)
            free = train & (self._overlaps.rules[drop][places] == 0)
            self._overlaps.rules[drop][places[free]] = 1 + RULES.index("answer")
            self._overlaps.units[drop][places[free]] = units[free]


def near_pairs(near: NearTexts, texts: Texts) -> Pairs:
    """Return by runs and by shingles who is near to whom: pairs (one of `texts`, one of `near`), sorted."""
    return near.sharing_runs(texts), near.similar(texts)


def nearest(count: int, pairs: Pairs) -> tuple[npt.NDArray[np.uint8], Indices]:
    """Return for each of `count` texts the rule by which it is near to another one, 0 for none, and to which."""
    rules, units = np.zeros(count, np.uint8), np.full(count, -1, np.int64)
    for rule, (theirs, ours) in zip(("ngram", "minhash"), pairs, strict=True):
        # Sorted pairs: the first one of each text is its first one of ours.
        found, firsts = np.unique(theirs, return_index=True)
        fresh = rules[found] == 0
        rules[found[fresh]] = 1 + RULES.index(rule)
        units[found[fresh]] = ours[firsts[fresh]]
    return rules, units


def _settle(source: _Source, heldout: _Heldout, part: slice, similarity: float) -> None:
    """Say of the prompts in `part` who joins, then who is near to them among the later ones and in training."""
    waiting = np.arange(part.start, part.stop)
    waiting = waiting[heldout.near[part] < 0]
    near = NearTexts(heldout.texts.take(waiting), source.common, similarity)
    _join(heldout, waiting, near)
    joined = np.flatnonzero(heldout.near[waiting] < 0)
    if len(joined) < len(waiting):
        near = NearTexts(heldout.texts.take(waiting[joined]), source.common, similarity)
    names = waiting[joined]
    for later in slices(heldout.texts, part.stop):
        numbers = np.arange(later.start, later.stop)
        numbers = numbers[heldout.near[later] < 0]
        rules, units = nearest(len(numbers), near_pairs(near, heldout.texts.take(numbers)))
        heldout.near[numbers[rules > 0]] = names[units[rules > 0]]
    source.mark(near, names)


def _join(heldout: _Heldout, waiting: Indices, near: NearTexts) -> None:
    """Let the prompts join one after another; each that is near to one that did, does not."""
    theirs, ours = near.similar(heldout.texts.take(waiting))
    before = ours < theirs
    theirs, ours = theirs[before], ours[before]
    begins = np.searchsorted(theirs, np.arange(len(waiting) + 1)).tolist()
    order = np.argsort(near.run_rows, kind="stable")
    runs = near.runs[order]
    run_begins = np.searchsorted(near.run_rows[order], np.arange(len(waiting) + 1)).tolist()
    taken: dict[int, int] = {}
    for number, unit in enumerate(waiting.tolist()):
        own = runs[run_begins[number] : run_begins[number + 1]].tolist()
        answers = heldout.answers[unit]
        similar = (int(waiting[other]) for other in ours[begins[number] : begins[number + 1]].tolist())
        rivals = [other for other in similar if heldout.near[other] < 0]
        rivals += [taken[run] for run in own if run in taken]
        rivals += [heldout.owners[answer] for answer in answers if answer in heldout.owners]
        if rivals:
            heldout.near[unit] = min(rivals)
            continue
        taken.update(dict.fromkeys(own, unit))
        heldout.owners.update(dict.fromkeys(answers, unit))


def slices(texts: Texts, start: int = 0) -> Iterator[slice]:
    """Part the texts from `start` on so that each part has a bounded number of words, or one text."""
    while start < len(texts):
        most = texts.starts[start] + _SLICE_WORDS
        stop = max(int(np.searchsorted(texts.starts, most, "right")) - 1, start + 1)
        yield slice(start, stop)
        start = stop


def _frequent(values: list[Hashes], most: int) -> Hashes:
    """Return the hashes that occur more than `most` times, sorted."""
    if not values:
        return np.zeros(0, np.uint64)
    found, counts = np.unique(np.concatenate(values), return_counts=True)
    return found[counts > most]


def _is(parts: npt.NDArray[np.uint8], *wanted: Part) -> npt.NDArray[np.bool_]:
    return np.isin(parts, wanted)
