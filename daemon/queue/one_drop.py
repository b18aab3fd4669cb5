"""
Runs about one drop, which begin when nothing else is due: trials, their controls, and runs that leave a drop out.

They train on the champion's drops, with others or without one; `suspects` and `leave_one_out` say when there is one.
"""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import ColumnElement, func, update
from sqlmodel import Session, col, select

from daemon.queue import run_queue
from daemon.settings.model import Settings
from daemon.state.events import record_event
from daemon.state.queries import on_trial_except
from daemon.state.states import DropState, Purpose, RunState
from daemon.state.tables import Drop, Promotion, Run, Track

_WEEK_MS = 7 * 86_400_000


def queue_run(  # noqa: PLR0913 - the last two go by name
    session: Session, purpose: Purpose, track: str, drop: int, now: int, *, tested: Iterable[int] = (), **about: Any
) -> Run:
    """
    Insert and return a waiting run about `drop`; its drops are those of `snapshot_of`.

    It begins when nothing else is due. `about` are further columns of `Run`.
    """
    facts = {"purpose": purpose, "about_drop": drop, "created_at": now, "not_before": now, **about}
    run = Run(track=track, trigger="idle", state=RunState.WAITING, **facts)
    run.snapshot = snapshot_of(session, run, tested)
    session.add(run)
    session.flush()
    record_event(session, f"{purpose}_queued", now, track=track, run_id=run.id, drop_id=drop)
    return run


def snapshot_of(session: Session, run: Run, tested: Iterable[int]) -> list[int]:
    """Return a run's accepted drops: the champion's but the one it is about, `tested`, all held-out; ids ascending."""
    drops = select(Drop.id).where(Drop.track == run.track, Drop.state == DropState.ACCEPTED)
    trained = accepted(session, champion_drops(session, run.track)) - {run.about_drop} | {*tested}
    wanted = (col(Drop.role) == "heldout") | col(Drop.id).in_(trained)
    return [number for number in session.exec(drops.where(wanted).order_by(col(Drop.id))) if number]


def champion_drops(session: Session, track: str) -> set[int]:
    """Return the ids of the training drops behind the champion; empty if it is a base model."""
    serving = col(Track.champion_generation) == Promotion.generation
    made = select(Promotion.drops).join(Track, (col(Track.name) == Promotion.track) & serving)
    return of_training(session, session.exec(made.where(Track.name == track)).first() or ())


def accepted(session: Session, drops: Iterable[int], *which: ColumnElement[bool]) -> set[int]:
    """Return the ids among `drops` of accepted training drops that are not on trial and meet all of `which`."""
    free = select(Drop.id).where(col(Drop.id).in_(drops), Drop.state == DropState.ACCEPTED, Drop.role == "train")
    free = free.where(*which)
    return {number for number in session.exec(free.where(col(Drop.id).not_in(on_trial_except(None)))) if number}


def of_training(session: Session, drops: Iterable[int]) -> set[int]:
    """Return the ids among `drops` that are training drops."""
    asked = select(Drop.id).where(col(Drop.id).in_(drops), Drop.role == "train")
    return {number for number in session.exec(asked).all() if number}


def trials(session: Session, track: str, now: int, *, left_out: bool = False) -> int:
    """Return how many trials and controls of a track began in the last week; with `left_out` also `LEFT_OUT` runs."""
    begun = select(func.count()).select_from(Run).where(Run.track == track, col(Run.about_drop).is_not(None))
    if not left_out:
        begun = begun.where(Run.purpose != Purpose.LEFT_OUT)
    # A start in the future was recorded before the clock was set back.
    return session.exec(begun.where(col(Run.started_at) > now - _WEEK_MS, col(Run.started_at) <= now)).one()


def run_again(session: Session, settings: Settings, track: str, now: int) -> None:
    """Mark the accepted training drops that the champion lacks as unused; for any, queue a run as for a new drop."""
    all_drops = session.exec(select(Drop.id).where(Drop.track == track)).all()
    ids = accepted(session, {drop for drop in all_drops if drop} - champion_drops(session, track))
    session.exec(update(Drop).where(col(Drop.id).in_(ids)).values(first_run=None))
    if ids:
        run_queue.enqueue_when_quiet(session, settings, track, now)
