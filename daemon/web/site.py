"""The state that all routes share: settings, token and workspace."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import Depends, Path, Query, Request
from sqlalchemy import Engine

from daemon.settings.model import Settings
from daemon.state.database import open_writer
from daemon.views.overview import Overview

#: The largest integer that SQLite can store.
MOST = (1 << 63) - 1
#: Most event streams at once; a new one ends the oldest, whose page connects again.
_MOST_STREAMS = 50
Number = Annotated[int, Path(ge=1, le=MOST)]
#: Most rows of a drop that a request may skip: each is parsed.
MOST_SKIPPED = 10_000
After = Annotated[int, Query(ge=0, le=MOST_SKIPPED)]


class Site:
    """The workspace that the web page serves, with its token and the open event streams."""

    def __init__(self, settings: Settings, token: str) -> None:
        """Serve the workspace of `settings`; changes need `token`."""
        self.settings = settings
        self.token = token
        self.overview = Overview.of(settings)
        self._streams: list[asyncio.Event] = []

    @contextmanager
    def stream(self) -> Iterator[asyncio.Event]:
        """Register an event stream; yield an event that is set when it must end, at shutdown or for a newer stream."""
        ended = asyncio.Event()
        self._streams.append(ended)
        for oldest in self._streams[:-_MOST_STREAMS]:
            oldest.set()
        try:
            yield ended
        finally:
            self._streams.remove(ended)

    def end_streams(self) -> None:
        """Set the events of all registered streams, so that they end soon; do not wait for them."""
        for one in self._streams:
            one.set()

    def writer(self) -> Engine:
        """Return a new read-write engine for the state database. Raises as `open_writer`."""
        return open_writer(self.settings)


def site_of(request: Request) -> Site:
    """Return the site of the application that received a request."""
    site = request.app.state.site
    assert isinstance(site, Site)  # noqa: S101 - for the type checker
    return site


SiteOf = Annotated[Site, Depends(site_of)]
