"""
What a person does with a drop after it was taken in: accept a proposed one, take one out of later runs, put it back.

Its file and its lineage stay; what was new beside a withdrawn one is trained on without it. (Drops that were new in a
bad candidate are suspended by `snapshots.suspend_new_drops`.)
"""

from typing import NamedTuple

from sqlalchemy import Engine
from sqlmodel import Session, col, select

from daemon.queue import run_queue
from daemon.queue.snapshots import excuse_new_drops, give_back, new_drops, withdrawn_from
from daemon.settings.model import Settings
from daemon.state import events
from daemon.state.database import transaction
from daemon.state.states import DropState
from daemon.state.tables import Drop, Run, waits
from pipeline.errors import DropforgeError


class WrongDrop(DropforgeError):
    """There is no such drop, or its state does not allow what was asked."""


class Withdrawal(NamedTuple):
    """A drop that was taken out, and what that has begun."""

    drop: Drop
    runs: dict[int, int]
    """Wins that it stops, each with the queued run that trains on what else was new in it."""


def accept(engine: Engine, drop_id: int, reason: str | None, now: int, by: str | None = None) -> Drop:
    """Let a proposed drop count from the next snapshot on, by this person's word. Raises `WrongDrop`."""
    with transaction(engine) as session:
        drop = _known(session, drop_id)
        if drop.state != DropState.PROPOSED:
            message = f"drop {drop_id} is {drop.state}, not proposed"
            raise WrongDrop(message, "see what waits for a word: dropforge drops --state proposed")
        _refuse_twin(session, drop)
        _set(session, drop, DropState.ACCEPTED, None)
        events.record_event(session, "drop_accepted", now, track=drop.track, drop_id=drop.id, reason=reason, by=by)
        return drop


def withdraw(  # noqa: PLR0913, PLR0917 - what is asked for, and who asks
    engine: Engine, drop_id: int, reason: str, now: int, settings: Settings, by: str | None = None
) -> Withdrawal:
    """
    Take an accepted, proposed or suspended drop out of every later snapshot, training and held-out alike.

    Runs that have their snapshot keep it. Where a win waits that this stops, what else was new in it waits for a run
    again. Raises `WrongDrop`.
    """
    with transaction(engine) as session:
        drop = _known(session, drop_id)
        if drop.state not in {DropState.ACCEPTED, DropState.PROPOSED, DropState.SUSPENDED}:
            message = f"drop {drop_id} is {drop.state}, not accepted, proposed or suspended"
            raise WrongDrop(message, "see the drops and their states: dropforge drops")
        _set(session, drop, DropState.WITHDRAWN, reason)
        events.record_event(session, "drop_withdrawn", now, track=drop.track, drop_id=drop.id, reason=reason, by=by)
        runs = {}
        for run in session.exec(select(Run).where(Run.track == drop.track, waits()).order_by(col(Run.id))).all():
            begun = train_without(session, settings, run, now)
            if begun is not None:
                runs[run.id or 0] = begun.id or 0
        return Withdrawal(drop, runs)


def restore(  # noqa: PLR0913, PLR0917 - what is asked for, and who asks
    engine: Engine, drop_id: int, reason: str, now: int, settings: Settings, by: str | None = None
) -> Drop:
    """
    Put a withdrawn or suspended drop back into later snapshots; it counts as new and starts a run as a new drop would.

    Raises `WrongDrop`.
    """
    with transaction(engine) as session:
        drop = _known(session, drop_id)
        if drop.state not in {DropState.WITHDRAWN, DropState.SUSPENDED}:
            message = f"drop {drop_id} is {drop.state}, not withdrawn or suspended"
            raise WrongDrop(message, "see the drops and their states: dropforge drops")
        _refuse_twin(session, drop)
        _set(session, drop, DropState.ACCEPTED, None)
        drop.first_run = None
        events.record_event(session, "drop_restored", now, track=drop.track, drop_id=drop.id, reason=reason, by=by)
        if drop.track in settings.track_names and drop.role == "train":
            track = settings.track(drop.track)
            if track.trigger in {"drop", "both"}:
                run_queue.enqueue_when_quiet(session, drop.track, track, now)
        return drop


def train_without(session: Session, settings: Settings, run: Run, now: int) -> Run | None:
    """
    Let what was new in a run wait for a run again without the drops withdrawn since, and start one as a new drop would.

    Such a drop stops a win, and may be all that a bad verdict is about. Return the run that is started, if there is
    one. Nothing is started where only withdrawn drops were new, and nothing is done where none was withdrawn, or where
    this was done before. Works in the caller's transaction, which ends the run or withdraws the drop. It has an end:
    the next run has no withdrawn drop, so only a further withdrawal stops that one.
    """
    if not withdrawn_from(session, run):
        return None
    excuse_new_drops(session, run, now)
    own = select(Drop).where(Drop.first_run == run.id, Drop.state == DropState.ACCEPTED, Drop.role == "train")
    some = session.exec(own).first() is not None
    give_back(session, run.id or 0)
    for drop in new_drops(session, run, DropState.ACCEPTED):
        # New, though an earlier run had it, which had no verdict on it; what is a later run's is trained on there.
        if 0 < (drop.first_run or 0) < (run.id or 0):
            drop.first_run, some = None, True
            session.add(drop)
    if some and run.track in settings.track_names:
        track = settings.track(run.track)
        if track.trigger in {"drop", "both"}:
            return run_queue.enqueue_when_quiet(session, run.track, track, now)
    return None


def _known(session: Session, drop_id: int) -> Drop:
    drop = session.get(Drop, drop_id)
    if drop is None:
        message = f"there is no drop {drop_id}"
        raise WrongDrop(message, "see them all: dropforge drops")
    return drop


def _refuse_twin(session: Session, drop: Drop) -> None:
    """Raise `WrongDrop` if the same content is accepted already."""
    same = select(Drop).where(Drop.track == drop.track, Drop.role == drop.role, Drop.sha256 == drop.sha256)
    twin = session.exec(same.where(col(Drop.state) == DropState.ACCEPTED)).first()
    if twin is not None:
        message = f"the content of drop {drop.id} is accepted already, as drop {twin.id}"
        raise WrongDrop(
            message, f"look at it: dropforge drops; to take that one out: dropforge drops withdraw {twin.id}"
        )


def _set(session: Session, drop: Drop, state: DropState, reason: str | None) -> None:
    drop.state, drop.reason = state, reason
    session.add(drop)
