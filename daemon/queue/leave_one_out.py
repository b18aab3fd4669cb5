"""
Leave one out: while a track has nothing else to do, train on its champion's drops without one of them.

Off by default (`suspects.leave_one_out`). Such a run is an ordinary candidate that blames no drop: its verdict says
what the drop is worth, on the held-out records of the others. If the candidate wins, the new champion does not know the
drop, which counts as new again: a run is queued for it, and if it does harm, a search finds it. The rows
of these runs, each with the drop and the champion, are the whole state.

`queue_run` and what follows it serve all runs about one drop, also the trials of `suspects` and their controls: they
begin when nothing else is due, and train on the champion's drops, with others or without one.
"""

from collections.abc import Collection, Iterable
from typing import Any

from sqlalchemy import ColumnElement, Engine, func, or_, update
from sqlmodel import Session, col, select

from daemon.queue import run_queue
from daemon.queue.snapshots import on_trial_except, waiting_drops
from daemon.settings.model import Settings
from daemon.state.database import transaction, waits
from daemon.state.events import record_event
from daemon.state.states import OPEN_STATES, DropState, Purpose, RunState
from daemon.state.tables import Drop, Event, Promotion, Run, Suspect, Track
from daemon.state.troubles import Troubles
from pipeline.artifacts import Verdict

_HOUR_MS = 3_600_000
_WEEK_MS = 7 * 86_400_000


def follow_verdict(session: Session, run: Run, verdict: Verdict, now: int) -> None:
    """
    Store in the drop that a run left out its worth, in points: the champion's score minus the candidate's.

    Called in the transaction that ends the run, any run. Nothing is stored for a run of another purpose, without a
    valid comparison, or if another champion came after the run was queued.
    """
    left_out = run.purpose == Purpose.LEFT_OUT and run.about_champion == verdict.champion_model_id
    if not left_out or verdict.worth is None:
        return
    drop = session.get_one(Drop, run.about_drop)
    (drop.worth_points, drop.worth_half_width), drop.worth_run = verdict.worth, run.id
    record_event(session, "drop_worth", now, track=run.track, run_id=run.id, drop_id=drop.id)


def tracks_of(settings: Settings) -> tuple[str, ...]:
    """Return the names of the tracks in which drops are left out, in the order of the settings."""
    return tuple(name for name in settings.track_names if settings.track(name).suspects.leave_one_out)


def go_on(  # noqa: PLR0913, PLR0917 - each is another thing
    engine: Engine, settings: Settings, tracks: Collection[str], now: int, troubles: Troubles, looked: tuple[int, int]
) -> tuple[int, int]:
    """
    Queue a run without one of the champion's drops for each of `tracks` that has nothing else to do.

    Each drop is left out once per champion, the oldest first, as long as `gate.trials_per_week` has a run left. A run
    that has not begun is cancelled if another champion came. If a run that left a drop out made the champion, an
    ordinary run is queued for that drop.

    Called before a run is claimed. Returns the newest event's id and the time of the last look at all tracks, for the
    next call's `looked`: for an hour from then on only tracks with an event since are looked at. What a track's damaged
    rows or files raise goes to `troubles`.
    """
    if not tracks:
        return looked
    with transaction(engine) as session:
        latest = session.exec(select(func.max(Event.id))).one() or 0
        if 0 <= now - looked[1] < _HOUR_MS:
            changed = set(session.exec(select(Event.track).where(col(Event.id) > looked[0])).all())
            tracks = [name for name in tracks if name in changed]
        else:
            looked = (0, now)
        searching = set(session.exec(select(Suspect.track).where(col(Suspect.ended).is_(None))).all())
        for name in tracks:
            with troubles.alone(f"leave one out on track {name}"), session.begin_nested():
                track = session.get(Track, name)
                if track is None:
                    continue
                _call_off(session, track, now)
                if name in searching:
                    continue
                if _was_left_out(session, track):
                    run_again(session, settings, name, now)
                begun = trials(session, name, now, left_out=True)
                going = select(Run.id).where(Run.track == name, or_(col(Run.state).in_(OPEN_STATES), waits()))
                is_busy = track.paused or waiting_drops(session, name) or session.exec(going).first()
                if begun < settings.track(name).gate.trials_per_week and not is_busy:
                    _queue(session, track, now)
    return latest, looked[1]


def _call_off(session: Session, track: Track, now: int) -> None:
    """Cancel a run that was queued for a former champion and has not begun."""
    queued = select(Run).where(Run.track == track.name, Run.state == RunState.WAITING, col(Run.started_at).is_(None))
    for run in session.exec(queued.where(col(Run.about_champion) != track.champion_model_id)).all():
        run_queue.call_off(session, run, now, "another champion came before it began")


def _was_left_out(session: Session, track: Track) -> bool:
    """Return whether a run that left out a drop made the champion, and the drop is accepted and unused since."""
    left = select(Drop.id).join(Run, col(Run.about_drop) == Drop.id).where(Run.purpose == Purpose.LEFT_OUT)
    left = left.join(Promotion, col(Promotion.run_id) == Run.id).where(Drop.state == DropState.ACCEPTED)
    left = left.where(Promotion.track == track.name, Promotion.model_id == track.champion_model_id)
    return session.exec(left.where(col(Drop.first_run) < Promotion.run_id)).first() is not None


def _queue(session: Session, track: Track, now: int) -> None:
    """
    Queue the run that leaves out the champion's oldest drop that no run on this champion was about.

    None is queued if the champion has one drop, or if one of its drops is not accepted or is on trial. A drop that a
    person restored is not left out.
    """
    tried = select(Run.about_drop).where(Run.track == track.name, Run.about_champion == track.champion_model_id)
    drops = champion_drops(session, track.name)
    untried = accepted(session, drops - set(session.exec(tried).all()), ~col(Drop.restored))
    if len(drops) < 2 or not untried or drops != accepted(session, drops):  # noqa: PLR2004 - none would be left
        return
    champion = track.champion_model_id
    queue_run(session, Purpose.LEFT_OUT, track.name, min(untried), now, about_champion=champion)


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
    """Return the ids of the training drops that the champion was made of; empty if it is a base model."""
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
    """Mark accepted training drops, not on trial, that the champion lacks as unused; queue a run if there are any."""
    all_drops = session.exec(select(Drop.id).where(Drop.track == track)).all()
    ids = accepted(session, {drop for drop in all_drops if drop} - champion_drops(session, track))
    session.exec(update(Drop).where(col(Drop.id).in_(ids)).values(first_run=None))
    if ids:
        run_queue.enqueue_when_quiet(session, settings, track, now)
