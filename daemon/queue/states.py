"""
The state of runs and of attempts at their steps: each is changed by compare-and-set, with its event in one transaction.

A run that is in hand belongs to whoever has its claim. For `queue` alone, which knows when a run moves.
"""

import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sqlalchemy import Engine, bindparam, func, update
from sqlalchemy.orm.attributes import set_committed_value
from sqlmodel import Session, col, select

from daemon.queue.snapshots import give_back
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.states import AttemptState, RunState
from daemon.state.tables import Attempt, Run, Track
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
# Made once: putting a statement together takes longer than SQLite's own work on it.
_HELD = select(Run).where(
    col(Run.id) == bindparam("held_id"), Run.state == RunState.RUNNING, col(Run.token) == bindparam("held_token")
)
_OPEN = select(Attempt).where(col(Attempt.run_id) == bindparam("of_run"), Attempt.state == AttemptState.SUBMITTED)


class LostClaim(DropforgeError):
    """The run is no longer this owner's: another daemon adopted it, or it has moved on."""


class Cancelled(DropforgeError):
    """A person cancelled the run or withdrew a drop that it was made from: nobody acts on its verdict."""


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


def require_not_cancelled(run: Run) -> None:
    """Raise `Cancelled` if the run was or is to be; asked in the transaction that acts on its verdict."""
    if run.cancel_requested or run.state == RunState.CANCELLED:
        why = f": {run.error}" if run.error else ""
        raise Cancelled(f"run {run.id} was cancelled{why}", f"look at it: dropforge show {run.id}")


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
        opened = _open(session, run.id or 0)
        if opened is not None:
            _close(session, opened, run.track, now, Ending(AttemptState.LOST, "its run stopped without it"))
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


def ensure_track(session: Session, name: str, now: int) -> Track:
    """Return the row of track `name`, made in the caller's transaction if it is new."""
    track = session.get(Track, name)
    if track is None:
        track = Track(name=name, salt=secrets.token_hex(16), created_at=now)
        session.add(track)
        session.flush()
        record_event(session, "track_created", now, track=name)
    return track


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
