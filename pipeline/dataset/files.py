"""The files that `prepare` freezes and the later steps read."""

import hashlib
from pathlib import Path

from pipeline import durable

NAMES = ("train.jsonl", "dev.jsonl", "heldout.jsonl")


def dataset_hash(folder: Path) -> str:
    """
    Return one hash of the three files: sha256 over a line of name and sha256 for each; a missing one counts as empty.

    Raises `OSError` if one cannot be read.
    """
    return hashlib.sha256("".join(f"{name} {_hash(folder / name)}\n" for name in NAMES).encode()).hexdigest()


def _hash(path: Path) -> str:
    return durable.sha256_file(path) if path.exists() else hashlib.sha256().hexdigest()
