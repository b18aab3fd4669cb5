"""
What a model answered, on disk a batch at a time, so that an attempt that is cut off costs one batch and no more.

A line is a whole batch, `{"batch": <sha256 of what was asked>, "values": [...]}`: after a kill or a power cut a batch
is there with all of its rows or not at all. The next attempt asks in the same batches as an attempt that was never cut
off (in bf16 the composition of a batch can change an answer) and takes those that it finds from here.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

#: Part of every batch's name, to be raised whenever the rows of a kind change: an upgrade may fall into an evaluation.
_LAYOUT = "an answer is text, tokens, ended, seconds: 2"


def batch_id(kind: str, rows: Sequence[Any]) -> str:
    """Return the sha256 that names a batch: its `kind` and what is asked, as JSON values, in their order."""
    return hashlib.sha256(json.dumps([_LAYOUT, kind, *rows]).encode()).hexdigest()


class BatchLog:
    """The batches of one prediction key; one process appends to a file, whatever earlier attempts left is read."""

    def __init__(self, path: Path, earlier: Iterable[Path]) -> None:
        """Append to `path`, made when it is needed; read the files `earlier`, in which a damaged line is missing."""
        self._path = path
        self._fd: int | None = None
        self._known: dict[str, list[Any]] = {}
        for other in earlier:
            self._read(other)

    def find(self, batch: str, rows: int) -> list[Any] | None:
        """Return the values of a batch of `rows` that was computed; `None` if it was not."""
        values = self._known.get(batch)
        return values if values is not None and len(values) == rows else None

    def add(self, batch: str, values: Sequence[Any]) -> None:
        """
        Append a computed batch, durably; its values are JSON values, one for each row. Raises `OSError`.

        What is added last counts: without values, a batch that was there is taken back.
        """
        if self._fd is None:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        line = json.dumps({"batch": batch, "values": values}, allow_nan=False).encode() + b"\n"
        if os.write(self._fd, line) != len(line):
            raise OSError(f"{self._path} could not be written to its end")
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Append no more."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().split(b"\n"):
            try:
                value = json.loads(line)
                batch, values = value["batch"], value["values"]
            except (ValueError, KeyError, TypeError):
                continue
            if isinstance(batch, str) and isinstance(values, list):
                self._known[batch] = values
