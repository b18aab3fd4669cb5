"""Which drops a run sees: its snapshot, what waits for the next one, what is suspended after a bad one."""

from collections.abc import Sequence

from sqlalchemy import func, or_, update
from sqlmodel import Session, col, select

from daemon.state.events import record_event
from daemon.state.states import DropState
from daemon.state.tables import Drop, Event, Run
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

    Each that is in a snapshot for the first time is marked with this run. Empty if no drop is for training.
    """
    accepted = select(Drop).where(Drop.track == run.track, Drop.state == DropState.ACCEPTED).order_by(col(Drop.id))
    return _taken(session, run, session.exec(accepted).all())


def retake_snapshot(session: Session, run: Run) -> list[dict[str, object]]:
    """Return what is still accepted of a retried run's snapshot; empty if no drop is for training."""
    ids = [drop["id"] for drop in run.snapshot or ()]
    still = select(Drop).where(col(Drop.id).in_(ids), Drop.state == DropState.ACCEPTED).order_by(col(Drop.id))
    return _taken(session, run, session.exec(still).all())


def give_back(session: Session, run_id: int) -> None:
    """Let the drops that were new in a run that ended without a verdict wait for a run again."""
    session.exec(update(Drop).where(col(Drop.first_run) == run_id).values(first_run=None))


def _taken(session: Session, run: Run, drops: Sequence[Drop]) -> list[dict[str, object]]:
    if all(drop.role != "train" for drop in drops):
        return []
    for drop in drops:
        if drop.first_run is None:
            drop.first_run = run.id
            session.add(drop)
    return [_as_artifact(drop).model_dump(mode="json") for drop in drops]


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


def new_drops(session: Session, run: Run, state: DropState) -> list[Drop]:
    """Return the drops for training in a run that no other candidate was judged with, as `suspend_new_drops` has it."""
    old = _cleared(session, run)
    ids = [drop["id"] for drop in run.snapshot or () if drop["id"] not in old]
    new = select(Drop).where(col(Drop.id).in_(ids), Drop.state == state, Drop.role == "train")
    return list(session.exec(new.order_by(col(Drop.id))).all())


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
