"""The tables of the messages, of which only `daemon.messages.outbox` writes rows; `tables` has all others."""

from sqlalchemy import CheckConstraint, Index, text
from sqlmodel import Field, SQLModel

from daemon.state.column_rules import one_of
from daemon.state.states import MessageState


class Message(SQLModel, table=True):
    """One message to one address, made from an event or for a day's digest."""

    __table_args__ = (
        one_of("state", MessageState),
        CheckConstraint("(state = 'pending') = (ended_at IS NULL)", name="ended_has_time"),
        Index("one_message_an_event", "event_id", "address", unique=True),
        Index("message_pending", "address", sqlite_where=text("state = 'pending'")),
        Index("message_kinds", "kind", "created_at"),
    )

    #: Messages to one address are sent in the order of their ids.
    id: int | None = Field(default=None, primary_key=True)
    #: `None` for a digest.
    event_id: int | None = Field(default=None, foreign_key="event.id")
    #: The first digits of the hash of its URL, which itself is a secret of the settings.
    address: str
    #: That of its event, or `digest`.
    kind: str
    #: Severity as Apprise names it: info, success, warning, failure.
    level: str
    title: str
    body: str
    state: str = MessageState.PENDING
    created_at: int
    #: Counted before each try.
    tries: int = 0
    #: Not tried before: the end of a back-off.
    not_before: int
    ended_at: int | None = None
    #: The error of the last try; `None` if it did not fail.
    error: str | None = None


class Outbox(SQLModel, table=True):
    """The cursor of the events turned into messages: one row, while addresses are set."""

    id: int | None = Field(default=None, primary_key=True)
    #: Ids of the last event handled, and of the last event before the latest digest.
    event_id: int
    digest_event_id: int
    #: The time of day, in ms since the epoch, of the latest digest.
    digest_at: int
