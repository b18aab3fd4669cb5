"""What commands say of the addresses in the settings: whether Apprise can use them, and what was not sent to them."""

import stat
from collections.abc import Iterator
from pathlib import Path

from daemon.messages import delivery
from daemon.messages.outbox import WEEK_MS
from daemon.settings.model import Settings
from daemon.settings.sections import MessageSettings
from daemon.settings.text import read_toml
from daemon.state.states import MessageState
from daemon.views.overview import Overview
from daemon.views.preflight import Finding, bad, warn
from daemon.views.reader import Time
from pipeline.artifacts import Frozen

_OTHERS_MAY_READ = stat.S_IRGRP | stat.S_IROTH
_BODY = "Messages of this Dropforge arrive here. Nothing has happened: somebody asked for this one."


def examine(settings: MessageSettings, file: Path) -> Iterator[Finding]:
    """
    Yield a finding "bad" per address that Apprise cannot parse, or a single "ok" if it can parse all; send nothing.

    Without addresses there is neither. First a warning if `file` sets `messages.urls` and other users may read it.
    """
    in_file = read_toml(file).get("messages", {}) if file.exists() and file.stat().st_mode & _OTHERS_MAY_READ else {}
    if "urls" in in_file:
        text = f"others may read {file}, and addresses hold passwords"
        remedy = (
            f"set DROPFORGE_MESSAGES__URLS in /etc/dropforge/environment, as the unit reads it, or: chmod go= {file}"
        )
        yield warn("messages", text, remedy)
    unread = [number for number, url in enumerate(settings.urls, 1) if not delivery.is_known(url.get_secret_value())]
    for number in unread:
        url = settings.urls[number - 1]
        text = f"Apprise cannot read number {number} of messages.urls, {url}"
        remedy = "write it as https://github.com/caronc/apprise/wiki has it; some services need a package named there"
        yield bad("messages", text, remedy)
    if not unread and settings.urls:
        remedy = "whether they are reached: dropforge messages --test; the service needs PrivateNetwork=no"
        yield Finding(name="messages", level="ok", text=f"go to {', '.join(map(str, settings.urls))}", remedy=remedy)


def try_all(settings: MessageSettings) -> list[dict[str, str | None]]:
    """
    Send a test message to each address, waiting up to 15 s for each.

    Returns for each {"address": without its secrets, "error": why it was not sent, or `None`}.
    """
    test = ("[dropforge] test", _BODY, "info")
    return [{"address": str(url), "error": delivery.send(url.get_secret_value(), *test)} for url in settings.urls]


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
    """Return the pending messages, then those given up in the last week, each oldest first; `now` in ms."""
    shown = {url.address: str(url) for url in settings.messages.urls}
    overview = Overview.of(settings)
    states = (MessageState.PENDING, MessageState.GIVEN_UP)
    rows = [row for state in states for row in overview.rows(_UNSENT, state, now, now - WEEK_MS)]
    return [MessageView(**vars(row) | {"address": shown.get(row.address, row.address)}) for row in rows]
