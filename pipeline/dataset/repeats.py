"""What is known of a file before a run: rows that repeat or do not fit, rows that are pinned, the likely metric."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from pipeline.dataset.prompt_hash import normalise, prompt_id
from pipeline.metrics.automatic import metric_of
from pipeline.model_folder.token_counts import Window
from pipeline.prompt import fold
from pipeline.validation.records import Limits, Record, read_records
from pipeline.wording import count

#: Rows that are looked at: about 200 bytes of memory each.
MOST_ROWS = 1_000_000
#: Answers that tell which metric suits a file.
_MOST_ANSWERS = 200
#: Lines were bounded when the files were taken in.
_LIMITS = Limits(max_line_bytes=1 << 40)


class Repeats(NamedTuple):
    """How often a file repeats itself, and the lines where it first does; 0 where it does not."""

    rows: int = 0
    """Rows whose prompt and answer an earlier one has, too."""
    first_row: int = 0
    prompts: int = 0
    """Prompts with more than one answer."""
    first_prompt: int = 0
    too_long: int = 0
    """Rows that have more tokens than fit, whatever the tokenizer makes of them."""
    first_too_long: int = 0


def find_repeats(path: Path, limits: Limits, window: Window | None = None) -> Repeats:
    """
    Return how the first `MOST_ROWS` good records of a file repeat each other, and which certainly exceed `window`.

    By the hashes of their texts.

    Prompts are the same as for the split: normalised, instruction and input folded into one text. Raises `OSError`.
    """
    seen, prompts, several = set[int](), set[int](), set[int]()
    rows = first_row = first_prompt = too_long = first_too_long = 0
    records = (row for row in read_records(path, limits) if isinstance(row, Record))
    for _number, row in zip(range(MOST_ROWS), records, strict=False):
        if window is not None and window.is_exceeded(row.instruction, row.input, row.output):
            too_long += 1
            first_too_long = first_too_long or row.line
        prompt = normalise(fold(row.instruction, row.input))
        asked, whole = hash(prompt), hash((prompt, row.output))
        if whole in seen:
            rows += 1
            first_row = first_row or row.line
        elif asked in prompts:
            several.add(asked)
            first_prompt = first_prompt or row.line
        seen.add(whole)
        prompts.add(asked)
    return Repeats(rows, first_row, len(several), first_prompt, too_long, first_too_long)


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


def count_pinned(path: Path, pinned: Iterable[Path], limits: Limits = _LIMITS) -> int:
    """
    Return how many records of `path` have the prompt of a record in one of the `pinned` files.

    Memory: a hash a pinned record. A pinned file that is gone has none. `limits` are those of a `path` that was not
    taken in. Raises `OSError`.
    """
    known = {name for one in pinned if one.is_file() for name in _ids(one)}
    return sum(name in known for name in _ids(path, limits)) if known else 0


def likely_metric(path: Path, limits: Limits = _LIMITS) -> str | None:
    """
    Return the metric that `evaluate.metric = "auto"` takes for a file's first answers; `None` if it has no record.

    A run decides by its held-out records, of all drops. `limits` are those of a file that was not taken in. Raises
    `OSError`.
    """
    records = (row for row in read_records(path, limits) if isinstance(row, Record))
    return metric_of([row.output for row in islice(records, _MOST_ANSWERS)])


def _ids(path: Path, limits: Limits = _LIMITS) -> Iterator[str]:
    return (prompt_id(row.instruction, row.input) for row in read_records(path, limits) if isinstance(row, Record))
