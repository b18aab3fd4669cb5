"""Messages that were not sent: pending ones, and those given up in the last week."""

import sqlite3
from datetime import datetime

from daemon.messages.outbox import WEEK_MS
from daemon.settings.model import Settings
from daemon.state.states import MessageState
from daemon.views.overview import Overview
from daemon.views.reader import utc
from pipeline.artifacts import Frozen

_UNSENT = "SELECT * FROM message WHERE state = ? AND coalesce(ended_at, ?) > ? ORDER BY id"
_COUNTED = "SELECT state, count(*) AS number FROM message GROUP BY state"


class MessageView(Frozen):
    """One message to one address."""

    id: int
    created_at: datetime
    address: str
    """The URL without its secrets; for a URL that is not in the settings, the first digits of its hash."""
    kind: str
    title: str
    body: str
    state: str
    """pending or given_up."""
    tries: int
    error: str | None


def unsent(settings: Settings, now: int) -> list[MessageView]:
    """Return pending messages, then those given up in the last week, oldest first; `now` in ms."""
    shown = {url.address: str(url) for url in settings.messages.urls}
    overview = Overview(settings.state_folder)
    states = (MessageState.PENDING, MessageState.GIVEN_UP)
    found = [row for state in states for row in overview.rows(_UNSENT, state, now, now - WEEK_MS)]
    values = [{name: getattr(row, name) for name in MessageView.model_fields} for row in found]
    return [
        MessageView.model_validate(
            {**one, "created_at": utc(one["created_at"]), "address": shown.get(one["address"], one["address"])}
        )
        for one in values
    ]


def counted(base: sqlite3.Connection) -> dict[str, int]:
    """Return the number of messages per state."""
    return {**dict.fromkeys(map(str, MessageState), 0), **{row.state: row.number for row in base.execute(_COUNTED)}}
