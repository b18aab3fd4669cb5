"""Which drops a run sees: its snapshot, what waits for the next one, what is suspended after a bad one."""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, func, or_, update
from sqlmodel import Session, col, select

from daemon.queue.withdrawals import withdrawn
from daemon.state.events import record_event
from daemon.state.states import TRIAL, DropState
from daemon.state.tables import Drop, Event, Run, on_trial_beside
from pipeline import artifacts

#: Outcomes of runs whose candidate was held against the champion.
JUDGED = ("promoted", "not_shown_better", "worse", "guard_failed", "contaminated", "awaiting_approval", "overtaken")
#: Those that say of its drops that they do no harm: one that knew the questions was not judged.
_CLEARING = tuple(outcome for outcome in JUDGED if outcome != "contaminated")
#: The event of a verdict that says nothing of drops: it depends on references that were replaced or drops withdrawn.
_EXCUSED = "drops_excused"


def take_snapshot(session: Session, run: Run) -> list[dict[str, object]]:
    """
    Return the accepted drops of the run's track as JSON of `artifacts.Drop`, oldest first.

    None that is on trial is among them. Each that is in a snapshot for the first time is marked with this run. Empty if
    no drop is for training.
    """
    return _taken(session, run, col(Drop.track) == run.track)


def retake_snapshot(session: Session, run: Run) -> list[dict[str, object]]:
    """Return what is still accepted of a retried run's snapshot; empty if no drop is for training."""
    return _taken(session, run, col(Drop.id).in_([drop["id"] for drop in run.snapshot or ()]))


def give_back(session: Session, run_id: int) -> None:
    """Let the drops that were new in a run that ended without a verdict wait for a run again."""
    session.exec(update(Drop).where(col(Drop.first_run) == run_id).values(first_run=None))


def as_snapshot(drops: Sequence[Drop]) -> list[dict[str, object]]:
    """Return drops as JSON of `artifacts.Drop`."""
    return [_as_artifact(drop).model_dump(mode="json") for drop in drops]


def _taken(session: Session, run: Run, which: ColumnElement[bool]) -> list[dict[str, object]]:
    accepted = select(Drop).where(which, Drop.state == DropState.ACCEPTED)
    free = accepted.where(col(Drop.id).not_in(on_trial_beside(run.id)))
    drops = session.exec(free.order_by(col(Drop.id))).all()
    if all(drop.role != "train" for drop in drops):
        return []
    for drop in drops:
        if drop.first_run is None and run.trigger != TRIAL:
            drop.first_run = run.id
            session.add(drop)
    return as_snapshot(drops)


def waiting_drops(session: Session, track: str) -> int:
    """Return how many accepted drops for training no snapshot holds yet."""
    waiting = (
        select(func.count())
        .select_from(Drop)
        .where(
            Drop.track == track,
            Drop.state == DropState.ACCEPTED,
            Drop.role == "train",
            col(Drop.first_run).is_(None),
        )
    )
    return session.exec(waiting).one()


def judged_before(session: Session, track: str, run_id: int) -> tuple[int, dict[str, int]]:
    """Return how many other candidates of the track were judged, and how many of them on each held-out version."""
    count = select(Run.heldout_version, func.count()).group_by(col(Run.heldout_version))
    others = count.where(Run.track == track, Run.id != run_id, col(Run.outcome).in_(JUDGED))
    found = list(session.exec(others).all())
    return sum(number for _, number in found), {version: number for version, number in found if version is not None}


def suspend_new_drops(session: Session, run: Run, reason: str, now: int) -> list[int]:
    """
    Take the drops for training that were new in a run out of later snapshots; return their numbers.

    New are those that no other candidate was judged with, since they came or a person last restored them: a run that
    ended without a verdict clears nobody. Works in the transaction that ends the run: drops are not suspended for a
    verdict that is not acted on.
    """
    suspended = new_drops(session, run, DropState.ACCEPTED)
    for drop in suspended:
        drop.state, drop.reason = DropState.SUSPENDED, reason
        session.add(drop)
        record_event(session, "drop_suspended", now, track=drop.track, run_id=run.id, drop_id=drop.id, reason=reason)
    return [drop.id or 0 for drop in suspended]


def withdrawn_from(session: Session, run: Run) -> list[Drop]:
    """Return the drops in a run's snapshot, for training or held out, that were withdrawn since, the oldest first."""
    ids = [drop["id"] for drop in run.snapshot or ()]
    return withdrawn(session.exec(select(Drop).where(col(Drop.id).in_(ids)).order_by(col(Drop.id))))


def rests_on_withdrawn(session: Session, run: Run) -> bool:
    """
    Say whether a verdict on a run may be all about drops that were withdrawn meanwhile.

    Such are those for training that were new in it, as `suspend_new_drops` has it, and held-out ones, old or new.
    """
    ids = [drop["id"] for drop in run.snapshot or ()]
    asked = select(Drop.id).where(col(Drop.id).in_(ids), Drop.state == DropState.WITHDRAWN, Drop.role == "heldout")
    return bool(new_drops(session, run, DropState.WITHDRAWN)) or session.exec(asked).first() is not None


def new_drops(session: Session, run: Run, state: DropState) -> list[Drop]:
    """Return the drops for training in a run that no other candidate was judged with, as `suspend_new_drops` has it."""
    old = _cleared(session, run)
    ids = [drop["id"] for drop in run.snapshot or () if drop["id"] not in old]
    new = select(Drop).where(col(Drop.id).in_(ids), Drop.state == state, Drop.role == "train")
    return list(session.exec(new.order_by(col(Drop.id))).all())


def excuse_new_drops(session: Session, run: Run, now: int) -> None:
    """
    Note that what a run's verdict says does not count for its drops: none is suspended, and none is cleared.

    Only its promotion clears them still. Works in the caller's transaction; once is enough.
    """
    noted = select(Event.id).where(Event.kind == _EXCUSED, Event.run_id == run.id)
    if session.exec(noted).first() is None:
        record_event(session, _EXCUSED, now, track=run.track, run_id=run.id)


def _cleared(session: Session, run: Run) -> set[int]:
    """
    Return the drops of a run that other candidates of the track were judged with since they came or were restored.

    One whose verdict was excused clears nobody: what it said may be true of its drops, or of others. What came after
    what is told by the numbers of the events: a clock may be set back.
    """
    ids = [int(str(drop["id"])) for drop in run.snapshot or ()]
    restored = select(Event.drop_id, func.max(Event.id)).where(Event.kind == "drop_restored")
    back = dict(session.exec(restored.where(col(Event.drop_id).in_(ids)).group_by(col(Event.drop_id))).all())
    ended = select(func.max(Event.id)).where(Event.run_id == Run.id, Event.kind == "run_succeeded")
    excused = select(Event.run_id).where(Event.kind == _EXCUSED, Event.track == run.track)
    judged = select(Run.snapshot, ended.scalar_subquery()).where(
        Run.track == run.track,
        Run.id != run.id,
        col(Run.outcome).in_(_CLEARING),
        or_(col(Run.id).not_in(excused), col(Run.outcome) == "promoted"),
    )
    found: set[int] = set()
    for snapshot, at in session.exec(judged).all():
        known = {int(str(drop["id"])) for drop in snapshot or ()}
        found.update(drop for drop in known if drop not in back or (at or 0) > (back[drop] or 0))
    return found


def _as_artifact(drop: Drop) -> artifacts.Drop:
    path = f"drops/{drop.sha256}.jsonl"
    return artifacts.Drop.model_validate(
        {"id": drop.id, "sha256": drop.sha256, "name": drop.name, "path": path, "role": drop.role, "rows": drop.rows}
    )
