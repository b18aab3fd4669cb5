"""Write the rows of a run's drops to disk, partitioned by prompt hash, so that each partition is sorted in memory."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline import durable
from pipeline.artifacts import Drop
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.metrics.tokens import tokens
from pipeline.models.template import fold
from pipeline.models.token_counts import Window
from pipeline.prepare.near_duplicates import LONG_RUN
from pipeline.records.heldout import hash_id, normalise, split_hash
from pipeline.records.records import ANY_LENGTH, Finding, Record, read_records
from pipeline.records.special_tokens import special_tokens

#: Rows between two checks whether the step is to stop.
CHECK_EVERY = 1000
PARTS = 64


class PartitionRow(NamedTuple):
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


class LeftOut(NamedTuple):
    """Numbers of rows that are in no split, by reason."""

    too_long: int
    """They certainly exceed the window."""
    special_tokens: int
    """They hold special tokens of the base model's tokenizer."""


class Partitions:
    """Rows on disk, partitioned by the first digits of their hash."""

    def __init__(self, folder: Path) -> None:
        """Create the partitions' files in a new folder in `folder`, which `close` removes."""
        self._folder = folder / ".parts"
        self._folder.mkdir()
        self._files = [(self._folder / str(part)).open("w", encoding="utf-8") for part in range(PARTS)]

    def close(self) -> None:
        """Close the partitions' files and remove them with their folder."""
        for file in self._files:
            file.close()
        shutil.rmtree(self._folder)

    def add(self, row: PartitionRow) -> None:
        """Append one row to the partition of its hash."""
        self._files[int(row.hash[:8], 16) * PARTS >> 32].write(json.dumps(row, ensure_ascii=False) + "\n")

    def sorted_parts(self) -> Iterator[list[PartitionRow]]:
        """Yield each partition's rows, in the order of their hash; per prompt pinned rows, then later drops first."""
        for file in self._files:
            file.flush()
            with Path(file.name).open("rb") as lines:
                rows = [PartitionRow(*json.loads(line)) for line in lines]
            rows.sort(key=lambda row: (row.hash, not row.pinned, -row.order, row.number))
            yield rows


def read_drops(attempt: Attempt, partitions: Partitions, window: Window) -> LeftOut:
    """
    Add the rows of the attempt's drops to `partitions`; return how many are left out, by reason.

    Left out are rows that certainly exceed `window`, and rows with special tokens of the base model's tokenizer. Raises
    `CannotTrain` if a drop's file is missing or changed or a line of it is no record, `Interrupted` if stopped.
    """
    special = special_tokens(Path(attempt.config.base_model))
    holds_token = re.compile("|".join(map(re.escape, special))).search if special else None
    total = sum(drop.rows for drop in attempt.spec.drops)
    done = too_long = spelled = 0
    attempt.progress(0, total, phase="reading")
    for order, drop in enumerate(attempt.spec.drops):
        for number, record in enumerate(_records(attempt, drop)):
            texts = (record.instruction, record.input, record.output)
            if window.is_exceeded(*texts):
                too_long += 1
            elif holds_token is not None and any(map(holds_token, texts)):
                spelled += 1
            else:
                prompt, salt = normalise(fold(record.instruction, record.input)), attempt.config.salt
                hashes, pinned = (split_hash(salt, prompt), hash_id(prompt)), drop.role == "heldout"
                units = _units(salt, record)
                partitions.add(PartitionRow(*hashes, pinned, order, number, drop.id, *texts, record.tags, *units))
            done += 1
            if done % CHECK_EVERY == 0:
                attempt.check_stop()
                attempt.progress(done, total)
    return LeftOut(too_long, spelled)


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
