"""Read and write the ids of the records that a model was trained on, a file in its folder."""

from collections.abc import Container, Iterable
from pathlib import Path

from pipeline import durable

#: Not part of the model id, but listed in the manifest.
NAME = "trained-ids.txt"


def write_trained_ids(folder: Path, ids: Iterable[str]) -> None:
    """Write the ids to a model's folder, sorted and without duplicates, one per line."""
    durable.write_bytes(folder / NAME, "".join(f"{name}\n" for name in sorted(set(ids))).encode())


def trained_ids(folder: Path, among: Container[str] | None = None) -> frozenset[str]:
    """
    Return the ids of the records that the model in `folder` was trained on, limited to those in `among` if given.

    Empty for a model without such a file, as a base model. Raises `OSError` if it cannot be read.
    """
    try:
        with (folder / NAME).open(encoding="utf-8") as file:
            ids = (line.rstrip("\n") for line in file)
            return frozenset(name for name in ids if name and (among is None or name in among))
    except FileNotFoundError:
        return frozenset()
