"""Attempts at steps, one open at a time for a run: the only place that writes `Attempt.state`."""

import uuid
from dataclasses import dataclass

from sqlalchemy import Engine, bindparam, func
from sqlmodel import Session, col, select

from daemon.queue.claims import Claim, LostClaim, held_run
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.states import AttemptState
from daemon.state.tables import Attempt
from pipeline.errors import DropforgeError

# Made once, like those of `claims`.
_OPEN = select(Attempt).where(col(Attempt.run_id) == bindparam("of_run"), Attempt.state == AttemptState.SUBMITTED)


def begin_attempt(engine: Engine, claim: Claim, step: str, now: int) -> Attempt:
    """
    Open the next attempt at `step`, with a number and a fence of its own; the run is at that step from now on.

    Raises `LostClaim` if the run is not the owner's any more, `DropforgeError` if an attempt of the run is open.
    """
    with transaction(engine) as session:
        run = held_run(session, claim)
        opened = _open(session, claim.run_id)
        if opened is not None:
            message = f"run {claim.run_id} has attempt {opened.number} at step {opened.step} open"
            raise DropforgeError(message, f"look at it: dropforge show {claim.run_id}")
        last = select(func.max(Attempt.number)).where(Attempt.run_id == claim.run_id, Attempt.step == step)
        number = (session.exec(last).one() or 0) + 1
        attempt = Attempt(run_id=claim.run_id, step=step, number=number, fence=uuid.uuid4().hex, started_at=now)
        run.step = step
        session.add_all([run, attempt])
        session.flush()
        record_event(session, "step_submitted", now, track=run.track, run_id=run.id, step=step, attempt=number)
        return attempt


def open_attempt(engine: Engine, run_id: int) -> Attempt | None:
    """Return the run's attempt that has not ended, if there is one."""
    with transaction(engine) as session:
        return _open(session, run_id)


@dataclass(frozen=True)
class Ending:
    """How an attempt ended, and with which error if it was not published."""

    state: AttemptState
    error: str | None = None


def end_attempt(engine: Engine, claim: Claim, attempt_id: int, ending: Ending, now: int) -> None:
    """End the run's open attempt. Raises `LostClaim` if the run or the attempt is not the owner's any more."""
    with transaction(engine) as session:
        run = held_run(session, claim)
        opened = _open(session, claim.run_id)
        if opened is None or opened.id != attempt_id:
            message = f"attempt {attempt_id} of run {claim.run_id} has ended already"
            raise LostClaim(message, f"look at it: dropforge show {claim.run_id}")
        if ending.state == AttemptState.PUBLISHED:
            # Deaths are counted in a row: this step is done.
            run.deaths = 0
            session.add(run)
        _close(session, opened, run.track, now, ending)


def published_attempts(engine: Engine, run_id: int) -> list[Attempt]:
    """Return the attempts of a run whose results were published, in the order in which they began."""
    published = select(Attempt).where(Attempt.run_id == run_id, Attempt.state == AttemptState.PUBLISHED)
    with transaction(engine) as session:
        return list(session.exec(published.order_by(col(Attempt.id))).all())


def write_off(session: Session, run_id: int, track: str, now: int) -> None:
    """Close the attempt that a run leaves open when it stops running, in the caller's transaction."""
    opened = _open(session, run_id)
    if opened is not None:
        _close(session, opened, track, now, Ending(AttemptState.LOST, "its run stopped without it"))


def _open(session: Session, run_id: int) -> Attempt | None:
    return session.exec(_OPEN, params={"of_run": run_id}).first()


def _close(session: Session, attempt: Attempt, track: str, now: int, ending: Ending) -> None:
    attempt.state, attempt.error = ending.state, ending.error
    attempt.ended_at = now
    session.add(attempt)
    record_event(
        session,
        f"step_{attempt.state}",
        now,
        track=track,
        run_id=attempt.run_id,
        step=attempt.step,
        attempt=attempt.number,
        error=attempt.error,
    )
