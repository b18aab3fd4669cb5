"""Check the addresses in the settings: whether Apprise can parse them, and whether a test message can be sent."""

import shlex
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from daemon.messages import delivery
from daemon.messages.delivery import NotSent
from daemon.settings.messages import MessageSettings
from daemon.settings.text import read_toml
from daemon.views.doctor import Finding
from pipeline.artifacts import Frozen

_OTHERS_MAY_READ = stat.S_IRGRP | stat.S_IROTH
_BODY = "Messages of this Dropforge arrive here. Nothing has happened: somebody asked for this one."


class Tried(Frozen):
    """The result of one test message."""

    address: str
    """The address without its secrets."""
    error: str | None
    """Why it was not sent; `None` if it was."""


def examine(settings: MessageSettings, file: Path) -> Iterator[Finding]:
    """Yield a finding per invalid address, or one if all are valid, and one if others may read `file`; send nothing."""
    in_file = read_toml(file).get("messages", {}) if file.exists() and file.stat().st_mode & _OTHERS_MAY_READ else {}
    if in_file.keys() & {"urls", "heartbeat_url"}:
        text = f"others may read {file}, and addresses hold passwords"
        remedy = (
            f"set DROPFORGE_MESSAGES__URLS in /etc/dropforge/environment, as the unit reads it, or: chmod go= {file}"
        )
        yield Finding(name="messages", level="warn", text=text, remedy=remedy)
    bad = [number for number, url in enumerate(settings.urls, 1) if not delivery.is_known(url.get_secret_value())]
    for number in bad:
        url = settings.urls[number - 1]
        text = f"Apprise cannot read number {number} of messages.urls, {url}"
        remedy = "write it as https://github.com/caronc/apprise/wiki has it for that service"
        if missing := delivery.missing_packages(url.get_secret_value()):
            text, remedy = f"{text}: it needs a package that is not installed", f"pip install {shlex.join(missing)}"
        yield Finding(name="messages", level="bad", text=text, remedy=remedy)
    if not bad and (settings.urls or settings.heartbeat_url):
        told = [str(url) for url in settings.urls] + [f"{url} (heartbeat)" for url in [settings.heartbeat_url] if url]
        remedy = "whether they are reached: dropforge messages --test; the service needs PrivateNetwork=no"
        yield Finding(name="messages", level="ok", text=f"go to {', '.join(told)}", remedy=remedy)


def try_all(settings: MessageSettings) -> list[Tried]:
    """Send a test message to each address and ping the heartbeat, from this process; return the result of each."""
    send = partial(delivery.send, title="[dropforge] test", body=_BODY, level="info")
    tried = [_tried(str(url), partial(send, url.get_secret_value())) for url in settings.urls]
    beat = settings.heartbeat_url
    return [*tried, _tried(f"{beat} (heartbeat)", partial(delivery.ping, beat.get_secret_value()))] if beat else tried


def _tried(address: str, call: "partial[None]") -> Tried:
    try:
        call()
    except NotSent as error:
        return Tried(address=address, error=str(error))
    return Tried(address=address, error=None)
