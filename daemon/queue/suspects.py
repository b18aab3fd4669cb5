"""
Suspects: new drops that may have made a run worse, and the trial runs that test them.

A verdict that blames the new drops suspends none of them: it puts them on trial. They are tried in turn, each under
another seed, when nothing else is to be run: a trial trains on the champion's drops, those that the search has cleared,
and one suspect, so that drops which only do harm together are found. A drop that is blamed twice is suspended; every
other is accepted as before. The rows of `Suspect` are the whole state: after a crash a search continues from them.
"""

from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import Engine, func, update
from sqlmodel import Session, col, select
from sqlmodel.sql.expression import SelectOfScalar

from daemon.queue import run_queue
from daemon.queue.snapshots import JUDGED, as_snapshot, snapshot_ids
from daemon.queue.states import FINAL
from daemon.settings.model import Settings
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.states import TRIAL, DropState, PromotionState, RunState, SuspectEnd
from daemon.state.tables import Drop, Event, Promotion, Run, Suspect, Track, on_trial_beside, promotion_of
from pipeline.artifacts import Verdict
from pipeline.words import count, listed

#: Drops that one verdict puts on trial at most: the newest and six more.
MOST = 7
#: Outcomes of runs whose verdict has results by drop.
_COMPARED = tuple(outcome for outcome in JUDGED if outcome != "contaminated")
_WEEK_MS = 7 * 86_400_000
#: The event of a verdict that names old drops on which the candidate lost, whether or not it blames new drops.
_LOST = "drops_lost"


class _End(NamedTuple):
    """How the suspicion of a drop ends, and the reason."""

    kind: SuspectEnd
    why: str


def follow_verdict(session: Session, settings: Settings, run: Run, verdict: Verdict, now: int) -> None:
    """
    Put new drops on trial, or suspend or clear the drop of a trial, as the verdict of `run` requires.

    Called in the transaction that ends the run. A trial's verdict suspends or clears the drop that it tested, which may
    queue a run; the verdict of any other run may open a search. No drop is blamed if the champion is a base model or
    `gate.trials_per_week` is 0, or if the candidate lacks a drop of the champion's, as it was withdrawn, since it may
    be worse for that. A trial that does not win is repeated if it would be made of other drops now.
    """
    known, own = _known(session, run.track), _train_ids(session, run)
    lacks = known - own
    if run.trigger != TRIAL:
        if verdict.lost_drops:
            record_event(session, _LOST, now, track=run.track, run_id=run.id, lost=list(verdict.lost_drops))
        if verdict.blames_new_drops and known and not lacks and _budget(settings, run.track):
            _open_search(session, run, known, verdict, now)
        return
    tried = session.exec(_open().where(Suspect.trial_run == run.id)).first()
    if tried is None:
        return
    if verdict.outcome != "promoted" and (own - known != _tested(session, tried, known) or _accepted(session, lacks)):
        tried.trial_run = None
        session.add(tried)
    elif verdict.blames_new_drops and known and not lacks and _budget(settings, run.track):
        _suspend(session, settings, tried, verdict, now)
    else:
        why = f"run {run.id} tried it and was not worse"
        _end(session, settings, tried, _End(SuspectEnd.CLEARED, why), now)


def go_on(engine: Engine, settings: Settings, now: int) -> None:
    """
    Queue the next trial, or end the search, in each declared track that has drops on trial and no unfinished trial.

    A trial that ended without a verdict clears its drop; if no trial is left for the week, or no drop of the champion
    is accepted any more, all are cleared. A trial that has not begun gets the drops of today's champion. Called
    before a run is claimed: a trial begins when nothing else is due. A track with a running run is left out: its drops
    are in that run.
    """
    with transaction(engine) as session:
        running = select(Run.track).where(Run.state == RunState.RUNNING)
        suspected = select(Suspect.track).where(col(Suspect.ended).is_(None), col(Suspect.track).not_in(running))
        tracks = session.exec(suspected.distinct()).all()
        for track in sorted(set(tracks) & set(settings.track_names)):
            _go_on(session, settings, track, now)


def is_on_trial(session: Session, drop: Drop) -> bool:
    """Return whether the drop is on trial: no run but the trial that tests it may use it."""
    return session.exec(_open().where(Suspect.drop_id == drop.id)).first() is not None


def leave(session: Session, settings: Settings, drop: Drop, now: int) -> Run | None:
    """
    End the suspicion of a drop that a person accepted or withdrew; return its trial, `None` if none is open.

    The trial is not cancelled here. If the drop was the last of its search, a run may be queued.
    """
    found = session.exec(_open().where(Suspect.drop_id == drop.id)).first()
    if found is None:
        return None
    kind = SuspectEnd.CLEARED if drop.state == DropState.ACCEPTED else SuspectEnd.ENDED
    _end(session, settings, found, _End(kind, "a person's word"), now)
    trial = session.get(Run, found.trial_run) if found.trial_run is not None else None
    return None if trial is None or trial.state in FINAL else trial


def try_again_without(session: Session, drop: Drop) -> None:
    """Have every other suspect tested by a new trial if its trial also used `drop`, which was withdrawn."""
    for suspect in session.exec(_open().where(Suspect.track == drop.track, col(Suspect.trial_run).is_not(None))).all():
        if suspect.drop_id != drop.id and drop.id in snapshot_ids(session.get_one(Run, suspect.trial_run)):
            suspect.trial_run = None
            session.add(suspect)


# --- a search for the drop that made a run worse: open, continue, end


def _open_search(session: Session, run: Run, known: set[int], verdict: Verdict, now: int) -> None:
    """
    Put up to `MOST` new drops of a run on trial, in the order in which they are to be tested.

    First the drops that came when an old drop began to lose, then those that were never tested, then the newest. A drop
    that a person restored is not put on trial again.
    """
    first = _came_when_lost(session, run, verdict.lost_drops)
    cleared = select(Suspect.drop_id).where(Suspect.track == run.track, col(Suspect.trial_run).is_not(None))
    tried = set(session.exec(cleared).all())
    new = _accepted(session, snapshot_ids(run) - known - _restored(session, run.track))
    pending = sorted(new, key=lambda drop: (drop not in first, drop in tried, -drop))
    for drop in pending[:MOST]:
        session.add(Suspect(track=run.track, drop_id=drop, blamed_run=run.id or 0, opened_at=now))
        session.flush()
        record_event(session, "drop_suspected", now, track=run.track, run_id=run.id, drop_id=drop)


def _came_when_lost(session: Session, run: Run, lost: Iterable[int]) -> set[int]:
    """Return the drops that were new in the run with which a drop of `lost` began its current series of losses."""
    found = select(Event.run_id, Event.detail).where(Event.kind == _LOST, Event.track == run.track)
    lost_in = {run_id: detail["lost"] for run_id, detail in session.exec(found).all()}
    ended = select(Run.id).join(Event, col(Event.run_id) == Run.id).where(Event.kind == "run_succeeded")
    ended = ended.where(Run.track == run.track, Run.trigger != TRIAL, Run.id != run.id, col(Run.outcome).in_(_COMPARED))
    before = session.exec(ended.order_by(col(Event.id).desc())).all()
    came: set[int] = set()
    for drop in lost:
        streak = 0
        while streak < len(before) and drop in lost_in.get(before[streak], ()):
            streak += 1
        if streak:
            began = snapshot_ids(session.get_one(Run, before[streak - 1]))
            well = snapshot_ids(session.get_one(Run, before[streak])) if streak < len(before) else frozenset()
            came |= began - well
    return came


def _go_on(session: Session, settings: Settings, track: str, now: int) -> None:
    last = session.exec(_open().where(Suspect.track == track, col(Suspect.trial_run).is_not(None))).first()
    if last is not None:
        trial = session.get_one(Run, last.trial_run)
        if trial.state not in FINAL:
            if trial.config is None:
                # It has not begun, and another champion may have come since it was queued.
                trial.snapshot = _trial_snapshot(session, last, _known(session, track))
                session.add(trial)
            return
        why = f"run {trial.id} tried it and ended without a verdict"
        _end(session, settings, last, _End(SuspectEnd.CLEARED, why), now)
    known, budget = _known(session, track), _budget(settings, track)
    for suspect in session.exec(_open().where(Suspect.track == track).order_by(col(Suspect.id))).all():
        why = ""
        if suspect.drop_id in known:
            why = "the champion was trained on it"
        elif not _accepted(session, known):
            why = "nothing is left that the champion was trained on"
        elif _trials(session, track, now) >= budget:
            why = f"no trial is left: gate.trials_per_week is {budget}"
        if not why:
            _queue_trial(session, suspect, known, now)
            return
        _end(session, settings, suspect, _End(SuspectEnd.CLEARED, why), now)


def _queue_trial(session: Session, suspect: Suspect, known: set[int], now: int) -> None:
    """Queue the trial of a suspect. Its snapshot is final once it begins."""
    run = Run(track=suspect.track, trigger=TRIAL, state=RunState.WAITING, created_at=now, not_before=now)
    run.snapshot = _trial_snapshot(session, suspect, known)
    session.add(run)
    session.flush()
    suspect.trial_run = run.id
    session.add(suspect)
    session.flush()
    about = {"drop_id": suspect.drop_id, "blamed_run": suspect.blamed_run}
    record_event(session, "trial_queued", now, track=run.track, run_id=run.id, **about)


def _trial_snapshot(session: Session, suspect: Suspect, known: set[int]) -> list[dict[str, object]]:
    drops = select(Drop).where(Drop.track == suspect.track, Drop.state == DropState.ACCEPTED)
    trained = _accepted(session, known) | _tested(session, suspect, known)
    wanted = (col(Drop.role) == "heldout") | col(Drop.id).in_(trained)
    return as_snapshot(session.exec(drops.where(wanted).order_by(col(Drop.id))).all())


def _suspend(session: Session, settings: Settings, suspect: Suspect, verdict: Verdict, now: int) -> None:
    """Suspend the drop that its trial found worse, clear the other suspects of its search, and queue a run."""
    drop = session.get_one(Drop, suspect.drop_id)
    tested = _tested(session, suspect, _known(session, drop.track))
    kept = [str(number) for number in sorted(tested - {suspect.drop_id})]
    wrong = f" and did worse on {verdict.losses:,} of {count(verdict.groups, 'record')}" if verdict.losses else ""
    how = f"it alone{wrong}"
    if kept:
        pair, one = listed([str(number) for number in sorted(tested)]), len(kept) == 1
        how = f"drops {pair} together{wrong}; {'drop' if one else 'drops'} {listed(kept)} without it did no harm"
    drop.reason = (
        f"run {suspect.blamed_run} was worse with it, and so was run {suspect.trial_run}, which tried {how}: "
        f"dropforge report {suspect.trial_run}"
    )
    drop.state = DropState.SUSPENDED
    session.add(drop)
    run, reason = suspect.trial_run, drop.reason
    record_event(session, "drop_suspended", now, track=drop.track, run_id=run, drop_id=drop.id, reason=reason)
    for other in session.exec(_open().where(Suspect.blamed_run == suspect.blamed_run, Suspect.id != suspect.id)).all():
        _end(session, settings, other, _End(SuspectEnd.CLEARED, f"drop {drop.id} was found"), now)
    _end(session, settings, suspect, _End(SuspectEnd.SUSPENDED, reason), now)


def _end(session: Session, settings: Settings, suspect: Suspect, end: _End, now: int) -> None:
    """
    End the suspicion of one drop; if it was the last one of its search, a new run may be queued.

    A run is queued if a drop was suspended or withdrawn, or a trial won: otherwise it would only repeat the same data
    against the same champion.
    """
    suspect.ended, suspect.ended_at = end.kind, now
    session.add(suspect)
    session.flush()
    run, detail = suspect.trial_run or suspect.blamed_run, {"end": str(end.kind), "reason": end.why}
    record_event(session, "suspicion_ended", now, track=suspect.track, run_id=run, drop_id=suspect.drop_id, **detail)
    search = session.exec(select(Suspect).where(Suspect.blamed_run == suspect.blamed_run)).all()
    if all(one.ended is not None for one in search) and any(_changes_what_is_run(session, one) for one in search):
        _run_again(session, settings, suspect, now)


def _changes_what_is_run(session: Session, suspect: Suspect) -> bool:
    won = suspect.trial_run is not None and promotion_of(session, suspect.trial_run) is not None
    return won or suspect.ended in {SuspectEnd.SUSPENDED, SuspectEnd.ENDED}


def _run_again(session: Session, settings: Settings, suspect: Suspect, now: int) -> None:
    """Mark the drops that the champion was not trained on as unused, and queue a run for them as for a new drop."""
    all_drops = session.exec(select(Drop.id).where(Drop.track == suspect.track)).all()
    ids = _accepted(session, {drop for drop in all_drops if drop} - _known(session, suspect.track))
    session.exec(update(Drop).where(col(Drop.id).in_(ids)).values(first_run=None))
    if ids:
        run_queue.enqueue_when_quiet(session, settings, suspect.track, now)


# --- queries


def _open() -> SelectOfScalar[Suspect]:
    """Return the query for the suspects whose suspicion has not ended."""
    return select(Suspect).where(col(Suspect.ended).is_(None))


def _known(session: Session, track: str) -> set[int]:
    """Return the ids of the training drops behind the champion; empty if it is a base model."""
    serving = session.get(Track, track)
    if serving is None or serving.champion_model_id is None:
        return set()
    made = select(Promotion.drops).where(
        Promotion.track == track,
        Promotion.state == PromotionState.DONE,
        Promotion.model_id == serving.champion_model_id,
        col(Promotion.run_id).is_not(None),
    )
    drops = session.exec(made.order_by(col(Promotion.generation).desc())).first() or ()
    trained = select(Drop.id).where(col(Drop.id).in_(drops), Drop.role == "train")
    return {number for number in session.exec(trained).all() if number}


def _accepted(session: Session, drops: Iterable[int]) -> set[int]:
    """Return the ids among `drops` that are accepted training drops and not on trial."""
    free = select(Drop.id).where(col(Drop.id).in_(drops), Drop.state == DropState.ACCEPTED, Drop.role == "train")
    return {number for number in session.exec(free.where(col(Drop.id).not_in(on_trial_beside(None)))) if number}


def _tested(session: Session, suspect: Suspect, known: set[int]) -> set[int]:
    """Return the drops that a trial adds to the champion's: the suspect, and those that its search has cleared."""
    cleared = select(Suspect.drop_id).join(Run, col(Run.id) == Suspect.trial_run).where(Run.state == RunState.SUCCEEDED)
    cleared = cleared.where(Suspect.blamed_run == suspect.blamed_run, Suspect.ended == SuspectEnd.CLEARED)
    return {suspect.drop_id, *(_accepted(session, session.exec(cleared).all()) - known)}


def _restored(session: Session, track: str) -> set[int]:
    """Return the ids of the drops that a person has restored, which are not tried again."""
    found = session.exec(select(Event.drop_id).where(Event.kind == "drop_restored", Event.track == track))
    return {number for number in found if number}


def _budget(settings: Settings, track: str) -> int:
    """Return how many trials a track may begin in seven days (`gate.trials_per_week`)."""
    own = settings.track(track) if track in settings.track_names else settings
    return own.gate.trials_per_week


def _trials(session: Session, track: str, now: int) -> int:
    """Return how many trials of a track have begun in the last seven days."""
    begun = select(func.count()).select_from(Run).where(Run.track == track, Run.trigger == TRIAL)
    # A start in the future was recorded before the clock was set back.
    return session.exec(begun.where(col(Run.started_at) > now - _WEEK_MS, col(Run.started_at) <= now)).one()


def _train_ids(session: Session, run: Run) -> set[int]:
    """Return the ids of the training drops in the run's snapshot."""
    asked = select(Drop.id).where(col(Drop.id).in_(snapshot_ids(run)), Drop.role == "train")
    return {number for number in session.exec(asked).all() if number}
