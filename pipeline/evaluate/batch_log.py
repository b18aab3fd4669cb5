"""
A log of computed batches, so that an interrupted attempt loses one batch at most.

A line is a whole batch, `{"batch": <sha256 of its prompts>, "values": [...]}`: after a kill or a power cut a batch is
logged with all of its rows or not at all. The next attempt forms the same batches as an uninterrupted one (in bf16 the
composition of a batch can change an answer) and reads the logged ones instead of computing them.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

#: Part of every batch's id; increase it when a kind's values change, as an upgrade may happen during an evaluation.
_LAYOUT = "an answer is text, tokens, ended: 3"


def batch_id(kind: str, rows: Sequence[Any]) -> str:
    """Return a batch's id: the sha256 of its `kind` and of `rows`, its prompts as JSON values, in order."""
    return hashlib.sha256(json.dumps([_LAYOUT, kind, *rows]).encode()).hexdigest()


class BatchLog:
    """Reads the batches that earlier attempts logged, and appends new ones; only one process may append to a file."""

    def __init__(self, path: Path, earlier: Iterable[Path]) -> None:
        """Append to `path`, created on first use; read the files `earlier`, skipping damaged lines."""
        self._path = path
        self.known: dict[str, list[Any]] = {}
        """The values of the batches that earlier attempts logged, by id."""
        for line in (line for other in earlier for line in other.read_bytes().split(b"\n")):
            with suppress(ValueError, KeyError, TypeError):
                value = json.loads(line)
                self.known[value["batch"]] = value["values"]

    def add(self, batch: str, values: Sequence[Any]) -> None:
        """
        Append the JSON `values`, one per row, of the batch with this id, durably; `known` does not change.

        Raises `OSError` if the file cannot be written, `ValueError` if a value is not finite.
        """
        line = json.dumps({"batch": batch, "values": values}, allow_nan=False).encode() + b"\n"
        with self._path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fdatasync(file.fileno())
