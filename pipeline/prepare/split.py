"""Group sorted rows by prompt, and choose each prompt's answers and split."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby, islice, takewhile
from typing import Any, Literal, NamedTuple

from pipeline.config import SplitConfig, Unit
from pipeline.prepare.drop_rows import DropRow

SplitName = Literal["train", "dev", "heldout"]
#: Most prompts in which the common words, runs, answers and inputs are counted.
SAMPLE = 10_000
#: An input with more than this share of the prompts is no document.
MOST_OF_ONE = 1 / 50


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


def group_prompts(rows: Iterable[DropRow], split: SplitConfig, unit: Unit, *, pinned: bool) -> Iterator[Prompt]:
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


def row_line(row: DropRow, **more: Any) -> dict[str, Any]:
    """Return a row as a line of JSON, with the fields in `more` added."""
    return {"id": row.id, "instruction": row.instruction, "input": row.input, "output": row.output, **more}
