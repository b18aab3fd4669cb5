"""What follows from an accepted drop: its run, what its track lacks still, and which of its rows are never used."""

from collections.abc import Sequence

from sqlmodel import Session, select

from daemon.inbox.answers.remarks import pinned_already, too_few
from daemon.inbox.watcher import Settled
from daemon.queue import run_queue, tracks
from daemon.queue.yardstick import accepted_rows, records_came
from daemon.settings.model import Settings
from daemon.state.states import DropState
from daemon.state.tables import Drop
from pipeline.records.validate import Notice


def follow_up(
    session: Session, settings: Settings, drop: Drop, now: int, metric: str | None
) -> tuple[int | None, tuple[Notice, ...]]:
    """
    Queue the run that a new drop starts, and return its number, with a warning where the track cannot get a verdict.

    Works in the transaction that records the drop. Records to train on start a run, and pinned ones where the track's
    last run ended for want of them. `metric` is what the drop's answers are likely to be judged by.
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
    fixed, rows = accepted_rows(session, drop.track)
    said = too_few(drop.track, track, fixed or metric, rows)
    return run, () if said is None else (Notice(kind="too_few_rows", key=None, rows=drop.rows, message=said),)


def pinned_drops(session: Session, settled: Settled) -> Sequence[str]:
    """Return the sha256 of each drop whose records a file must not repeat: pinned ones, where it is to train on."""
    of_track = select(Drop.sha256).where(Drop.track == settled.track, Drop.state == DropState.ACCEPTED)
    return session.exec(of_track.where(Drop.role == "heldout")).all() if settled.role == "train" else ()


def held_out_already(drop: Drop, rows: int) -> tuple[Notice, ...]:
    """Return the warning that so many rows of a new drop are pinned as held-out records."""
    said = pinned_already(drop.name, rows, drop.rows)
    return () if said is None else (Notice(kind="held_out", key=None, rows=rows, message=said),)
