"""What follows from an accepted drop, in the transaction that records it: its run, and what its track lacks still."""

from sqlmodel import Session

from daemon.inbox.minimum import too_few
from daemon.queue import run_queue, tracks
from daemon.queue.yardstick import accepted_rows, records_came
from daemon.settings.model import Settings
from daemon.state.states import DropState
from daemon.state.tables import Drop
from pipeline.validation.validate import Notice


def follow_up(session: Session, settings: Settings, drop: Drop, now: int) -> tuple[int | None, tuple[Notice, ...]]:
    """
    Queue the run that a new drop starts, and return its number, with a warning where the track cannot get a verdict.

    Records to train on start a run, and pinned ones where the track's last run ended for want of them.
    """
    tracks.ensure_track(session, drop.track, now)
    session.add(drop)
    session.flush()
    track, run = settings.track(drop.track), None
    starts = drop.role == "train" or records_came(session, settings, drop.track)
    if starts and track.trigger in {"drop", "both"}:
        run = run_queue.enqueue_when_quiet(session, drop.track, track, now).id
    if drop.state != DropState.ACCEPTED or (drop.role == "heldout" and track.gate.on != "pinned"):
        return run, ()
    said = too_few(drop.track, track, *accepted_rows(session, drop.track))
    return run, () if said is None else (Notice(kind="too_few_rows", key=None, rows=drop.rows, message=said),)
