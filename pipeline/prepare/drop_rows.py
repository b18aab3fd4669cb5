"""Read the rows of a run's drops, in the order of their prompts' hash."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline import durable
from pipeline.artifacts import Drop
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.metrics.tokens import tokens
from pipeline.models.special_tokens import special_tokens
from pipeline.models.template import fold
from pipeline.models.token_counts import Window
from pipeline.prepare.near_duplicates import LONG_RUN
from pipeline.records.heldout import hash_id, normalise, split_hash
from pipeline.records.records import ANY_LENGTH, Finding, Record, read_records

#: Rows between two checks whether the step is to stop.
CHECK_EVERY = 1000
#: Rows of which the tokens are counted, to estimate how many exceed the window.
_SAMPLE = 1000
#: Longer texts are counted by their beginning.
_COUNTED_CHARACTERS = 20_000


class DropRow(NamedTuple):
    """One record that is not yet assigned to a split."""

    hash: str
    """Of salt and prompt, hexadecimal."""
    id: str
    pinned: bool
    order: int
    """Number of its drop in the snapshot: a later drop's answers replace an earlier one's."""
    number: int
    """Its number among the drop's records, from 0."""
    drop: int
    instruction: str
    input: str
    output: str
    tags: tuple[str, ...]
    group: str = ""
    """Hash of salt and the record's `group`; empty without one."""
    document: str = ""
    """Hash of salt and input, if that has at least 13 words; else empty."""


class DropRows(NamedTuple):
    """The rows of all drops, and the numbers of those that are in no split, by reason."""

    rows: list[DropRow]
    """Sorted by their hash; per prompt pinned rows are first, then those of later drops."""
    too_long: int
    """Rows that certainly exceed the window."""
    special_tokens: int
    """Rows with special tokens of the base model's tokenizer."""
    lengths: list[int]
    """Tokens of up to 1,000 rows, left out or not; empty without a tokenizer.json."""


def read_drops(attempt: Attempt, window: Window) -> DropRows:
    """
    Read the rows of the attempt's drops.

    Raises `CannotTrain` if a drop's file is missing or changed or a line of it is no record, `Interrupted` if stopped.
    """
    special = special_tokens(Path(attempt.config.base_model))
    holds_token = re.compile("|".join(map(re.escape, special))).search if special else None
    total = sum(drop.rows for drop in attempt.spec.drops)
    stride = max(1, math.ceil(total / _SAMPLE))
    rows: list[DropRow] = []
    lengths: list[int] = []
    done = too_long = spelled = 0
    attempt.progress(0, total, phase="reading")
    for order, drop in enumerate(attempt.spec.drops):
        for number, record in enumerate(_records(attempt, drop)):
            texts, prompt = (record.instruction, record.input, record.output), fold(record.instruction, record.input)
            if done % stride == 0 and window.counts:
                lengths.append(_length(f"{prompt}\n{record.output}", window))
            if window.is_exceeded(*texts):
                too_long += 1
            elif holds_token is not None and any(map(holds_token, texts)):
                spelled += 1
            else:
                prompt, salt = normalise(prompt), attempt.config.salt
                hashes, pinned = (split_hash(salt, prompt), hash_id(prompt)), drop.role == "heldout"
                units = _units(salt, record)
                rows.append(DropRow(*hashes, pinned, order, number, drop.id, *texts, record.tags, *units))
            done += 1
            if done % CHECK_EVERY == 0:
                attempt.check_stop()
                attempt.progress(done, total)
    rows.sort(key=lambda row: (row.hash, not row.pinned, -row.order, row.number))
    return DropRows(rows, too_long, spelled, lengths)


def _length(text: str, window: Window) -> int:
    """Return about how many tokens a text has; of one that certainly fits, its bytes."""
    octets = len(text.encode())
    if octets <= window.tokens:
        return octets
    beginning = text[:_COUNTED_CHARACTERS]
    return round(window.count(beginning) * len(text) / len(beginning))


def _units(salt: str, record: Record) -> tuple[str, str]:
    """
    Return the hashes of a record's group and of its document, empty strings where it has none.

    An input is a document from 13 words on: a shorter one (a label, a name, "noinput") has no run of words for which
    the rows that share it are left out of training.
    """
    words = tokens(record.input) if len(record.input) >= LONG_RUN else []
    group = split_hash(salt, "group", record.group) if record.group.strip() else ""
    return group, split_hash(salt, "input", " ".join(words)) if len(words) >= LONG_RUN else ""


def _records(attempt: Attempt, drop: Drop) -> Iterator[Record]:
    attempt.check_stop()
    path, withdraw = attempt.path(drop.path), f"dropforge drops withdraw {drop.id} --reason"
    hint = f"drop the file again, or take it out: {withdraw} damaged"
    if not path.is_file():
        raise CannotTrain(f"drop {drop.id} ({drop.name}) is gone from the store: {drop.path}", hint)
    if durable.sha256_file(path) != drop.sha256:
        raise CannotTrain(f"drop {drop.id} ({drop.name}) is damaged: its sha256 is not the recorded one", hint)
    for record in read_records(path, ANY_LENGTH):
        if isinstance(record, Finding):
            message = f"drop {drop.id} ({drop.name}), line {record.line}: {record.message}"
            raise CannotTrain(message, f"take it out: {withdraw} 'bad row'")
        yield record
