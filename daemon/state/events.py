"""Record an event as a row in the same transaction as the change that it describes."""

from dataclasses import dataclass

from sqlalchemy import insert
from sqlmodel import Session

from daemon.state.tables import Event

# Made once: putting a statement together takes longer than SQLite's own work on it.
_EVENT = insert(Event.metadata.tables["event"])


@dataclass(frozen=True)
class Word:
    """The reason, time (ms since the epoch) and author of a decision; author `None` is the daemon itself."""

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
    """
    Insert an event of `kind` (in the past tense: `run_failed`) at `now` (ms since the epoch); do not commit.

    Further keyword arguments, which must be JSON values, become the event's `detail`.
    """
    row = {"at": now, "kind": kind, "track": track, "run_id": run_id, "drop_id": drop_id, "detail": detail}
    session.connection().execute(_EVENT, row)
