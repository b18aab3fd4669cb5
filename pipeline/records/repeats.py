"""What is known of a file before a run: rows that repeat or do not fit, rows that are pinned, the likely metric."""

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from pydantic_core import from_json

from pipeline.metrics.automatic import metric_of
from pipeline.models.prompt import fold
from pipeline.models.token_counts import Window
from pipeline.records.prompt_hash import normalise
from pipeline.records.records import ANY_LENGTH, Record, read_records
from pipeline.words import count

#: Rows that are looked at for repetitions: 28 bytes of memory each.
MOST_ROWS = 1_000_000
#: Answers that tell which metric suits a file.
_MOST_ANSWERS = 200
#: Parts in which rows are compared: the dictionaries of one part are in memory at a time.
_PARTS = 1024
#: Rows of a pinned file that are read together.
_TOGETHER = 1000
#: ASCII in lower case, and a space for all that `str.split` parts words at.
_FOLDED = bytes(ord(" " if chr(code).isspace() else chr(code).lower()) for code in range(128)) + bytes(range(128, 256))
_BLANKS = re.compile(rb"  +")


class Repeats(NamedTuple):
    """How often a file repeats itself, and the lines where it first does; 0 where it does not."""

    rows: int = 0
    """Rows whose prompt and answer an earlier one has, too."""
    first_row: int = 0
    prompts: int = 0
    """Prompts with more than one answer."""
    first_prompt: int = 0
    too_long: int = 0
    """Rows that are longer than `train.max_length` with any tokenizer."""
    first_too_long: int = 0


class RowCounts:
    """Counts the good records of a file in the pass that validates it: give `add` to `validate`."""

    def __init__(self, pinned: Iterable[Path] = (), window: Window | None = None, *, repeats: bool = True) -> None:
        """
        Count records whose prompt is in one of the `pinned` files, too; one that is gone has none.

        Of the first `MOST_ROWS` those are counted that certainly exceed `window`.
        """
        self._window = window
        self._too_long = self._first_too_long = 0
        self._most = MOST_ROWS if repeats else 0
        self._prompts, self._answers, self._lines = array("q"), array("q"), array("Q")
        self._pinned = {key for path in pinned if path.is_file() for key in _keys_in(path)}
        self._first_answers: list[str] = []
        #: Records whose prompt is pinned.
        self.pinned = 0

    def add(self, first: int, lines: bytes) -> None:
        """Count the good records in `lines`; `first` is the number of the first line."""
        rows = from_json(b"[" + lines.strip(b"\n").replace(b"\n", b",") + b"]", cache_strings="keys")
        if len(self._first_answers) < _MOST_ANSWERS:
            self._first_answers += [row["output"] for row in rows]
        rest = max(0, self._most - len(self._lines))
        if self._window is not None:
            for line, row in enumerate(rows[:rest], start=first):
                if self._window.is_exceeded(row["instruction"], row.get("input", ""), row["output"]):
                    self._too_long += 1
                    self._first_too_long = self._first_too_long or line
        if not rest and not self._pinned:
            return
        prompts = _keys(
            [fold(row["instruction"], given) if (given := row.get("input")) else row["instruction"] for row in rows]
        )
        if self._pinned:
            self.pinned += sum(prompt in self._pinned for prompt in prompts)
        self._prompts.extend(prompts[:rest])
        self._answers.extend([hash(row["output"]) for row in rows[:rest]])
        self._lines.extend(range(first, first + len(rows[:rest])))

    @property
    def metric(self) -> str | None:
        """The metric that `evaluate.metric = "auto"` takes for the first answers; `None` if there is no record."""
        return metric_of(self._first_answers[:_MOST_ANSWERS])

    def repeats(self) -> Repeats:
        """
        Return how the first `MOST_ROWS` records repeat each other, by their hashes.

        Prompts are the same as for the split: normalised, instruction and input folded into one text.
        """
        parts = [array("I") for _ in range(_PARTS)]
        for row, prompt in enumerate(self._prompts):
            parts[prompt % _PARTS].append(row)
        again: list[int] = []
        several: dict[int, int] = {}
        for part in parts:
            asked = [self._prompts[row] for row in part]
            if len(set(asked)) == len(asked):
                continue
            known: dict[int, set[int]] = {}
            for row, prompt in zip(part, asked, strict=True):
                answers = known.setdefault(prompt, set())
                if self._answers[row] in answers:
                    again.append(row)
                elif answers:
                    several.setdefault(prompt, row)
                answers.add(self._answers[row])
        first_row = self._lines[min(again)] if again else 0
        first_prompt = self._lines[min(several.values())] if several else 0
        return Repeats(len(again), first_row, len(several), first_prompt, self._too_long, self._first_too_long)


def repeat_lines(file: Path, found: Repeats) -> list[str]:
    """Return a line for each kind of repetition that a person may want to mend before the file is dropped."""
    lines = []
    if found.rows:
        says = "row says" if found.rows == 1 else "rows say"
        lines.append(
            f"{file}:{found.first_row}: warning: {found.rows:,} {says} the same as an earlier one, prompt and answer, "
            "first here: each is trained on once"
        )
    if found.prompts:
        have = count(found.prompts, "prompt has", "prompts have")
        lines.append(
            f"{file}:{found.first_prompt}: warning: {have} more than one answer, first here: all of them are trained "
            "on; if one is wrong, take it out"
        )
    if found.too_long:
        longer = count(found.too_long, "row is", "rows are")
        lines.append(
            f"{file}:{found.first_too_long}: warning: {longer} longer than train.max_length, first here, and will be "
            "left out; counted by characters and words: a run counts tokens, and may leave out more"
        )
    return lines


def likely_metric(path: Path) -> str | None:
    """Return the metric that "auto" takes for a drop's first answers; `None` without records. Raises `OSError`."""
    records = (row for row in read_records(path, ANY_LENGTH) if isinstance(row, Record))
    return metric_of([row.output for row in islice(records, _MOST_ANSWERS)])


def _keys_in(path: Path) -> Iterator[int]:
    records = (row for row in read_records(path, ANY_LENGTH) if isinstance(row, Record))
    while some := [fold(row.instruction, row.input) for row in islice(records, _TOGETHER)]:
        yield from _keys(some)


def _keys(prompts: Sequence[str]) -> list[int]:
    """
    Return 64 bits a prompt that are the same, in this process, for prompts that are the same once normalised.

    All are normalised at once, as bytes where they are ASCII: in a quarter of the time that each alone takes.
    """
    # No good record holds the NUL that parts them.
    whole = "\0".join(prompts)
    if not whole.isascii():
        whole = "\0".join([text if text.isascii() else normalise(text) for text in prompts])
    texts = _BLANKS.sub(b" ", whole.encode().translate(_FOLDED))
    return [hash(text.strip()) for text in texts.split(b"\0")]
