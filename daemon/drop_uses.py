"""What a drop that was taken out is still in: runs that have their snapshot, wins that wait, the champion."""

from pathlib import Path

from sqlmodel import Session, col, select

from daemon import champions
from daemon.succession import NoChampion, champion, waits
from daemon.tables import Drop, DropState, Run, RunState
from daemon.waiting_wins import obstacle
from pipeline.artifacts import Frozen

#: Former champions that are looked through for one without withdrawn drops.
_MOST_FORMER = 1000


class DropUses(Frozen):
    """Where a drop is in spite of its being out of every later snapshot."""

    runs: tuple[int, ...] = ()
    """Open runs that were prepared with it."""
    wins: tuple[int, ...] = ()
    """Runs whose win waits for approval and that were prepared with it; not those whose model is barred."""
    champion: int | None = None
    """Generation of the reigning champion, if that was trained on it."""
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
    wins = tuple(run.id or 0 for run in waiting if _has(run, drop) and not _is_barred(session, state_folder, run))
    if drop.role != "train":
        return DropUses(runs=runs, wins=wins)
    try:
        reigning = champion(session, drop.track)
    except NoChampion:
        return DropUses(runs=runs, wins=wins)
    if drop.id not in (champions.drops_of(session, drop.track, reigning.model_id) or ()):
        return DropUses(runs=runs, wins=wins)
    former = champions.former(session, state_folder, drop.track, _MOST_FORMER)
    gone = {drop.id, *session.exec(select(Drop.id).where(Drop.track == drop.track, Drop.state == DropState.WITHDRAWN))}
    before = next((one.generation for one in former if gone.isdisjoint(one.drops or ())), None)
    return DropUses(runs=runs, wins=wins, champion=reigning.generation, before=before)


def _is_barred(session: Session, state_folder: Path, run: Run) -> bool:
    against = obstacle(session, state_folder, run)
    return against is not None and against.barred


def _has(run: Run, drop: Drop) -> bool:
    return any(one["id"] == drop.id for one in run.snapshot or ())
