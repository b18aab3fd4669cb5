"""What blocks a win that waits for approval: its model was rolled back from."""

from pathlib import Path
from typing import TYPE_CHECKING

from daemon.champions.history import blocked, forcing
from daemon.state.states import AWAITING, OVERTAKEN, PromotionKind
from pipeline.durable import read_object

if TYPE_CHECKING:
    from collections.abc import Sequence

    from daemon.state.tables import Promotion


def blocker(folder: Path, past: "Sequence[Promotion]") -> str | None:
    """
    Say what stands against the win of the run in `folder`; `None` if a yes is enough.

    `past` are its track's champions. Where its verdict is damaged, nobody knows which model won, and so not whether
    that is blocked.
    """
    model_id = read_object(folder / "decide.json").get("candidate_model_id")
    if not isinstance(model_id, str) or model_id not in blocked(past):
        return None
    rows = [row for row in past if row.kind == PromotionKind.ROLLBACK and row.previous_model_id == model_id]
    by = f", by {rows[-1].approved_by}" if rows[-1].approved_by else ""
    return f"its model is blocked: the track was {rows[-1].reason}{by}"


#: What `decide` begins the sentence of a win with.
_WON = "promoted: "


#: What the outcome of a win is called that was not promoted.
_WORDS = {
    AWAITING: "won, waits for approval (dropforge promote {run})",
    OVERTAKEN: "won, but another champion came first, with which it was not compared",
}


def true_sentence(run: int, outcome: str, sentence: str, against: str | None = None) -> str:
    """
    Return the sentence of a run that ended with `outcome`.

    That of a win that was not promoted says what it waits for, or what is `against` it.
    """
    words = _WORDS.get(outcome)
    if words is None:
        return sentence
    said = words.format(run=run)
    if against is not None:
        said = f"won, but {against} ({forcing(run)} takes it all the same)"
    return f"{said}: {sentence.removeprefix(_WON)}"
