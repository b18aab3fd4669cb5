"""What a drop that was taken out is still in: runs that have their snapshot, wins that wait, the champion."""

from pathlib import Path

from sqlalchemy import func
from sqlmodel import Session, col, select

from daemon.champions import history
from daemon.champions.blockers import blocker
from daemon.champions.journal import NoChampion, champion
from daemon.state.states import DropState, RunState
from daemon.state.tables import Drop, Event, Run, waits
from pipeline.artifacts import Frozen

#: Former champions that are looked through for one without withdrawn drops.
_MOST_FORMER = 1000


class DropUses(Frozen):
    """Where a drop is in spite of its being out of every later snapshot."""

    runs: tuple[int, ...] = ()
    """Open runs that were prepared with it."""
    wins: tuple[int, ...] = ()
    """Runs whose win waits for approval and that were prepared with it; not those whose model is blocked."""
    suspended: tuple[tuple[int, int], ...] = ()
    """Drops that are suspended, each with the run that had a bad verdict on it and on this one."""
    champion: int | None = None
    """Generation of the serving champion, if that was trained on it."""
    before: int | None = None
    """The latest generation that may serve again and was trained on no drop that is withdrawn."""


def drop_uses(session: Session, state_folder: Path, drop: Drop) -> DropUses:
    """Return what `drop` is still in; no champion is named for a held-out drop, since nothing is trained on it."""
    # A run that was retried and not claimed since has no settings yet: it takes its snapshot anew.
    opened = select(Run).where(
        Run.track == drop.track,
        col(Run.state).in_([RunState.RUNNING, RunState.WAITING]),
        col(Run.config).is_not(None),
    )
    runs = tuple(run.id or 0 for run in session.exec(opened.order_by(col(Run.id))) if _has(run, drop))
    waiting = session.exec(select(Run).where(Run.track == drop.track, waits()).order_by(col(Run.id)))
    wins = tuple(run.id or 0 for run in waiting if _has(run, drop) and not _is_blocked(session, state_folder, run))
    uses = DropUses(runs=runs, wins=wins, suspended=_suspended_beside(session, drop))
    if drop.role != "train":
        return uses
    try:
        serving = champion(session, drop.track)
    except NoChampion:
        return uses
    if drop.id not in (history.drops_of(session, drop.track, serving.model_id) or ()):
        return uses
    former = history.former(session, state_folder, drop.track, _MOST_FORMER)
    gone = {drop.id, *session.exec(select(Drop.id).where(Drop.track == drop.track, Drop.state == DropState.WITHDRAWN))}
    before = next((one.generation for one in former if gone.isdisjoint(one.drops or ())), None)
    return uses.model_copy(update={"champion": serving.generation, "before": before})


def _suspended_beside(session: Session, drop: Drop) -> tuple[tuple[int, int], ...]:
    """Return the drops that are suspended for a run that had this one, too, each with the latest such run."""
    held = select(Drop.id).where(Drop.track == drop.track, Drop.state == DropState.SUSPENDED)
    since = select(Event.drop_id, func.max(Event.run_id)).where(
        Event.kind == "drop_suspended", col(Event.drop_id).in_(held)
    )
    rows = session.exec(since.group_by(col(Event.drop_id)).order_by(col(Event.drop_id))).all()
    return tuple((one, run) for one, run in rows if one and run and _has(session.get_one(Run, run), drop))


def _is_blocked(session: Session, state_folder: Path, run: Run) -> bool:
    against = blocker(session, state_folder, run)
    return against is not None and against.blocked


def _has(run: Run, drop: Drop) -> bool:
    return any(one["id"] == drop.id for one in run.snapshot or ())
