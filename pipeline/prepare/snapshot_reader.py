"""Read the drops of a run, row by row, into partitions."""

import re
from pathlib import Path

from pipeline import durable
from pipeline.artifacts import Drop
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.models.prompt import fold
from pipeline.models.token_counts import Window
from pipeline.prepare.partitions import PartitionRow, Partitions
from pipeline.records.prompt_hash import hash_id, hash_place, normalise
from pipeline.records.records import Finding, Limits, Record, read_records
from pipeline.records.special_tokens import special_tokens

CHECK_EVERY = 1000


#: The intake bounded the lines already, perhaps by another setting than today's.
_LIMITS = Limits(max_line_bytes=1 << 40)


class SnapshotReader:
    """Partition the rows of the drops."""

    def __init__(self, attempt: Attempt, partitions: Partitions, window: Window) -> None:
        """Read into `partitions` what may fit into `window`."""
        self._window = window
        self._attempt = attempt
        self._partitions = partitions
        tokens = special_tokens(Path(attempt.config.base_model)) if attempt.config.special_tokens == "reject" else ()
        self._holds = re.compile("|".join(map(re.escape, tokens))).search if tokens else None
        self._done = 0
        self._total = sum(drop.rows for drop in attempt.spec.drops)
        self.spelled = 0
        """Rows that hold special tokens and stay out of every split."""
        self.too_long = 0
        """Rows that certainly do not fit into the window and stay out of every split."""
        attempt.progress(0, self._total, phase="reading")

    def read(self, order: int, drop: Drop) -> None:
        """Read one drop, the `order`th of the run. Raises `StepFailed` if its file is not what it was."""
        attempt = self._attempt
        path = attempt.path(drop.path)
        _check_whole(attempt, path, drop)
        for number, record in enumerate(read_records(path, _LIMITS)):
            if isinstance(record, Finding):
                message = f"drop {drop.id} ({drop.name}), line {record.line}: {record.message}"
                raise CannotTrain(message, f"take it out: dropforge drops withdraw {drop.id} --reason 'bad row'")
            self._take(record, drop, order, number)

    def _take(self, record: Record, drop: Drop, order: int, number: int) -> None:
        texts = (record.instruction, record.input, record.output)
        if self._window.is_exceeded(*texts):
            self.too_long += 1
        elif self._holds is not None and any(map(self._holds, texts)):
            self.spelled += 1
        else:
            self._partitions.add(_partition_row(self._attempt.config.salt, record, drop, (order, number)))
        self._done += 1
        if self._done % CHECK_EVERY == 0:
            self._attempt.check_stop()
            self._attempt.progress(self._done, self._total)


def _check_whole(attempt: Attempt, path: Path, drop: Drop) -> None:
    attempt.check_stop()
    hint = f"drop the file again, or take it out: dropforge drops withdraw {drop.id} --reason damaged"
    if not path.is_file():
        raise CannotTrain(f"drop {drop.id} ({drop.name}) is gone from the store: {drop.path}", hint)
    if durable.sha256_file(path) != drop.sha256:
        message = f"drop {drop.id} ({drop.name}) is damaged: its bytes no longer have the hash that they came with"
        raise CannotTrain(message, hint)


def _partition_row(salt: str, record: Record, drop: Drop, place: tuple[int, int]) -> PartitionRow:
    prompt = normalise(fold(record.instruction, record.input))
    return PartitionRow(
        place=hash_place(salt, prompt),
        id=hash_id(prompt),
        pinned=drop.role == "heldout",
        order=place[0],
        number=place[1],
        drop=drop.id,
        instruction=record.instruction,
        input=record.input,
        output=record.output,
        tags=record.tags,
    )
