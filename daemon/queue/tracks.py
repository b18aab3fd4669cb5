"""The rows of tracks: made when first needed, and what their first run fixes for all later ones."""

import secrets
from collections.abc import Collection
from typing import Any

from sqlalchemy import Engine
from sqlmodel import Session

from daemon.queue.claims import Claim, held_run
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.tables import Track


def ensure_track(session: Session, name: str, now: int) -> Track:
    """Return the row of track `name`, made in the caller's transaction if it is new."""
    track = session.get(Track, name)
    if track is None:
        track = Track(name=name, salt=secrets.token_hex(16), created_at=now)
        session.add(track)
        session.flush()
        record_event(session, "track_created", now, track=name)
    return track


def fix_track(engine: Engine, claim: Claim, now: int, *, anew: Collection[str] = (), **facts: Any) -> None:
    """
    Write on the run's track what its first verdict decides for all later runs; but for `anew`, what stands there stays.

    Facts are named as the columns of `Track`. One that is `None` or 0 is not known yet.
    """
    with transaction(engine) as session:
        run = held_run(session, claim)
        track = session.get_one(Track, run.track)
        new = {name: value for name, value in facts.items() if value and (name in anew or getattr(track, name) is None)}
        for name, value in new.items():
            setattr(track, name, value)
        if new:
            session.add(track)
            record_event(session, "track_fixed", now, track=track.name, run_id=run.id, **new)
