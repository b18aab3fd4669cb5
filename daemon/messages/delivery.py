"""
The only module of the daemon that uses the network: sends a message through Apprise.

Each call has its own thread and a time limit: whatever a server does, the caller continues. Errors do not contain the
address, which holds passwords.
"""

import logging
import re
from concurrent.futures import wait
from typing import Any

from daemon.system.sd_notify import in_background

SECONDS = 15.0
_ANSWER = re.compile(r"error=(\d+)")


def send(url: str, title: str, body: str, level: str) -> str | None:
    """
    Send one message to the address `url`, with Apprise's `level`, and wait at most 15 s.

    Returns why it was not sent, without the address, or that no answer came in time; `None` if it was sent.
    """
    future = in_background(_send, url, title, body, level)
    if not wait([future], SECONDS).done:
        return f"nothing was answered within {SECONDS:.0f} s"
    error = future.exception()  # its text may name the address
    return future.result() if error is None else f"it ended with {type(error).__name__}"


def is_known(url: str) -> bool:
    """Return whether Apprise can parse the address `url`; nothing is sent."""
    return bool(_apprise().add(url))


def _send(url: str, title: str, body: str, level: str) -> str | None:
    notifier = _apprise()
    if not notifier.add(url):
        return "Apprise cannot read the address"
    # Declared as plain text, so that Apprise escapes it for addresses that show Markdown or HTML.
    done = notifier.notify(title=title, body=body, notify_type=level, body_format="text")
    if done:
        return None
    codes = [match[1] for line in done.logs() if (match := _ANSWER.search(str(line.message)))]
    # Of mail Apprise says nothing more: a wrong password looks like a server that is not there.
    return f"the answer was {codes[-1]}" if codes else "it was not reached, or refused the login or the message"


def _apprise() -> Any:
    import apprise  # noqa: PLC0415 - 40 MB that nobody needs who sends nothing

    # Its own lines may name the address.
    quiet = logging.getLogger("apprise")
    quiet.propagate, quiet.handlers = False, [logging.NullHandler()]
    # No thread pool: a thread that hangs in it would keep the daemon from ending. A mail is from Dropforge, not from
    # Apprise, whose images would be loaded from another host.
    asset = apprise.AppriseAsset(
        async_mode=False,
        service_timeout=0,
        app_id="Dropforge",
        app_desc="Dropforge",
        app_url="",
        image_url_mask="",
        image_url_logo="",
    )
    return apprise.Apprise(asset=asset)
