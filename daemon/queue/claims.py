"""What every part of the queue rests on: events, and the check that a run is still its owner's."""

from dataclasses import dataclass

from sqlalchemy import bindparam, insert
from sqlmodel import Session, col, select

from daemon.state.tables import Event, Run, RunState
from pipeline.errors import DropforgeError

# Made once: putting a statement together takes longer than SQLite's own work on it.
_EVENT = insert(Event.metadata.tables["event"])
_HELD = select(Run).where(
    col(Run.id) == bindparam("held_id"), Run.state == RunState.RUNNING, col(Run.token) == bindparam("held_token")
)


class LostClaim(DropforgeError):
    """The run is no longer this owner's: another daemon adopted it, or it has moved on."""


@dataclass(frozen=True)
class Claim:
    """The right to work on one run, until somebody else holds it."""

    run_id: int
    token: str


def record_event(  # noqa: PLR0913 - what it is about goes by name, and most events name one thing
    session: Session,
    kind: str,
    now: int,
    *,
    track: str | None = None,
    run_id: int | None = None,
    drop_id: int | None = None,
    **detail: object,
) -> None:
    """Write the event `kind` (what happened, in the past) with its JSON `detail` in the caller's transaction."""
    row = {"at": now, "kind": kind, "track": track, "run_id": run_id, "drop_id": drop_id, "detail": detail}
    session.connection().execute(_EVENT, row)


def held_run(session: Session, claim: Claim) -> Run:
    """
    Return the claim's run. Raises `LostClaim` if it is not running under the claim's token.

    The caller's transaction holds the write lock, so that the answer is still true when it writes.
    """
    run = session.exec(_HELD, params={"held_id": claim.run_id, "held_token": claim.token}).first()
    if run is None:
        message = f"run {claim.run_id} is not held by this daemon any more"
        raise LostClaim(message, f"look at it: dropforge show {claim.run_id}")
    return run
