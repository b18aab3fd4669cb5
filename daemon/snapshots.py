"""Which drops a run sees: its snapshot, what waits for the next one, what is held back after a bad one."""

from sqlalchemy import Engine, func
from sqlmodel import Session, col, select

from daemon.claims import Claim, held_run, record_event
from daemon.database import transaction
from daemon.tables import Drop, DropState, Run
from pipeline import artifacts


def take_snapshot(session: Session, run: Run) -> list[dict[str, object]]:
    """
    Return the accepted drops of the run's track as JSON of `artifacts.Drop`, oldest first.

    Each that is in a snapshot for the first time is marked with this run. Empty if no drop is for training.
    """
    accepted = select(Drop).where(Drop.track == run.track, Drop.state == DropState.ACCEPTED).order_by(col(Drop.id))
    drops = session.exec(accepted).all()
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


def hold_new_drops(engine: Engine, claim: Claim, reason: str, now: int) -> list[int]:
    """
    Take the drops for training that were new in the claim's run out of later snapshots; return their numbers.

    Raises `LostClaim` if the run is not the owner's any more.
    """
    held, run_id = [], claim.run_id
    with transaction(engine) as session:
        held_run(session, claim)
        new = select(Drop).where(Drop.first_run == run_id, Drop.state == DropState.ACCEPTED, Drop.role == "train")
        for drop in session.exec(new.order_by(col(Drop.id))).all():
            drop.state, drop.reason = DropState.HELD, reason
            session.add(drop)
            record_event(session, "drop_held", now, track=drop.track, run_id=run_id, drop_id=drop.id, reason=reason)
            held.append(drop.id or 0)
    return held


def _as_artifact(drop: Drop) -> artifacts.Drop:
    path = f"drops/{drop.sha256}.jsonl"
    return artifacts.Drop.model_validate(
        {"id": drop.id, "sha256": drop.sha256, "name": drop.name, "path": path, "role": drop.role, "rows": drop.rows}
    )
