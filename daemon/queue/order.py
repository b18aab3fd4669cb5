"""
The order in which runs begin, and the commands that change it: move a run to the front, pause or resume a track.

Of each track one run at a time is running. By default waiting runs go first, then queued runs, oldest first in each
group, and trials last. `Run.place` goes before that, lowest first: it is 0 until a person moves the run to the front.

A paused track begins and resumes no run; a run that is running continues to its end. Drops are still taken in and runs
are still queued, nightly ones as well.
"""

from collections.abc import Sequence

from sqlalchemy import Engine, func, text
from sqlmodel import Session, col, select

from daemon.queue.states import ensure_track, known_run
from daemon.state.database import transaction
from daemon.state.events import Word, record_event
from daemon.state.questions import IS_DUE, MAY_BEGIN
from daemon.state.states import OPEN_STATES, RunState, queue_order, state_words
from daemon.state.tables import Run, Track
from pipeline.errors import DropforgeError

# Built once, like the statements of `states`.
_TRACK_IS_FREE = text("track NOT IN (SELECT track FROM run WHERE state = 'running')")
_DUE = select(Run).where(text(IS_DUE), _TRACK_IS_FREE)
_NEXT = select(func.min(Run.not_before)).where(text(MAY_BEGIN), _TRACK_IS_FREE)
_OPEN = select(Run).where(col(Run.state).in_(OPEN_STATES))


def due_runs(session: Session, now: int) -> list[Run]:
    """Return the queued and waiting runs that are due at `now` and whose track is not paused or running, in order."""
    return _in_order(session.exec(_DUE, params={"now": now}).all())


def next_due(engine: Engine) -> int | None:
    """Return the earliest due time (ms) of the runs whose track is neither paused nor running; `None` without any."""
    with transaction(engine) as session:
        due: int | None = session.exec(_NEXT).one()
    return due


def move_first(engine: Engine, run_id: int, now: int, by: str) -> list[int]:
    """
    Move a queued or waiting run to the front of the queue; return the ids of all queued and waiting runs in order.

    The event names `by`, the user. The run still waits until its own time: a back-off, its track's quiet. A running run
    is placed before it. Raises `DropforgeError` if the run is unknown, or neither queued nor waiting.
    """
    with transaction(engine) as session:
        run = known_run(session, run_id)
        if run.state not in {RunState.QUEUED, RunState.WAITING}:
            message = f"run {run_id} {state_words(run.state)}: only a queued or waiting run can be moved"
            raise DropforgeError(message, "list them: dropforge runs --state queued")
        line = session.exec(_OPEN).all()
        run.place = min(other.place for other in line) - 1
        for other in line:
            if other.state == RunState.RUNNING:
                other.place = run.place - 1  # it goes on first if it is interrupted
        record_event(session, "run_moved", now, track=run.track, run_id=run_id, by=by)
        return [other.id or 0 for other in _in_order(line) if other.state != RunState.RUNNING]


def _in_order(runs: Sequence[Run]) -> list[Run]:
    return sorted(runs, key=lambda run: queue_order(run.state, run.about_drop, run.place, run.id or 0))


def pause(engine: Engine, track: str, word: Word) -> None:
    """
    Pause a track, added if unknown: until `resume` no run of it begins or resumes; a running run goes on.

    Raises `DropforgeError` if the track is paused already.
    """
    with transaction(engine) as session:
        row = ensure_track(session, track, word.at)
        if row.paused is not None:
            message = f"track {track} is paused already: {row.paused['reason']}"
            raise DropforgeError(message, f"to resume: dropforge resume {track}")
        row.paused = {"reason": word.reason, "by": word.by, "at": word.at}
        session.add(row)
        record_event(session, "track_paused", word.at, track=track, reason=word.reason, by=word.by)


def resume(engine: Engine, track: str, word: Word) -> None:
    """Resume a paused track; the reason may be empty. Raises `DropforgeError` if the track is not paused."""
    with transaction(engine) as session:
        row = session.get(Track, track)
        if row is None or row.paused is None:
            raise DropforgeError(f"track {track} is not paused", "see what it waits for: dropforge status")
        row.paused = None
        session.add(row)
        record_event(session, "track_resumed", word.at, track=track, reason=word.reason, by=word.by)
