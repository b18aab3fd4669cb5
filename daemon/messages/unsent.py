"""Messages that were not sent: pending ones, and those given up in the last week."""

import sqlite3

from daemon.messages.outbox import WEEK_MS
from daemon.settings.model import Settings
from daemon.state.states import MessageState
from daemon.views.overview import Overview
from daemon.views.reader import Time
from pipeline.artifacts import Frozen

_COUNTED = "SELECT state, count(*) AS number FROM message GROUP BY state"


class MessageView(Frozen):
    """One message to one address."""

    id: int
    created_at: Time
    address: str
    """The URL without its secrets; for a URL that is not in the settings, the first digits of its hash."""
    kind: str
    title: str
    body: str
    state: str
    """pending or given_up."""
    tries: int
    error: str | None


_UNSENT = (
    f"SELECT {', '.join(MessageView.model_fields)} FROM message "  # noqa: S608 - our own names
    "WHERE state = ? AND coalesce(ended_at, ?) > ? ORDER BY id"
)


def unsent(settings: Settings, now: int) -> list[MessageView]:
    """Return pending messages, then those given up in the last week, oldest first; `now` in ms."""
    shown = {url.address: str(url) for url in settings.messages.urls}
    overview = Overview.of(settings)
    states = (MessageState.PENDING, MessageState.GIVEN_UP)
    found = [vars(row) for state in states for row in overview.rows(_UNSENT, state, now, now - WEEK_MS)]
    return [MessageView(**{**one, "address": shown.get(one["address"], one["address"])}) for one in found]


def counted(base: sqlite3.Connection) -> dict[str, int]:
    """Return the number of messages in each state, 0 included."""
    return {**dict.fromkeys(map(str, MessageState), 0), **{row.state: row.number for row in base.execute(_COUNTED)}}
