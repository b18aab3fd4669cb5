"""Rows as the step `prepare` leaves them, for tests of the steps behind it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import Dataset
from pipeline.records.heldout import dataset_hash

Row = Mapping[str, Any]


def write_rows(root: Path, train: Sequence[Row], dev: Sequence[Row] = (), *, longest: int = 8) -> Dataset:
    """Write rows into `root`/data; return their dataset, which holds nothing out, with answers of `longest` tokens."""
    folder = root / "data"
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", train), ("dev", dev)):
        lines = (json.dumps({"id": str(number), **row}) + "\n" for number, row in enumerate(rows))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return Dataset(
        folder="data",
        train_rows=len(train),
        dev_rows=len(dev),
        heldout_rows=0,
        heldout_groups=0,
        heldout_pinned=False,
        heldout_version="v",
        dataset_sha256=dataset_hash(folder),
        duplicates=0,
        replaced=0,
        removed_heldout=0,
        metric="exact_match",
        max_new_tokens=longest,
    )
