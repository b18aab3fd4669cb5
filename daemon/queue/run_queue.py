"""
The queue of runs: every change of `Run.state`, each in one transaction with its event.

A run's owner holds a claim token, and each of its writes is conditional on the token: a daemon that lost its run cannot
end a run that another daemon adopted. Every time is in whole milliseconds since the epoch and given by the caller.
"""

import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Engine, bindparam
from sqlmodel import Session, col, select

from daemon.queue.attempt_ends import POSTPONED_MS, Leave
from daemon.queue.snapshots import free_drops, records_came, take_snapshot
from daemon.queue.states import (
    FINAL,
    RETRIABLE,
    Claim,
    Move,
    change,
    ensure_track,
    held_run,
    known_run,
    require_not_cancelled,
)
from daemon.settings.model import RetrySettings, Settings
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.states import AWAITING, Purpose, RunState, state_words
from daemon.state.tables import Drop, Run
from pipeline.artifacts import Verdict
from pipeline.config import RunConfig
from pipeline.decide.explain import brief
from pipeline.errors import DropforgeError
from pipeline.search_settings import SearchConfig

#: Drops that keep coming postpone a run for so long at most.
_LONGEST_QUIET_MS = 3_600_000

# Built once, like the statements of `states`.
_OPENED = select(Run).where(col(Run.track) == bindparam("of_track"), Run.state == RunState.QUEUED)


def enqueue(session: Session, track: str, trigger: str, now: int, not_before: int) -> Run:
    """
    Return the track's queued run, inserted if there is none; `not_before` may make it due later, never earlier.

    A run that is queued already keeps its trigger. A missing track is added. Works in the caller's transaction.
    """
    ensure_track(session, track, now)
    run = _opened(session, track)
    if run is None:
        run = Run(track=track, trigger=trigger, created_at=now, not_before=not_before)
        session.add(run)
        session.flush()
        record_event(session, "run_queued", now, track=track, run_id=run.id, trigger=trigger)
    elif run.not_before < not_before:
        run.not_before = not_before
        session.add(run)
        session.flush()
    return run


def enqueue_for_drop(session: Session, settings: Settings, drop: Drop, now: int) -> Run | None:
    """
    Queue and return the run that an accepted drop starts; `None` if it starts none.

    Call it in the transaction that accepts the drop. Training records start a run, or postpone the queued run; pinned
    records only if the track's last run ended for lack of them. Tracks that run at night only start none here.
    """
    starts = drop.role == "train" or records_came(session, settings, drop.track)
    return enqueue_when_quiet(session, settings, drop.track, now) if starts else None


def enqueue_when_quiet(session: Session, settings: Settings, name: str, now: int) -> Run | None:
    """
    Queue the run for a new drop of track `name`, or postpone the queued run until the track is quiet; return the run.

    The run is due `run_after_quiet_seconds` after the last drop. Drops that keep coming postpone it for an hour at
    most, or for one quiet time if that is longer. Works in the caller's transaction. Returns `None` if the track is not
    declared or runs at night only.
    """
    track = settings.track(name) if name in settings.track_names else None
    if track is None or track.trigger == "nightly":
        return None
    opened = _opened(session, name)
    since = now if opened is None else opened.created_at
    quiet = round(track.run_after_quiet_seconds * 1000)
    not_before = min(now + quiet, since + max(quiet, _LONGEST_QUIET_MS))
    return enqueue(session, name, "drop", now, not_before)


def enqueue_by_hand(engine: Engine, track: str, now: int, *, search: bool = False) -> tuple[int, Sequence[Drop]]:
    """
    Queue a run of the track to begin at once; return its id and the drops that it would use now, oldest first.

    A run of the track that is queued already is made due instead; it becomes a search with `search`. Raises
    `DropforgeError` if the track has no accepted training drop, or all of them are on trial.
    """
    with transaction(engine) as session:
        drops = free_drops(session, None, col(Drop.track) == track)
        if all(drop.role != "train" for drop in drops):
            message = f"track {track} has no drop to train on"
            raise DropforgeError(message, "drop a file of records into its inbox; what is there: dropforge drops")
        run = enqueue(session, track, "hand", now, now)
        if search:
            run.trigger, run.purpose = "hand", Purpose.SEARCH
        run.not_before = min(run.not_before, now)
        session.add(run)
        return run.id or 0, drops


def begin(session: Session, run: Run, config: RunConfig, now: int) -> bool:
    """
    Set configuration and snapshot of a run that is due; return whether it can be claimed.

    The snapshot is the result of `take_snapshot`. A run without any training drop is cancelled: `False`. A run about
    one drop gets another seed than `config` and starts from the base. A search with `when` = "asked" is dropped unless
    the run's purpose is `SEARCH`.
    """
    snapshot = take_snapshot(session, run)
    if not snapshot:
        reason = f"no accepted drop of track {run.track} is left to train on"
        values = {"error": reason, "hint": f"drop a file into the inbox of track {run.track}"}
        change(session, run, Move(RunState.CANCELLED, "run_cancelled", values, {"reason": reason}), now)
        return False
    if run.about_drop is not None:
        # Another draw: what the seed did to the run that was worse must not be held against a drop once more.
        seed = (config.train.seed + (run.id or 0)) % (1 << 32)  # of the seeds that training takes
        # A control has no new row to continue the champion's training with, and a trial is trained as its control is.
        config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed, "start": "base"})})
    if config.train.search.when == "asked" and run.purpose != Purpose.SEARCH:
        config = config.model_copy(update={"train": config.train.model_copy(update={"search": SearchConfig()})})
    run.snapshot, run.config = snapshot, config.model_dump(mode="json")
    run.error = run.hint = None
    session.add(run)
    return True


def postpone(session: Session, run: Run, error: DropforgeError, now: int) -> None:
    """Store in a due run the error that keeps it from being claimed, with an event if new; postpone the run by 30 s."""
    if (run.error, run.hint) != (error.message, error.hint):
        record_event(session, "run_blocked", now, track=run.track, run_id=run.id, error=error.message)
    run.error, run.hint, run.not_before = error.message, error.hint, now + POSTPONED_MS
    session.add(run)


def claim(session: Session, run: Run, now: int) -> Claim:
    """Set a due run to running under a new token and return the claim, in the transaction that found the run due."""
    held = Claim(run.id or 0, uuid.uuid4().hex)
    values = {"token": held.token, "started_at": run.started_at or now}
    change(session, run, Move(RunState.RUNNING, "run_claimed", values), now)
    return held


def finish(session: Session, claim: Claim, outcome: str, verdict: Verdict, now: int) -> Run:
    """
    Set the claimed run to succeeded with its verdict and return it, in the transaction that applies the verdict.

    `outcome` is the verdict's, or another one for a win that waits for approval. Raises `LostClaim` if the claim is not
    valid any more, `Cancelled` if the run is to be cancelled.
    """
    values = {
        "outcome": outcome,
        "verdict": brief(verdict),
        "heldout_version": verdict.heldout_version if verdict.candidate_model_id else None,
        "error": None,
        "hint": None,
        "cancel_requested": False,
    }
    run = held_run(session, claim)
    require_not_cancelled(run)
    change(session, run, Move(RunState.SUCCEEDED, "run_succeeded", values, {"outcome": outcome}), now)
    return run


def settle(session: Session, trial: Run, outcome: str, verdict: Verdict, now: int) -> None:
    """Replace outcome and verdict of a trial that its control has settled, with an event."""
    trial.outcome, trial.verdict = outcome, brief(verdict)
    session.add(trial)
    by = verdict.settled_by
    record_event(session, "trial_settled", now, track=trial.track, run_id=trial.id, outcome=outcome, control=by)


def leave(engine: Engine, claim: Claim, leave: Leave, now: int, retry: RetrySettings) -> Move:
    """
    Release the claimed run by `Leave.move`, or cancel it if that was requested; return the change that was made.

    Raises `LostClaim` if the claim is not valid any more.
    """
    with transaction(engine) as session:
        run = held_run(session, claim)
        move = leave.move(run, now, retry)
        if run.cancel_requested:
            values = {**move.values, "error": run.error, "hint": run.hint}
            move = Move(RunState.CANCELLED, "run_cancelled", values, move.detail)
        change(session, run, move, now)
        return move


def rescue(engine: Engine, now: int) -> list[Claim]:
    """
    Claim every running run under a new token; return the claims, oldest run first.

    The caller holds the state folder's lock, so no other daemon works on these runs.
    """
    claims = []
    with transaction(engine) as session:
        for run in session.exec(select(Run).where(Run.state == RunState.RUNNING).order_by(col(Run.id))):
            held = Claim(run.id or 0, uuid.uuid4().hex)
            change(session, run, Move(RunState.RUNNING, "run_adopted", {"token": held.token}), now)
            claims.append(held)
    return claims


def retry(session: Session, run_id: int, now: int) -> RunState:
    """
    Set a failed, cancelled or crashed run to waiting or queued, with its counters at zero; return its new state.

    It resumes where it stopped, with today's settings and without drops that were withdrawn or suspended meanwhile.
    Raises `DropforgeError` for a run that is unknown or in any other state, and for a run without a snapshot whose
    track has a queued run already.
    """
    run = known_run(session, run_id)
    if run.state not in RETRIABLE:
        message = f"run {run_id} {state_words(run.state)}: only a failed, cancelled or crashed run can be retried"
        raise DropforgeError(message, f"look at it: dropforge show {run_id}")
    to = RunState.QUEUED if run.snapshot is None else RunState.WAITING
    opened = _opened(session, run.track)
    if to == RunState.QUEUED and opened is not None:
        message = f"run {run_id} never began, and run {opened.id} of track {run.track} will include its drops"
        raise DropforgeError(message, f"wait for that one: dropforge show {opened.id}")
    cleared: dict[str, object] = dict.fromkeys(("config", "ended_at", "error", "hint"))
    values = {**cleared, "failures": 0, "deaths": 0, "cancel_requested": False, "not_before": now, "place": 0}
    return change(session, run, Move(to, "run_retried", values), now)


def cancel(engine: Engine, run_id: int, now: int) -> RunState:
    """
    Cancel a run that is queued, waiting or awaiting approval; of a running run request it, and its owner cancels it.

    Returns the run's new state, `RUNNING` if it was only requested. Raises `DropforgeError` for a run that has ended or
    does not exist.
    """
    with transaction(engine) as session:
        run = known_run(session, run_id)
        if run.state in FINAL and run.outcome != AWAITING:
            raise DropforgeError(f"run {run_id} has ended already: {run.state}", f"look at it: dropforge show {run_id}")
        return call_off(session, run, now)


def call_off(session: Session, run: Run, now: int, why: str | None = None) -> RunState:
    """
    Cancel a run, or request it if the run is running; `why` becomes the run's error. Return its new state.

    A run that succeeded loses its verdict. Raises `DropforgeError` if the run ended in any other state.
    """
    detail: dict[str, Any] = {"reason": why} if why else {}
    if run.state != RunState.RUNNING:
        values = {"error": why, **dict.fromkeys(("hint", "outcome", "verdict", "heldout_version"))}
        return change(session, run, Move(RunState.CANCELLED, "run_cancelled", values, detail), now)
    if why or not run.cancel_requested:
        run.error, run.hint = why, None
    if not run.cancel_requested:
        run.cancel_requested = True
        record_event(session, "run_cancel_requested", now, track=run.track, run_id=run.id, **detail)
    session.add(run)
    return RunState.RUNNING


def _opened(session: Session, track: str) -> Run | None:
    """Return the track's queued run, of which there is one at most; `None` if there is none."""
    return session.exec(_OPENED, params={"of_track": track}).first()
