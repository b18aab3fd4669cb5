"""Rows as the step `prepare` leaves them, for tests of the steps behind it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import Dataset
from pipeline.records.heldout import dataset_hash
from tests.made_artifacts import dataset_of

Row = Mapping[str, Any]


def write_rows(root: Path, train: Sequence[Row], dev: Sequence[Row] = (), *, longest: int = 8) -> Dataset:
    """Write rows into `root`/data; return their dataset, which holds nothing out, with answers of `longest` tokens."""
    folder = root / "data"
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", train), ("dev", dev)):
        lines = (json.dumps({"id": str(number), **row}) + "\n" for number, row in enumerate(rows))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    found = {"folder": "data", "train_rows": len(train), "dev_rows": len(dev), "dataset_sha256": dataset_hash(folder)}
    return dataset_of(0, **found, max_new_tokens=longest)
