"""Group sorted rows by prompt, choose each prompt's answers and split, and the held-out prompts that are scored."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import groupby, islice, takewhile
from typing import Any, Literal, NamedTuple

from pipeline.config import SplitConfig, Unit
from pipeline.models.template import fold
from pipeline.models.token_counts import Window
from pipeline.prepare.drop_rows import DropRow

SplitName = Literal["train", "dev", "heldout"]
#: Most prompts in which the common words, runs, answers and inputs are counted.
SAMPLE = 10_000
#: An input with more than this share of the prompts is no document.
MOST_OF_ONE = 1 / 50
#: Fewer dev rows are too few for a dev loss and go to training.
LEAST_DEV_ROWS = 20


class Prompt(NamedTuple):
    """One prompt, its split and its rows."""

    split: SplitName
    rows: list[DropRow]
    """The latest drop's, each answer once; the first one is scored."""
    drops: tuple[int, ...]
    """The drops since the answers last changed, the earliest first."""
    removed: list[DropRow]
    """Training rows of a pinned prompt."""
    duplicates: int
    replaced: list[DropRow]
    """Rows of earlier drops with other answers, the latest drop's first."""
    unit: str
    """Hash of its group, its document or itself: prompts with the same one are on one side, and count as one."""


def choose_unit(rows: Iterable[DropRow]) -> Unit:
    """
    Return whether a long input is a document, all of whose prompts are on one side of the split.

    It is none, and each prompt is on a side of its own, if one input has more than a fiftieth of the prompts: then it
    belongs to the task, and a few such units would not give the shares that the settings name. Counts at most 10,000
    prompts. `rows` must be sorted as by `read_drops`.
    """
    firsts = (next(same) for _, same in groupby(rows, key=lambda row: row.hash))
    counts = Counter(row.document for row in islice(firsts, SAMPLE))
    most = counts.total() * MOST_OF_ONE
    return "prompt" if any(count > most for document, count in counts.items() if document) else "document"


def prompts(rows: Iterable[DropRow], split: SplitConfig, unit: Unit, *, pinned: bool) -> Iterator[Prompt]:
    """
    Group sorted rows into prompts and yield each with its split and its current answers, in the order of their hash.

    With `pinned` only the prompts of held-out drops are held out. Without, a prompt's split depends on the hash of its
    unit alone, and the rows of held-out drops are not used; they only keep their prompts out of train and dev: else the
    drop's author would choose the evaluation set. A prompt without remaining rows has the split "train". Its unit is
    that of its earliest drop, so that no later one moves it. `rows` must be sorted as by `read_drops`.
    """
    for digits, group in groupby(rows, key=lambda row: row.hash):
        everything = list(group)
        own = [row for row in everything if row.pinned]
        others = everything[len(own) :]
        first = (own if own and pinned else others or own)[-1]
        of = first.group or (first.document if unit == "document" else "") or digits
        chosen: SplitName = "heldout" if own and pinned else _split_of(of, split, pinned=pinned)
        counted, removed = others, []
        if own and (pinned or chosen != "heldout"):
            counted, removed = own if pinned else [], others
        if not counted:
            yield Prompt("train", [], (), removed, 0, [], of)
            continue
        kept, duplicates, replaced = _current(counted)
        yield Prompt(chosen, kept, _since(counted), removed, duplicates, replaced, of)


def _split_of(digits: str, split: SplitConfig, *, pinned: bool) -> SplitName:
    # 52 bits: exact as a float, and always below 1.
    u = int(digits[:13], 16) / 2**52
    if u < split.heldout:
        return "train" if pinned else "heldout"
    return "dev" if u < split.heldout + split.dev else "train"


def _current(rows: list[DropRow]) -> tuple[list[DropRow], int, list[DropRow]]:
    """Return the latest drop's rows of one prompt, each answer once, how many repeat these, and the other rows."""
    latest = rows[0].order
    kept: dict[str, DropRow] = {}
    duplicates, replaced = 0, []
    for row in rows:
        if row.output in kept:
            duplicates += 1
        elif row.order == latest:
            kept[row.output] = row
        else:
            replaced.append(row)
    return list(kept.values()), duplicates, replaced


def _since(rows: list[DropRow]) -> tuple[int, ...]:
    """Return the ids of the drops from the last change of a prompt's answers on, oldest first."""
    answers: dict[int, set[str]] = {}
    for row in rows:
        answers.setdefault(row.order, set()).add(row.output)
    latest = answers[rows[0].order]
    same = takewhile(lambda order: answers[order] == latest, answers)
    names = {row.order: row.drop for row in rows}
    return tuple(names[order] for order in same)[::-1]


class Scored(NamedTuple):
    """A held-out prompt that is scored."""

    prompt: Prompt
    near: list[str]
    """Ids of its near-duplicates in any split."""
    drop: int

    @property
    def tags(self) -> list[str]:
        """All tags of the prompt's rows, each once, sorted."""
        return sorted({tag for row in self.prompt.rows for tag in row.tags})


@dataclass
class Splits:
    """The rows of each split, the scored prompts, and the numbers of rows and prompts that are left out, by reason."""

    window: Window
    most_scored: int
    known_drops: frozenset[int]
    """Those that the champion was trained on."""
    train: list[DropRow] = field(default_factory=list)
    """In the order of the prompts' hash; a row's drop is the first since the prompt's answers changed."""
    dev: list[DropRow] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    rows: int = 0
    heldout_rows: int = 0
    """Rows of held-out prompts, scored or not."""
    heldout_prompts: int = 0
    duplicates: int = 0
    replaced: Counter[tuple[int, int, bool]] = field(default_factory=Counter)
    """Rows by their drop, the drop that replaces them, and whether the prompt is held out."""
    removed_heldout: Counter[int] = field(default_factory=Counter)
    """Training rows whose prompt is pinned, by drop."""
    near_duplicates: int = 0
    """Rows of the training and dev split that are near-duplicates of a held-out record."""
    heldout_duplicates: int = 0
    """Held-out prompts that are near-duplicates of another one."""
    seen_by_champion: int = 0
    """Held-out prompts that are not scored only because the champion was trained on them or on near-duplicates."""
    longest_answer: int = 0
    """Tokens of the longest answer of the scored prompts, with its end token."""
    too_long: int = 0
    """Rows of prompts that are not scored only because they exceed the window with their answers."""

    def add(self, prompt: Prompt, kept: Sequence[DropRow]) -> None:
        """Add `kept`, a train or dev prompt's rows that are no near-duplicates, to its split; count all its rows."""
        self._count(prompt)
        self.near_duplicates += len(prompt.rows) - len(kept)
        split = self.train if prompt.split == "train" else self.dev
        split += [row._replace(drop=prompt.drops[0]) for row in kept]

    def hold_out(self, prompt: Prompt, near: AbstractSet[str] | None, trained: AbstractSet[str]) -> None:
        """
        Count a held-out prompt and, if it is to be scored, add it to `scored`.

        `near` holds the ids of its near-duplicates, or is `None` if it repeats another held-out prompt, `trained` those
        of prompts that the champion was trained on. It is scored if `near` is a set, fewer than `most_scored` are, none
        of its near-duplicates and not it itself are in `trained`, and it fits into the window with its longest answer.
        """
        self._count(prompt)
        rows = prompt.rows
        self.heldout_prompts += 1
        self.heldout_rows += len(rows)
        if near is None:
            self.heldout_duplicates += 1
        elif len(self.scored) >= self.most_scored:
            return
        elif not trained.isdisjoint([rows[0].id, *near]):
            self.seen_by_champion += 1
        elif self._fits(rows):
            # A restored drop may precede drops with the same answers that the champion was trained on.
            drop = next((drop for drop in prompt.drops if drop in self.known_drops), prompt.drops[0])
            self.scored.append(Scored(prompt, sorted(near - {rows[0].id}), drop))

    def _count(self, prompt: Prompt) -> None:
        self.rows += len(prompt.rows) + len(prompt.removed) + prompt.duplicates + len(prompt.replaced)
        self.duplicates += prompt.duplicates
        held_out = prompt.split == "heldout"
        self.replaced.update((row.drop, prompt.drops[0], held_out) for row in prompt.replaced)
        self.removed_heldout.update(row.drop for row in prompt.removed)

    def _fits(self, rows: list[DropRow]) -> bool:
        """Return whether a prompt fits into the window with its longest answer; count its rows as too long if not."""
        answer = max(self.window.count(row.output) for row in rows) + 1
        asked = self.window.count(fold(rows[0].instruction, rows[0].input)) if self.window.counts else 0
        if self.window.counts and asked + answer > self.window.tokens:
            self.too_long += len(rows)
            return False
        self.longest_answer = max(self.longest_answer, answer)
        return True


def heldout_line(scored: Scored, group: str) -> dict[str, Any]:
    """Return a scored prompt's line of heldout.jsonl, with its references and the name of its group."""
    first, references = scored.prompt.rows[0], [row.output for row in scored.prompt.rows]
    more = {"pinned": first.pinned, "tags": scored.tags, "near": scored.near, "group": group}
    return row_line(first, references=references, drop=scored.drop, **more)


def row_line(row: DropRow, **more: Any) -> dict[str, Any]:
    """Return a row as a line of JSON, with the fields in `more` added."""
    return {"id": row.id, "instruction": row.instruction, "input": row.input, "output": row.output, **more}
