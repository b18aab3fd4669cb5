"""
What a run may become from each state, and the one change of it: fenced, and with an event in the same transaction.

For `queue` alone, which knows when.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sqlalchemy import bindparam, update
from sqlalchemy.orm.attributes import set_committed_value
from sqlmodel import Session

from daemon.queue.attempts import write_off
from daemon.queue.claims import LostClaim
from daemon.queue.snapshots import give_back
from daemon.state.events import record_event
from daemon.state.states import RunState
from daemon.state.tables import Run
from pipeline.errors import DropforgeError

#: What a run may become from each state; anything else is a defect.
ALLOWED: Mapping[RunState, frozenset[RunState]] = MappingProxyType(
    {
        RunState.QUEUED: frozenset({RunState.RUNNING, RunState.CANCELLED}),
        RunState.RUNNING: frozenset(set(RunState) - {RunState.QUEUED}),
        RunState.WAITING: frozenset({RunState.RUNNING, RunState.CANCELLED}),
        # A win that waits for approval, where a drop of its own is withdrawn.
        RunState.SUCCEEDED: frozenset({RunState.CANCELLED}),
        RunState.FAILED: frozenset({RunState.WAITING, RunState.QUEUED}),
        RunState.CANCELLED: frozenset({RunState.WAITING, RunState.QUEUED}),
        RunState.CRASHED: frozenset({RunState.WAITING}),
    }
)
FINAL = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED, RunState.CRASHED})
RETRIABLE = FINAL - {RunState.SUCCEEDED}
_table = Run.metadata.tables["run"]
#: Changes a run that is still as it was read; its new values go with the parameters.
_CHANGE = update(_table).where(
    _table.c.id == bindparam("was_id"),
    _table.c.state == bindparam("was_state"),
    _table.c.token.is_not_distinct_from(bindparam("was_token")),
)


@dataclass(frozen=True)
class Move:
    """One change of a run's state: to what, with which event and which columns beside it."""

    to: RunState
    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)
    detail: Mapping[str, Any] = field(default_factory=dict)


def change(session: Session, run: Run, move: Move, now: int) -> RunState:
    """Change a run's state from what the caller read, once, with its event."""
    was = RunState(run.state)
    if move.to not in ALLOWED[was]:
        raise DropforgeError(f"run {run.id} cannot become {move.to} from {was}", f"look at it: dropforge show {run.id}")
    if was == RunState.RUNNING and move.to != RunState.RUNNING:
        write_off(session, run.id or 0, run.track, now)
    if move.to in RETRIABLE:
        give_back(session, run.id or 0)
    values: dict[str, Any] = {
        "state": move.to.value,
        "token": None,
        "ended_at": now if move.to in FINAL else None,
        **move.values,
    }
    still = {"was_id": run.id, "was_state": was.value, "was_token": run.token}
    if session.connection().execute(_CHANGE, {**still, **values}).rowcount != 1:
        raise LostClaim(f"run {run.id} was changed by somebody else", f"look at it: dropforge show {run.id}")
    for name, value in values.items():
        set_committed_value(run, name, value)
    record_event(session, move.kind, now, track=run.track, run_id=run.id, **move.detail)
    return move.to


def known_run(session: Session, run_id: int) -> Run:
    """Return a run. Raises `DropforgeError` if there is none of this number."""
    run = session.get(Run, run_id)
    if run is None:
        raise DropforgeError(f"there is no run {run_id}", "list them: dropforge runs")
    return run
