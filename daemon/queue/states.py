"""
State changes of runs and step attempts: each is a compare-and-set, in one transaction with its event.

A running run belongs to the holder of its claim. Only the modules of `queue` call `change`.
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

#: The states that a run may change to, by its current state; any other change is a defect.
ALLOWED: Mapping[RunState, frozenset[RunState]] = MappingProxyType(
    {
        RunState.QUEUED: frozenset({RunState.RUNNING, RunState.CANCELLED}),
        RunState.RUNNING: frozenset(set(RunState) - {RunState.QUEUED}),
        RunState.WAITING: frozenset({RunState.RUNNING, RunState.CANCELLED}),
        # A person cancels a win that waits for approval, or withdraws one of its drops.
        RunState.SUCCEEDED: frozenset({RunState.CANCELLED}),
        RunState.FAILED: frozenset({RunState.WAITING, RunState.QUEUED}),
        RunState.CANCELLED: frozenset({RunState.WAITING, RunState.QUEUED}),
        RunState.CRASHED: frozenset({RunState.WAITING}),
    }
)
FINAL = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED, RunState.CRASHED})
RETRIABLE = FINAL - {RunState.SUCCEEDED}
_table = Run.metadata.tables["run"]
#: Updates a run whose state and token are still those that were read; the new values are further parameters.
_CHANGE = update(_table).where(
    _table.c.id == bindparam("was_id"),
    _table.c.state == bindparam("was_state"),
    _table.c.token.is_not_distinct_from(bindparam("was_token")),
)
# Built once: building a statement takes longer than SQLite's own work on it.
_HELD = select(Run).where(
    col(Run.id) == bindparam("held_id"), Run.state == RunState.RUNNING, col(Run.token) == bindparam("held_token")
)
_OPEN = select(Attempt).where(col(Attempt.run_id) == bindparam("of_run"), Attempt.state == AttemptState.SUBMITTED)


class LostClaim(DropforgeError):
    """The claim is not valid any more: another daemon adopted the run, or the run's state has changed."""


class Cancelled(DropforgeError):
    """The run was cancelled by a person, or since one of its drops was withdrawn: do not apply its verdict."""


@dataclass(frozen=True)
class Claim:
    """The right to change one running run: its id, and the token that its row must still have."""

    run_id: int
    token: str


def held_run(session: Session, claim: Claim) -> Run:
    """Return the claimed run, to be changed in `session`. Raises `LostClaim` unless it runs under this token."""
    run = session.exec(_HELD, params={"held_id": claim.run_id, "held_token": claim.token}).first()
    if run is None:
        message = f"run {claim.run_id} is not held by this daemon any more"
        raise LostClaim(message, f"look at it: dropforge show {claim.run_id}")
    return run


def claimed_run(engine: Engine, claim: Claim) -> Run:
    """Return the claimed run. Raises `LostClaim` unless it runs under this token."""
    with transaction(engine) as session:
        return held_run(session, claim)


def require_not_cancelled(run: Run) -> None:
    """Raise `Cancelled` if the run is cancelled or is to be; call it in the transaction that applies its verdict."""
    if run.cancel_requested or run.state == RunState.CANCELLED:
        why = f": {run.error}" if run.error else ""
        raise Cancelled(f"run {run.id} was cancelled{why}", f"look at it: dropforge show {run.id}")


@dataclass(frozen=True)
class Move:
    """A change of a run's state: the new state, the event's kind and details, and further column values."""

    to: RunState
    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)
    detail: Mapping[str, Any] = field(default_factory=dict)


def change(session: Session, run: Run, move: Move, now: int) -> RunState:
    """
    Apply `move` to a run and record its event; return the new state.

    The open attempt of a run that stops running is ended as lost. The drops that were new in a run that fails, crashes
    or is cancelled wait for a run again. The run's claim ends unless `move` has a token. Raises `DropforgeError` if the
    move is not allowed, `LostClaim` if its state or token has changed since the caller read it.
    """
    was = RunState(run.state)
    if move.to not in ALLOWED[was]:
        raise DropforgeError(f"run {run.id} cannot become {move.to} from {was}", f"look at it: dropforge show {run.id}")
    if was == RunState.RUNNING and move.to != RunState.RUNNING:
        opened = _open(session, run.id or 0)
        if opened is not None:
            _close(session, opened, run.track, now, Ending(AttemptState.LOST, "its run stopped before the step did"))
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
    """Return the run with this id. Raises `DropforgeError` if there is none."""
    run = session.get(Run, run_id)
    if run is None:
        raise DropforgeError(f"there is no run {run_id}", "list them: dropforge runs")
    return run


def ensure_track(session: Session, name: str, now: int) -> Track:
    """Return the row of track `name`; insert it in the caller's transaction if there is none."""
    track = session.get(Track, name)
    if track is None:
        track = Track(name=name, salt=secrets.token_hex(16), created_at=now)
        session.add(track)
        session.flush()
        record_event(session, "track_created", now, track=name)
    return track


def begin_attempt(engine: Engine, claim: Claim, step: str, now: int) -> Attempt:
    """
    Insert and return the next attempt at `step`, with a new number and fence; make `step` the run's current step.

    Raises `LostClaim` if the claim is not valid any more, `DropforgeError` if the run has an open attempt already.
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
    """Return the run's attempt that has not ended; `None` if there is none."""
    with transaction(engine) as session:
        return _open(session, run_id)


@dataclass(frozen=True)
class Ending:
    """Final state of an attempt, and its error if its result was not published."""

    state: AttemptState
    error: str | None = None


def end_attempt(engine: Engine, claim: Claim, attempt_id: int, ending: Ending, now: int) -> None:
    """
    End the open attempt `attempt_id` of the claimed run.

    A published result also sets the run's count of vanished processes to 0 and clears its error, unless it is to be
    cancelled. Raises `LostClaim` if the claim is not valid any more or the attempt has ended.
    """
    with transaction(engine) as session:
        run = held_run(session, claim)
        opened = _open(session, claim.run_id)
        if opened is None or opened.id != attempt_id:
            message = f"attempt {attempt_id} of run {claim.run_id} has ended already"
            raise LostClaim(message, f"look at it: dropforge show {claim.run_id}")
        if ending.state == AttemptState.PUBLISHED:
            # Deaths are counted in a row, and what went wrong before is over: this step is done.
            run.deaths = 0
            if not run.cancel_requested:
                run.error = run.hint = None
            session.add(run)
        _close(session, opened, run.track, now, ending)


def published_attempts(engine: Engine, run_id: int) -> list[Attempt]:
    """Return the attempts of a run whose results were published, in the order in which they began."""
    published = select(Attempt).where(Attempt.run_id == run_id, Attempt.state == AttemptState.PUBLISHED)
    with transaction(engine) as session:
        return list(session.exec(published.order_by(col(Attempt.id))).all())


def last_attempts(engine: Engine, run_id: int, step: str, count: int) -> list[Attempt]:
    """Return the newest `count` attempts of a run at `step`, the newest first."""
    of_step = select(Attempt).where(Attempt.run_id == run_id, Attempt.step == step)
    with transaction(engine) as session:
        return list(session.exec(of_step.order_by(col(Attempt.id).desc()).limit(count)).all())


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
