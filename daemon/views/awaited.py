"""What has become of a run or a drop that somebody waits for: a verdict, or how far it is."""

from typing import TYPE_CHECKING, Literal

from daemon.state.questions import GAVE_BACK
from daemon.state.states import AWAITING, DropState, RunState
from daemon.views.drop_lineage import DropView
from daemon.views.overview import RunView
from pipeline.artifacts import Frozen

if TYPE_CHECKING:
    from daemon.views.overview import Overview

_BY_STATE: dict[str, Literal["failed", "cancelled"]] = {
    RunState.FAILED: "failed",
    RunState.CRASHED: "failed",
    RunState.CANCELLED: "cancelled",
}
_BY_DROP: dict[str, Literal["rejected", "cancelled", "refused"]] = {
    DropState.REJECTED: "rejected",
    DropState.WITHDRAWN: "cancelled",
    DropState.SUSPENDED: "refused",
}
_BY_OUTCOME: dict[str, Literal["promoted", "insufficient_evidence"]] = {
    "promoted": "promoted",
    "insufficient_evidence": "insufficient_evidence",
}


class Settled(Frozen):
    """How something ended that was waited for."""

    verdict: Literal["promoted", "refused", "insufficient_evidence", "failed", "cancelled", "rejected"]
    """`refused`: by the gate, or a win that another champion came before or whose model is blocked."""
    sentence: str
    gain: float | None = None
    """In points of the primary metric; `None` if nothing was compared."""
    run: int | None = None
    drop: int | None = None


def run_awaited(overview: "Overview", run_id: int) -> Settled | RunView:
    """Return how a run ended, or its progress; a win that waits for approval has not ended. Raises `NotThere`."""
    run = overview.run(run_id)
    if run.state in _BY_STATE:
        words = f"run {run.id} {run.state}" if run.state != RunState.CANCELLED else f"run {run.id} was cancelled"
        return Settled(verdict=_BY_STATE[run.state], sentence=": ".join(filter(None, (words, run.error))), run=run.id)
    if run.state != RunState.SUCCEEDED or run.outcome == AWAITING:
        return run
    return Settled(
        verdict=_BY_OUTCOME.get(run.outcome or "", "refused"), sentence=run.sentence or "", gain=run.gain, run=run.id
    )


def drop_awaited(overview: "Overview", drop_id: int) -> Settled | RunView | DropView:
    """
    Return what the first run that sees a drop came to, or how far drop or run are.

    A drop that repeats another one is waited for as that; a run that failed or was cancelled has given its drops back.
    Raises `NotThere`.
    """
    drop = overview.drop(drop_id)
    if drop.duplicate_of is not None:
        return drop_awaited(overview, drop.duplicate_of)
    if drop.first_run is not None:
        return run_awaited(overview, drop.first_run)
    words = ": ".join(filter(None, (f"drop {drop.id} ({drop.name}) is {drop.state}", drop.reason)))
    gave_back = overview.rows(GAVE_BACK, track=drop.track, drop=drop.id) if drop.state == DropState.ACCEPTED else []
    if gave_back:
        return run_awaited(overview, gave_back[0].id)
    if drop.state in _BY_DROP:
        return Settled(verdict=_BY_DROP[drop.state], sentence=words, drop=drop.id)
    return drop
