"""How many rows of a file ask what pinned records ask: known before a run looks at them, without the training stack."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.dataset.prompt_hash import prompt_id
from pipeline.validation.records import Limits, Record, read_records

#: Lines were bounded when the files were taken in.
_LIMITS = Limits(max_line_bytes=1 << 40)


def count_pinned(path: Path, pinned: Iterable[Path]) -> int:
    """
    Return how many records of `path` have the prompt of a record in one of the `pinned` files.

    Memory: a hash a pinned record. A pinned file that is gone has none. Raises `OSError`.
    """
    known = {name for one in pinned if one.is_file() for name in _ids(one)}
    return sum(name in known for name in _ids(path)) if known else 0


def _ids(path: Path) -> Iterator[str]:
    return (prompt_id(row.instruction, row.input) for row in read_records(path, _LIMITS) if isinstance(row, Record))
