"""Render templates; text is HTML-escaped, bidirectional and control characters are shown as escapes."""

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment

from daemon.web.security import holds_token
from daemon.web.site import site_of
from pipeline import words as wording
from pipeline.report.page import make_environment


def draw(request: Request, name: str, context: Mapping[str, Any], status: int = 200) -> HTMLResponse:
    """
    Render template `name` with `context`; return it as a response with status code `status`.

    Every template also has: `path` (of this page), `may_change` (whether this browser has the token), `tracks`
    (names), `daemon` (a DaemonView). Filters include `count size_words signed plain duration thousands short local
    until tick span`. `plots` draws the pictures, as on the evidence card. Control characters are shown as escapes.
    Raises `DropforgeError` if the daemon's lock file cannot be read.
    """
    site = site_of(request)
    shared = {
        "path": request.url.path,
        "may_change": holds_token(request, site.token),
        "tracks": list(site.settings.track_names),
        "daemon": site.overview.daemon(),
    }
    source = _environment().get_template(name).render({**shared, **context})
    return HTMLResponse(wording.show_controls(source), status)


@cache
def _environment() -> Environment:
    made = make_environment(Path(__file__).with_name("templates"))
    # The first 12 digits of a model's id are enough for people.
    made.filters["short"] = lambda identity: str(identity)[:12]
    made.filters["local"] = lambda time: "" if time is None else f"{time.astimezone():%Y-%m-%d %H:%M:%S}"
    made.filters["until"] = _until
    return made


def _until(time: datetime) -> str:
    """Return the time until `time` in words; empty if it has passed."""
    seconds = (time - datetime.now(UTC)).total_seconds()
    return f"in {wording.duration(seconds)}" if seconds >= 1 else ""
