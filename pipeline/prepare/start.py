"""
Choose the model that a training starts from: the base with all rows, or the champion with the rows new to it.

The champion's folder lists the prompts that it was trained on (`trained-ids.txt`) and, in its manifest, the number of
trainings since the base. With either start, built-in general rows are added as `train.general_rows` says.
"""

import hashlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

from pipeline import durable
from pipeline.artifacts import ModelRef, Remark
from pipeline.config import RunConfig
from pipeline.contract import Attempt
from pipeline.data_words import remark_words
from pipeline.models.adapter import try_adapter
from pipeline.models.manifest import read_lineage, trained_ids
from pipeline.models.tokenizer_files import Window
from pipeline.prepare.decontaminate import Splits
from pipeline.prepare.split import DropRow, Prompt
from pipeline.records.heldout import prompt_id

GENERAL_ROWS = Path(__file__).with_name("general_rows.jsonl")
_NO_DROP = DropRow("", "", pinned=False, order=0, number=0, drop=0, instruction="", input="", output="", tags=())
#: Most successive trainings from the champion; the next one starts from the base.
_MOST_TRAININGS = 10


class Start(NamedTuple):
    """The model that a training starts from, and the rows that it is trained on."""

    rows: list[DropRow]
    champion: ModelRef | None = None
    """`None` is the base."""
    from_base: Remark | None = None
    """Why it is the base; `None` if the settings say so, or the base is the champion."""
    old: int = 0
    """Rows that the champion was trained on; `replayed` of these are among the `rows`."""
    replayed: int = 0


def try_base(config: RunConfig, window: Window) -> None:
    """
    Raise `CannotTrain` if the base model cannot be trained with the settings, before hours of work; read no weights.

    Nothing is tried without a tokenizer.json or the training stack.
    """
    if window.counts:
        with suppress(ModuleNotFoundError):
            try_adapter(Path(config.base_model), config.train)


def choose_start(attempt: Attempt, rows: list[DropRow]) -> Start:
    """
    Choose base or champion to start from; for the champion, with all new `rows` and only a sample of the old ones.

    The sample has `train.replay` times as many rows as are new, at most all old ones. The base is chosen if
    `train.start` says so, or if the champion is the base, is not known to come from this base and drops of this run
    only, is the tenth training in a row, or knows all rows; all but the first two reasons go to standard error, too.
    Raises `Interrupted` if stopped.
    """
    train, champion = attempt.config.train, attempt.spec.champion
    if train.start == "base" or champion.model_id == attempt.config.base_model_id:
        return Start(rows)
    why = _blocker(attempt, champion)
    if why is None:
        attempt.check_stop()
        start = _new_rows(attempt, rows)
        if start is not None:
            return start
        why = Remark(code="nothing_new", numbers={"generation": champion.generation})
    sys.stderr.write(f"the training starts from the base: {remark_words(why)}\n")
    return Start(rows, from_base=why)


def _blocker(attempt: Attempt, champion: ModelRef) -> Remark | None:
    """Return why the training cannot start from the champion, or `None`."""
    numbers: dict[str, int | float | str] = {"generation": champion.generation}
    lineage = read_lineage(attempt.path(champion.path))
    if lineage is None or lineage.base_model_id != attempt.config.base_model_id:
        return Remark(code="other_base", numbers=numbers)
    if champion.drops is None:
        return Remark(code="unknown_drops", numbers=numbers)
    # Withdrawn data must not stay in the new model through the champion. It is not known here whether a missing drop
    # was only held out; if so, this costs one more training from the base.
    gone = sorted({*champion.drops} - {drop.id for drop in attempt.spec.drops})
    if gone:
        return Remark(code="drops_gone", numbers={**numbers, "drops": ", ".join(map(str, gone))})
    if lineage.trainings >= _MOST_TRAININGS:
        return Remark(code="ten_trainings", numbers={**numbers, "trainings": lineage.trainings})
    return None


def _new_rows(attempt: Attempt, rows: list[DropRow]) -> Start | None:
    """
    Return the start from a champion: the rows that are new to it and a sample of its old rows; `None` if none is new.

    They are in the order of `rows`. A row is new if the champion was not trained on its prompt, or if its answers came
    with a drop that the champion was not made from, or that was renewed. The sample has `train.replay` times as many
    rows as are new, at most all old ones: those with the lowest sha256 of model and prompt, so that it is the same
    whenever the run prepares again, and another one for the next champion.
    """
    champion = attempt.spec.champion
    known, drops = trained_ids(attempt.path(champion.path)), {*(champion.drops or ())}.difference(attempt.spec.renewed)
    old = [row for row in rows if row.id in known and row.drop in drops]
    new = len(rows) - len(old)
    if not new:
        return None
    old.sort(key=lambda row: hashlib.sha256(f"{champion.model_id} {row.id}".encode()).digest())
    replayed = min(len(old), round(attempt.config.train.replay * new))
    left_out = set(old[replayed:])
    return Start([row for row in rows if row not in left_out], champion, None, len(old), replayed)


def general_rows(share: float, rows: Sequence[DropRow], splits: Splits) -> list[DropRow]:
    """
    Return as many built-in general rows as make up `share` of the training rows; `rows` are the others.

    If that takes more general rows than there are, they repeat. Prompts of `rows` and of dev rows are left out, and
    near-duplicates of held-out records, which are noted in `HeldOut.near`. Empty if none is left or `share` is 0.
    """
    if not share:
        return []
    taken = {row.id for row in (*rows, *splits.dev)}
    built_in = (
        _NO_DROP._replace(id=prompt_id(row["instruction"], ""), **row) for row in durable.read_jsonl(GENERAL_ROWS)
    )
    general = [
        row for row in built_in if row.id not in taken and not splits.heldout.compare(Prompt("train", "", [], [row]))
    ]
    return list(islice(cycle(general), round(len(rows) * share / (1 - share))))
