"""Snapshots: the drops that a run uses, and the drops that wait for the next run."""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, bindparam, func, update
from sqlmodel import Session, col, select
from sqlmodel.sql.expression import SelectOfScalar

from daemon.settings.model import Settings
from daemon.state.states import DropState
from daemon.state.tables import Drop, Run, Suspect

#: Outcomes of runs whose candidate was compared with the champion.
JUDGED = ("promoted", "not_shown_better", "worse", "guard_failed", "contaminated", "awaiting_approval", "overtaken")


def take_snapshot(session: Session, run: Run) -> list[int]:
    """
    Return the run's snapshot: the ids of the accepted drops of its track, oldest first.

    For a run with a snapshot, as a retried run or a trial, only drops of that. Drops on trial are left out, but for the
    drop that this run tests. Drops without a `first_run` are marked with this run, unless it is about one drop. Empty,
    and nothing is marked, if there is no training drop. `run` itself is not changed.
    """
    of_track = col(Drop.track) == run.track
    drops = free_drops(session, run.id, of_track if run.snapshot is None else col(Drop.id).in_(run.snapshot))
    if all(drop.role != "train" for drop in drops):
        return []
    for drop in drops:
        if drop.first_run is None and run.about_drop is None:
            drop.first_run = run.id
            session.add(drop)
    return [drop.id or 0 for drop in drops]


def give_back(session: Session, run_id: int) -> None:
    """Mark the drops that were new in this run as unused, so that they wait for a run again."""
    session.exec(update(Drop).where(col(Drop.first_run) == run_id).values(first_run=None))


def free_drops(session: Session, run_id: int | None, which: ColumnElement[bool]) -> Sequence[Drop]:
    """Return the accepted drops that match `which`, oldest first; a drop on trial only if run `run_id` tests it."""
    accepted = select(Drop).where(which, Drop.state == DropState.ACCEPTED)
    free = accepted.where(col(Drop.id).not_in(on_trial_except(run_id)))
    return session.exec(free.order_by(col(Drop.id))).all()


def on_trial_except(run_id: int | None) -> SelectOfScalar[int]:
    """Return a query for the ids of all drops under suspicion, except the drop that the trial run `run_id` tries."""
    other_run = col(Suspect.trial_run).is_(None) | (col(Suspect.trial_run) != (run_id or 0))
    return select(Suspect.drop_id).where(col(Suspect.ended).is_(None), other_run)


# Built once: building a statement takes longer than SQLite's own work on it, and the intake asks for each file.
_COUNT = select(func.count()).select_from(Drop).where(Drop.track == bindparam("of_track"))
_PROPOSED = _COUNT.where(Drop.state == DropState.PROPOSED)
_WAITING = _COUNT.where(
    Drop.state == DropState.ACCEPTED,
    Drop.role == "train",
    col(Drop.first_run).is_(None),
    col(Drop.id).not_in(on_trial_except(None)),
)


def waiting_drops(session: Session, track: str, owner: str | None = None) -> int:
    """Return how many accepted training drops, of `owner` if named, wait for a run; those on trial do not count."""
    return _count(session, _WAITING, track, owner)


def proposed_drops(session: Session, track: str, owner: str) -> int:
    """Return the number of drops of the track that user `owner` dropped and that wait for approval."""
    return _count(session, _PROPOSED, track, owner)


def _count(session: Session, counted: SelectOfScalar[int], track: str, owner: str | None) -> int:
    if owner is not None:
        counted = counted.where(Drop.owner == owner)
    return session.exec(counted, params={"of_track": track}).one()


def records_came(session: Session, settings: Settings, track: str) -> bool:
    """
    Return whether an accepted pinned drop is unused, and the last run with an outcome had `insufficient_evidence`.

    Always `False` unless the track is declared and its `gate.on` is "pinned".
    """
    if track not in settings.track_names or settings.track(track).gate.on != "pinned":
        return False
    waiting = select(Drop.id).where(Drop.track == track, Drop.role == "heldout", Drop.state == DropState.ACCEPTED)
    new = session.exec(waiting.where(col(Drop.first_run).is_(None)).limit(1)).first()
    ended = select(Run.outcome).where(Run.track == track, col(Run.outcome).is_not(None))
    last = session.exec(ended.order_by(col(Run.id).desc()).limit(1)).first()
    return new is not None and last == "insufficient_evidence"


def judged_before(session: Session, track: str, run_id: int) -> tuple[int, dict[str, int]]:
    """Return how many other runs of the track, also later, judged a candidate: in total, and per held-out version."""
    count = select(Run.heldout_version, func.count()).group_by(col(Run.heldout_version))
    others = count.where(Run.track == track, Run.id != run_id, col(Run.outcome).in_(JUDGED))
    numbers = list(session.exec(others).all())
    return sum(number for _, number in numbers), {version: number for version, number in numbers if version is not None}
