"""What every part of the queue rests on: the check that a run is still its owner's."""

from dataclasses import dataclass

from sqlalchemy import bindparam
from sqlmodel import Session, col, select

from daemon.state.states import RunState
from daemon.state.tables import Run
from pipeline.errors import DropforgeError

_HELD = select(Run).where(
    col(Run.id) == bindparam("held_id"), Run.state == RunState.RUNNING, col(Run.token) == bindparam("held_token")
)


class LostClaim(DropforgeError):
    """The run is no longer this owner's: another daemon adopted it, or it has moved on."""


class Cancelled(DropforgeError):
    """A person cancelled the run or withdrew a drop that it was made from: nobody acts on its verdict."""

    def __init__(self, run: Run) -> None:
        """Say so of `run`, and why if that is known."""
        why = f": {run.error}" if run.error else ""
        super().__init__(f"run {run.id} was cancelled{why}", f"look at it: dropforge show {run.id}")


@dataclass(frozen=True)
class Claim:
    """The right to work on one run, until somebody else holds it."""

    run_id: int
    token: str


def held_run(session: Session, claim: Claim) -> Run:
    """Return the claim's run in a transaction that writes. Raises `LostClaim` if it does not run under the token."""
    run = session.exec(_HELD, params={"held_id": claim.run_id, "held_token": claim.token}).first()
    if run is None:
        message = f"run {claim.run_id} is not held by this daemon any more"
        raise LostClaim(message, f"look at it: dropforge show {claim.run_id}")
    return run


def is_cancelled(run: Run) -> bool:
    """Say whether a run was cancelled, or will be as soon as its owner sees that it was asked to."""
    return run.cancel_requested or run.state == RunState.CANCELLED


def require_not_cancelled(run: Run) -> None:
    """Raise `Cancelled` if a run `is_cancelled`; asked in the transaction that acts on its verdict."""
    if is_cancelled(run):
        raise Cancelled(run)
