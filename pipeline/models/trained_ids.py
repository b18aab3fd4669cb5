"""The ids of the records that a model was trained on: a file in its folder, so that what it has seen is known later."""

from collections.abc import Container, Iterable
from pathlib import Path

from pipeline import durable

#: In the model's folder; no part of its id, but in its manifest.
NAME = "trained-ids.txt"


def write_trained_ids(folder: Path, ids: Iterable[str]) -> None:
    """Write the ids into a model's folder, sorted, each once, one a line."""
    durable.write_bytes(folder / NAME, "".join(f"{name}\n" for name in sorted(set(ids))).encode())


def trained_ids(folder: Path, among: Container[str] | None = None) -> frozenset[str]:
    """
    Return the ids of the records that the model in `folder` was trained on, of those in `among` if that is given.

    A model without such a file, a base model say, was trained on nothing of ours. Raises `OSError` if it is unreadable.
    """
    try:
        with (folder / NAME).open(encoding="utf-8") as file:
            found = (line.rstrip("\n") for line in file)
            return frozenset(name for name in found if name and (among is None or name in among))
    except FileNotFoundError:
        return frozenset()
