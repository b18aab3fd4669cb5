"""
Drops that a person withdrew, in what was made with them: runs that have their snapshot, and wins.

A withdrawn drop leaves at the next snapshot; a run that has its own goes on. What comes of it is not promoted without a
person's word, and the other drops that were new in it are trained on again without the withdrawn one: after a bad
verdict, too.
"""

from collections.abc import Sequence

from sqlmodel import Session, col, select

from daemon.queue.run_queue import enqueue_when_quiet
from daemon.queue.snapshots import excuse_new_drops, give_back, new_drops
from daemon.settings.model import Settings
from daemon.state.states import DropState
from daemon.state.tables import Drop, Run
from pipeline.errors import DropforgeError


class Withdrawn(DropforgeError):
    """The model was trained or judged on a drop that was withdrawn since: only a person takes it all the same."""


def withdrawn_from(session: Session, run: Run) -> list[Drop]:
    """Return the drops in a run's snapshot, for training or held out, that were withdrawn since, the oldest first."""
    ids = [drop["id"] for drop in run.snapshot or ()]
    wanted = select(Drop).where(col(Drop.id).in_(ids), Drop.state == DropState.WITHDRAWN)
    return list(session.exec(wanted.order_by(col(Drop.id))).all()) if ids else []


def withdrawal_words(drops: Sequence[Drop]) -> str:
    """Say that a model was trained, or judged, on withdrawn drops, and why each was withdrawn."""
    said = []
    for role, was in (("train", "trained"), ("heldout", "judged")):
        own = [f"drop {drop.id} ({drop.name}), withdrawn since: {drop.reason}" for drop in drops if drop.role == role]
        said += [f"it was {was} on {' and '.join(own)}"] if own else []
    return ", and ".join(said)


def excuse_words(drops: Sequence[Drop]) -> str:
    """Say what becomes of a bad verdict that may be all about withdrawn drops."""
    named = " and ".join(f"drop {drop.id} ({drop.name})" for drop in drops)
    were, it = ("was", "it") if len(drops) == 1 else ("were", "them")
    kept = f"no drop is suspended for this, and what else was new is trained on without {it}"
    return f"{named[:1].upper()}{named[1:]} {were} withdrawn meanwhile: {kept}."


def require_no_withdrawal(session: Session, run_id: int, forcing: str) -> None:
    """Raise `Withdrawn` if a drop that the run's model was trained or judged on was; `forcing` takes it still."""
    gone = withdrawn_from(session, session.get_one(Run, run_id))
    if gone:
        message = f"run {run_id} won, but {withdrawal_words(gone)}"
        again = ", ".join(f"dropforge drops restore {drop.id} --reason TEXT" for drop in gone)
        raise Withdrawn(message, f"a run on new data goes without it; to take it back: {again}; as it is: {forcing}")


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
            return enqueue_when_quiet(session, run.track, track, now)
    return None
