"""
Choose the model that a training starts from: the base with all rows, or the champion with the rows new to it.

The champion's folder lists the prompts that it was trained on (`trained-ids.txt`) and, in its manifest, the number of
trainings since the base. With either start, built-in general rows are added as `train.general_rows` says.
"""

import hashlib
import json
import sys
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

from pipeline import durable
from pipeline.artifacts import ModelRef
from pipeline.contract import Attempt
from pipeline.metrics.tokens import shingles, tokens
from pipeline.models.manifest import read_lineage, trained_ids
from pipeline.models.template import fold
from pipeline.records.heldout import NAMES, prompt_id
from pipeline.words import count, listed

GENERAL_ROWS = Path(__file__).with_name("general_rows.jsonl")
#: Most successive trainings from the champion; the next one starts from the base.
_MOST_TRAININGS = 10


class Start(NamedTuple):
    """The model that a training starts from, and the numbers of new, old and replayed rows in train.jsonl."""

    champion: ModelRef | None
    """`None` is the base."""
    from_base: str
    """Why it is the base; empty if the settings say so, or the base is the champion."""
    new: int
    old: int = 0
    """Rows that the champion was trained on; `replayed` of these are left in the file."""
    replayed: int = 0


def choose_start(attempt: Attempt, folder: Path, rows: int) -> Start:
    """
    Choose base or champion to start from; for the champion, remove all but a sample of its old rows from train.jsonl.

    The file is in `folder` and has `rows` rows; the sample has `train.replay` times as many rows as are new, at most
    all old ones. The base is chosen if `train.start` says so, or if the champion is the base, is not known to come from
    this base and drops of this run only, is the tenth training in a row, or knows all rows. Raises `Interrupted` if
    stopped.
    """
    train, champion = attempt.config.train, attempt.spec.champion
    if train.start == "base" or champion.model_id == attempt.config.base_model_id:
        return Start(None, "", rows)
    why = _blocker(attempt, champion)
    if not why:
        attempt.check_stop()
        start = _keep_new_rows(folder / "train.jsonl", champion, attempt.path(champion.path), train.replay)
        if start is not None:
            return start
        why = f"no row is new to generation {champion.generation}"
    sys.stderr.write(f"the training starts from the base: {why}\n")
    return Start(None, why, rows)


def _blocker(attempt: Attempt, champion: ModelRef) -> str:
    """Return why the training cannot start from the champion; empty if it can."""
    name = f"generation {champion.generation}"
    lineage = read_lineage(attempt.path(champion.path))
    if lineage is None or lineage.base_model_id != attempt.config.base_model_id:
        return f"the manifest of {name} does not say that it was made from this base"
    if champion.drops is None:
        return f"it is not known which drops {name} was made from"
    # Withdrawn data must not stay in the new model through the champion. It is not known here whether a missing drop
    # was only held out; if so, this costs one more training from the base.
    gone = sorted({*champion.drops} - {drop.id for drop in attempt.spec.drops})
    if gone:
        drops = f"drop{'s' if len(gone) > 1 else ''} {listed([str(drop) for drop in gone])}"
        return f"{name} was made from {drops}, and this run is not"
    if lineage.trainings >= _MOST_TRAININGS:
        return (
            f"{name} is of {count(lineage.trainings, 'training')} in a row, and every tenth at least is from the base"
        )
    return ""


def _keep_new_rows(path: Path, champion: ModelRef, folder: Path, replay: float) -> Start | None:
    """
    Reduce train.jsonl at `path` to the rows that are new to a champion and a sample of its old rows.

    A row is new if the champion was not trained on its prompt, or if its answers came with a drop that the champion was
    not made from. The sample has `replay` times as many rows as are new, at most all old ones: those with the lowest
    sha256 of model and prompt, so that it is the same whenever the run prepares again, and another one for the next
    champion. Returns `None`, and leaves the file unchanged, if no row is new. Memory: an id per row that the model was
    trained on.
    """
    known, drops = trained_ids(folder), frozenset(champion.drops or ())
    rows, old = 0, []
    for rows, row in enumerate(durable.read_jsonl(path), start=1):
        if row["id"] in known and row["drop"] in drops:
            old.append((hashlib.sha256(f"{champion.model_id} {row['id']}".encode()).digest(), rows))
    new = rows - len(old)
    if not new:
        return None
    replayed = min(len(old), round(replay * new))
    left_out = {number for _, number in sorted(old)[replayed:]}
    aside = path.with_name(f".{path.name}")
    with aside.open("w", encoding="utf-8", newline="\n") as file:
        for number, row in enumerate(durable.read_jsonl(path), start=1):
            if number not in left_out:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    aside.replace(path)
    return Start(champion, "", new, len(old), replayed)


def mix_in_general(folder: Path, rows: int, share: float, similarity: float) -> int:
    """
    Append built-in general rows to train.jsonl in `folder`, which has `rows` rows; return how many were added.

    After that, `share` of its rows are general; if that takes more general rows than there are, they repeat. Prompts in
    the data set's files are not added, nor those with a Jaccard index of at least `similarity` with a scored prompt.
    """
    if not share:
        return 0
    general = {prompt_id(row["instruction"], ""): row for row in durable.read_jsonl(GENERAL_ROWS)}
    runs = {name: shingles(tokens(row["instruction"])) for name, row in general.items()}
    for file in NAMES:
        for row in durable.read_jsonl(folder / file) if (folder / file).exists() else ():
            general.pop(row["id"], None)
            if file == "heldout.jsonl":
                own = shingles(tokens(fold(row["instruction"], row["input"])))
                for name, other in runs.items():
                    if len(own & other) >= similarity * len(own | other):
                        general.pop(name, None)
    mixed = list(islice(cycle(general.items()), round(rows * share / (1 - share))))
    with (folder / "train.jsonl").open("a", encoding="utf-8", newline="\n") as lines:
        lines.writelines(json.dumps({"id": name, "input": "", **row}, ensure_ascii=False) + "\n" for name, row in mixed)
    return len(mixed)
