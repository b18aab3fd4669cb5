"""
Cancel runs: one that a person names, and those that were made from a drop that a person withdraws.

A running one is asked to end, and its owner ends it. From then on nobody acts on its verdict: whoever does asks
`claims.require_not_cancelled` in the same transaction.
"""

from typing import Any

from sqlalchemy import Engine, or_, update
from sqlmodel import Session, col, select

from daemon.queue.claims import Claim, held_run
from daemon.queue.snapshots import give_back
from daemon.queue.states import FINAL, Move, change, known_run
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.states import RunState
from daemon.state.tables import Drop, Run, Suspect, promotion_of, waits
from pipeline.errors import DropforgeError


def cancel(engine: Engine, run_id: int, now: int) -> RunState:
    """
    End a queued or waiting run at once; ask for the end of a running one, whose owner calls `cancelled`.

    Returns the state that the run is in now. Raises `DropforgeError` for a run that has ended or does not exist, or
    whose model serves already.
    """
    with transaction(engine) as session:
        run = known_run(session, run_id)
        if run.state in FINAL:
            raise DropforgeError(f"run {run_id} has ended already: {run.state}", f"look at it: dropforge show {run_id}")
        if run.state != RunState.RUNNING and promotion_of(session, run_id) is not None:
            message = f"the model of run {run_id} is the champion of track {run.track} already; the run ends by itself"
            raise DropforgeError(message, f"to go back to the model before: dropforge rollback --track {run.track}")
        return call_off(session, run, now)


def cancel_made_from(session: Session, drop: Drop, now: int) -> list[int]:
    """
    Cancel the runs of a drop's track that were made from it, for training or held out; return their numbers.

    That is open ones, as `cancel` does, and wins that wait for approval, which lose their verdict. A run whose model
    serves is left as it is. What was new in them is unseen again, and so is a drop that a trial tried: where its win
    waited, the search for it was over, and no other run has it. Works in the caller's transaction.
    """
    going = col(Run.state).in_([RunState.QUEUED, RunState.WAITING, RunState.RUNNING])
    asked = select(Run).where(Run.track == drop.track, or_(going, waits())).order_by(col(Run.id))
    made = [run for run in session.exec(asked).all() if any(one["id"] == drop.id for one in run.snapshot or ())]
    runs = [run for run in made if promotion_of(session, run.id or 0) is None]
    for run in runs:
        call_off(session, run, now, f"drop {drop.id} ({drop.name}) was withdrawn")
        give_back(session, run.id or 0)
        tried = select(Suspect.drop_id).where(Suspect.trial_run == run.id, Suspect.drop_id != drop.id)
        session.exec(update(Drop).where(col(Drop.id).in_(tried)).values(first_run=None))
    return [run.id or 0 for run in runs]


def cancelled(engine: Engine, claim: Claim, now: int) -> None:
    """End a running run that a person wanted cancelled."""
    with transaction(engine) as session:
        change(session, held_run(session, claim), Move(RunState.CANCELLED, "run_cancelled"), now)


def call_off(session: Session, run: Run, now: int, why: str | None = None) -> RunState:
    """Cancel a run, or ask the owner of a running one to; `why`, or nothing, becomes its error. Return its state."""
    detail: dict[str, Any] = {"reason": why} if why else {}
    if run.state != RunState.RUNNING:
        values = {"error": why, **dict.fromkeys(("hint", "outcome", "sentence", "heldout_version", "gain"))}
        return change(session, run, Move(RunState.CANCELLED, "run_cancelled", values, detail), now)
    if why or not run.cancel_requested:
        run.error, run.hint = why, None
    if not run.cancel_requested:
        run.cancel_requested = True
        record_event(session, "run_cancel_requested", now, track=run.track, run_id=run.id, **detail)
    session.add(run)
    return RunState.RUNNING
