"""Compare turns before a question with the base model's chat template, which may refuse, leave out or change them."""

from pathlib import Path

from pipeline.artifacts import Remark
from pipeline.config import RunConfig
from pipeline.models.generation import load_template
from pipeline.models.token_counts import Window
from pipeline.prepare.split import DropRows


def fit_template(read: DropRows, config: RunConfig, window: Window) -> DropRows:
    """
    Return the rows without those that the base model's template refuses, and remarks on what it writes otherwise.

    Without a tokenizer.json, or without the training stack, as in a check elsewhere, all rows are returned. Raises
    `CannotTrain` if the template cannot be used at all.
    """
    rows = [row for row in read.rows if row.turns]
    if not rows or not window.counts:
        return read
    try:
        treatment = load_template(Path(config.base_model), config.train.format).treatment()
    except ModuleNotFoundError:
        return read
    told = {row for row in rows if row.turns[0][0] == "system"}
    answered = {row for row in rows if row.turns[-1][0] == "assistant"}
    found = {f"system_{treatment.system}": told, f"answer_{treatment.answer}": answered}
    lost = set().union(*(some for code, some in found.items() if code.endswith("refused")))
    remarks = (
        Remark(code=code.replace(" ", "_"), numbers={"rows": number})
        for code, some in found.items()
        if not code.endswith("written") and (number := sum(not row.elder for row in some))
    )
    kept = [row for row in read.rows if row not in lost] if lost else read.rows
    return read._replace(rows=kept, refused=sum(not row.elder for row in lost), remarks=tuple(remarks))
