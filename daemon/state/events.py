"""Record an event: a row in the transaction of the change that it is about."""

from dataclasses import dataclass

from sqlalchemy import insert
from sqlmodel import Session

from daemon.state.tables import Event

# Made once: putting a statement together takes longer than SQLite's own work on it.
_EVENT = insert(Event.metadata.tables["event"])


@dataclass(frozen=True)
class Word:
    """Why something was decided, when, and by which person; `None` stands for the daemon itself."""

    reason: str
    at: int
    by: str | None = None


def record_event(  # noqa: PLR0913 - what it is about goes by name, and most events name one thing
    session: Session,
    kind: str,
    now: int,
    *,
    track: str | None = None,
    run_id: int | None = None,
    drop_id: int | None = None,
    **detail: object,
) -> None:
    """Write the event `kind` (what happened, in the past) with its JSON `detail` in the caller's transaction."""
    row = {"at": now, "kind": kind, "track": track, "run_id": run_id, "drop_id": drop_id, "detail": detail}
    session.connection().execute(_EVENT, row)
