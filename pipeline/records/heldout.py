"""Read the held-out records that `prepare` wrote, and hash its files."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from pipeline import durable
from pipeline.artifacts import Frozen
from pipeline.errors import StepFailed
from pipeline.models.prompt import fold

#: What `prepare` freezes, and `dataset_hash` is of.
NAMES = ("train.jsonl", "dev.jsonl", "heldout.jsonl")


class HeldoutRecord(Frozen):
    """A prompt with its right answers."""

    id: str
    instruction: str
    input: str
    output: str
    """The answer whose likelihood is measured."""
    references: tuple[str, ...]
    drop: int
    pinned: bool
    tags: tuple[str, ...]
    near: tuple[str, ...]
    """Ids of its near-duplicates: training prompts, which are left out, and held-out ones, which are not scored."""
    group: str
    """The lowest id of the scored records that count as one with it; its own if there are no others."""

    @property
    def content(self) -> str:
        """The user message."""
        return fold(self.instruction, self.input)

    def is_known(self, trained: frozenset[str]) -> bool:
        """Return whether a model that was trained on the records with these ids knows this one or a near-duplicate."""
        return self.id in trained or not trained.isdisjoint(self.near)


def version_of(ids: Iterable[str]) -> str:
    """Return one hash of the records with these ids, whatever their order."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


def read_heldout(path: Path) -> list[HeldoutRecord]:
    """Return the records in `path`. Raises `StepFailed` if there are none."""
    records = [HeldoutRecord.model_validate(row) for row in durable.read_jsonl(path)]
    if not records:
        raise StepFailed(
            "there are no held-out records to evaluate on",
            "drop more rows, or a held-out set of your own into the track's heldout folder",
        )
    return records


def dataset_hash(folder: Path) -> str:
    """
    Return one hash of the three files: sha256 over a line of name and sha256 for each; a missing one counts as empty.

    Raises `OSError` if one cannot be read.
    """
    return hashlib.sha256("".join(f"{name} {_hash(folder / name)}\n" for name in NAMES).encode()).hexdigest()


def _hash(path: Path) -> str:
    return durable.sha256_file(path) if path.exists() else hashlib.sha256().hexdigest()
