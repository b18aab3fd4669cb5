"""What all routes share: settings, token, workspace, and how a page is rendered from a template."""

import pathlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any

from fastapi import Depends, Path, Query, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment
from sqlalchemy import Engine

from daemon.settings.model import Settings
from daemon.state.database import open_writer
from daemon.views.overview import Overview
from daemon.web.security import holds_token
from pipeline.report.page import make_environment
from pipeline.words import show_controls

#: The largest integer that SQLite can store.
MOST = (1 << 63) - 1
Number = Annotated[int, Path(ge=1, le=MOST)]
#: Most rows of a drop that a request may skip: each is parsed.
MOST_SKIPPED = 10_000
After = Annotated[int, Query(ge=0, le=MOST_SKIPPED)]


class Site:
    """The workspace that the web page serves, with its token and the open event streams."""

    def __init__(self, settings: Settings, token: str) -> None:
        """Store `settings` and `token`, and make a reader; no stream is open."""
        self.settings = settings
        self.token = token
        self.overview = Overview.of(settings)
        #: The open event streams, the oldest first, and whether they are to end, as the server does.
        self.streams: list[object] = []
        self.is_ending: Callable[[], bool] = lambda: False

    def writer(self) -> Engine:
        """Return a new read-write engine for the state database. Raises as `open_writer`."""
        return open_writer(self.settings)


def site_of(request: Request) -> Site:
    """Return the site of the application that received a request."""
    site: Site = request.app.state.site
    return site


SiteOf = Annotated[Site, Depends(site_of)]


def draw(request: Request, name: str, context: Mapping[str, Any], status: int = 200) -> HTMLResponse:
    """
    Render template `name` with `context`; return it as a response with status code `status`.

    Every template also has: `path` (of this page), `may_change` (whether this browser has the token), `tracks`
    (names), `daemon` (a DaemonView). Filters, and `figures`, which draws the pictures, are those of the evidence card.
    Control characters are shown as escapes. Raises `DropforgeError` if the daemon's lock file cannot be read.
    """
    site = site_of(request)
    shared = {
        "path": request.url.path,
        "may_change": holds_token(request, site.token),
        "tracks": list(site.settings.track_names),
        "daemon": site.overview.daemon(),
    }
    source = _environment().get_template(name).render({**shared, **context})
    return HTMLResponse(show_controls(source), status)


@cache
def _environment() -> Environment:
    return make_environment(pathlib.Path(__file__).with_name("templates"))
