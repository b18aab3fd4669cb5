"""
The only module of the daemon that uses the network: sends a message through Apprise.

Each call has its own thread and a time limit: whatever a server does, the caller continues. Errors do not contain the
address, which holds passwords.
"""

import logging
import re
import threading
from typing import Any

SECONDS = 15.0
_ANSWER = re.compile(r"error=(\d+)")


class NotSent(Exception):
    """A message was not sent; the text says why, without the address."""


def send(url: str, title: str, body: str, level: str) -> None:
    """Send one message to the address `url`, with Apprise's `level`. Raises `NotSent` if it fails or takes 15 s."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            _send(url, title, body, level)
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            raised.append(error)

    # A daemon thread: if it hangs, it is not joined and does not keep the process from ending.
    thread = threading.Thread(target=run, name="delivery", daemon=True)
    thread.start()
    thread.join(SECONDS)
    if thread.is_alive():
        raise NotSent(f"nothing was answered within {SECONDS:.0f} s")
    if raised and isinstance(raised[0], NotSent):
        raise raised[0]
    if raised:
        raise NotSent(f"it ended with {type(raised[0]).__name__}") from None


def is_known(url: str) -> bool:
    """Return whether Apprise can parse the address `url`; nothing is sent."""
    return bool(_apprise().add(url))


def _send(url: str, title: str, body: str, level: str) -> None:
    notifier = _apprise()
    if not notifier.add(url):
        raise NotSent("Apprise cannot read the address")
    # Declared as plain text, so that Apprise escapes it for addresses that show Markdown or HTML.
    done = notifier.notify(title=title, body=body, notify_type=level, body_format="text")
    if not done:
        codes = [match[1] for line in done.logs() if (match := _ANSWER.search(str(line.message)))]
        # Of mail Apprise says nothing more: a wrong password looks like a server that is not there.
        message = f"the answer was {codes[-1]}" if codes else "it was not reached, or refused the login or the message"
        raise NotSent(message)


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
