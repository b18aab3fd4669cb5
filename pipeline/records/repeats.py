"""Count, before a run, a file's repeated, too long and pinned rows, and choose the likely metric."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count as numbers
from itertools import islice
from pathlib import Path

from pydantic_core import from_json

from pipeline.metrics.automatic import metric_of
from pipeline.models.prompt import fold
from pipeline.models.token_counts import Window
from pipeline.records.heldout import normalise
from pipeline.records.records import ANY_LENGTH, Record, read_records
from pipeline.words import count

#: Most rows that are compared; each takes about 100 bytes of memory.
MOST_ROWS = 1_000_000
#: Most answers by which the metric is chosen.
_MOST_ANSWERS = 200
#: Rows of a pinned file that are hashed together.
_TOGETHER = 1000
#: Translates ASCII to lower case, and every blank of `str.split` to a space.
_FOLDED = bytes(ord(" " if chr(code).isspace() else chr(code).lower()) for code in range(128)) + bytes(range(128, 256))
_BLANKS = re.compile(rb"  +")


@dataclass
class Repeats:
    """Numbers of repeated and of too long rows, each with the line of the first; 0 if there is none."""

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
    """Counters of a file's good records, filled while it is validated: pass `add` to `validate`."""

    def __init__(self, pinned: Iterable[Path] = (), window: Window | None = None, *, repeats: bool = True) -> None:
        """
        Create empty counts; prompts in the files `pinned` count as pinned, and files that are missing are ignored.

        The first `MOST_ROWS` records (with `repeats`) are compared, by the hashes of their texts, and counted as too
        long if they certainly exceed `window`. Prompts are compared as in the split: normalised, instruction and input
        folded into one text.
        """
        self._window = window
        self._most = MOST_ROWS if repeats else 0
        self._pinned = {key for path in pinned if path.is_file() for key in _keys_in(path)}
        self._first_answers: list[str] = []
        self._answers: dict[int, int] = {}
        """The first answer to each prompt."""
        self._more_answers: dict[int, set[int]] = {}
        self.repeats = Repeats()
        self.pinned = 0
        """Records whose prompt is pinned."""

    def add(self, first: int, lines: bytes) -> None:
        """Count the good records in `lines`, which are JSON Lines; `first` is the number of the first line."""
        rows = from_json(b"[" + lines.strip(b"\n").replace(b"\n", b",") + b"]", cache_strings="keys")
        if len(self._first_answers) < _MOST_ANSWERS:
            self._first_answers += [row["output"] for row in rows]
        compared = rows[: self._most]
        self._most -= len(compared)
        found = self.repeats
        if self._window is not None:
            for line, row in enumerate(compared, start=first):
                if self._window.is_exceeded(row["instruction"], row.get("input", ""), row["output"]):
                    found.too_long += 1
                    found.first_too_long = found.first_too_long or line
        if not compared and not self._pinned:
            return
        prompts = _keys(
            [fold(row["instruction"], given) if (given := row.get("input")) else row["instruction"] for row in rows]
        )
        if self._pinned:
            self.pinned += sum(prompt in self._pinned for prompt in prompts)
        self._compare(first, prompts, compared)

    @property
    def metric(self) -> str | None:
        """The metric that `evaluate.metric = "auto"` takes for the first answers; `None` if there is no record."""
        return metric_of(self._first_answers[:_MOST_ANSWERS])

    def _compare(self, first: int, prompts: Sequence[int], rows: Sequence[Mapping[str, str]]) -> None:
        found = self.repeats
        for line, prompt, row in zip(numbers(first), prompts, rows, strict=False):
            answer = hash(row["output"])
            if prompt not in self._answers:
                self._answers[prompt] = answer
            elif answer == self._answers[prompt] or answer in self._more_answers.get(prompt, ()):
                found.rows += 1
                found.first_row = found.first_row or line
            else:
                if prompt not in self._more_answers:
                    found.prompts += 1
                    found.first_prompt = found.first_prompt or line
                self._more_answers.setdefault(prompt, set()).add(answer)


def repeat_lines(file: Path, found: Repeats) -> list[str]:
    """Return a warning line each for repeated rows, prompts with several answers, and too long rows, if any."""
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
    """Return the metric that "auto" chooses by a drop's first answers; `None` without records. Raises `OSError`."""
    records = (row for row in read_records(path, ANY_LENGTH) if isinstance(row, Record))
    return metric_of([row.output for row in islice(records, _MOST_ANSWERS)])


def _keys_in(path: Path) -> Iterator[int]:
    records = (row for row in read_records(path, ANY_LENGTH) if isinstance(row, Record))
    while some := [fold(row.instruction, row.input) for row in islice(records, _TOGETHER)]:
        yield from _keys(some)


def _keys(prompts: Sequence[str]) -> list[int]:
    """
    Return a 64-bit hash per prompt, equal for prompts that are equal once normalised; valid in this process only.

    All prompts are normalised together, as bytes if they are ASCII, which takes a quarter of the time of one by one.
    """
    # No good record holds the separator NUL.
    whole = "\0".join(prompts)
    if not whole.isascii():
        whole = "\0".join([text if text.isascii() else normalise(text) for text in prompts])
    texts = _BLANKS.sub(b" ", whole.encode().translate(_FOLDED))
    return [hash(text.strip()) for text in texts.split(b"\0")]
