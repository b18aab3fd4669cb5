"""
Pause a track and let it go on.

A paused track begins no run, and none of its interrupted ones goes on; a running one ends as it would have. It takes in
drops, queues its run and keeps its nights as ever.
"""

from sqlalchemy import Engine

from daemon.queue.tracks import ensure_track
from daemon.state.database import transaction
from daemon.state.events import Word, record_event
from daemon.state.tables import Track
from pipeline.errors import DropforgeError


def pause(engine: Engine, track: str, word: Word) -> None:
    """Let a known track begin no run until `resume`. Raises `DropforgeError` if it is paused already."""
    with transaction(engine) as session:
        row = ensure_track(session, track, word.at)
        if row.paused is not None:
            message = f"track {track} is paused already: {row.paused['reason']}"
            raise DropforgeError(message, f"to let it go on: dropforge resume {track}")
        row.paused = {"reason": word.reason, "by": word.by, "at": word.at}
        session.add(row)
        record_event(session, "track_paused", word.at, track=track, reason=word.reason, by=word.by)


def resume(engine: Engine, track: str, word: Word) -> None:
    """Let a paused track begin runs again; the reason may be empty. Raises `DropforgeError` if it is not paused."""
    with transaction(engine) as session:
        row = session.get(Track, track)
        if row is None or row.paused is None:
            raise DropforgeError(f"track {track} is not paused", "see what it waits for: dropforge status")
        row.paused = None
        session.add(row)
        record_event(session, "track_resumed", word.at, track=track, reason=word.reason, by=word.by)
