"""Compare turns before a question with the base model's chat template, which may refuse, leave out or change them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.artifacts import Remark
from pipeline.config import RunConfig
from pipeline.models.generation import load_template
from pipeline.models.token_counts import Window
from pipeline.prepare.split import DropRow


class Fitted(NamedTuple):
    """The rows whose turns the template takes, the number of the run's others, and what a person should know."""

    rows: Sequence[DropRow]
    refused: int = 0
    remarks: tuple[Remark, ...] = ()


def fit_template(rows: Sequence[DropRow], config: RunConfig, window: Window) -> Fitted:
    """
    Return the rows that the base model's template can write, and remarks on those that it writes otherwise.

    Without a tokenizer.json, or without the training stack, as in a check elsewhere, all rows are returned. Raises
    `CannotTrain` if the template cannot be used at all.
    """
    if not any(row.turns for row in rows) or not window.counts:
        return Fitted(rows)
    try:
        treatment = load_template(Path(config.base_model), config.train.format).treatment()
    except ModuleNotFoundError:
        return Fitted(rows)
    told = {row for row in rows if row.turns and row.turns[0][0] == "system"}
    answered = {row for row in rows if row.turns and row.turns[-1][0] == "assistant"}
    found = {f"system_{treatment.system}": told, f"answer_{treatment.answer}": answered}
    lost = set().union(*(some for code, some in found.items() if code.endswith("refused")))
    remarks = (
        Remark(code=code.replace(" ", "_"), numbers={"rows": number})
        for code, some in found.items()
        if not code.endswith("written") and (number := sum(not row.elder for row in some))
    )
    refused = sum(not row.elder for row in lost)
    return Fitted([row for row in rows if row not in lost] if lost else rows, refused, tuple(remarks))
