"""
Events for an open page, at GET /api/v1/live (text/event-stream).

`changed` at the beginning and after each change of the database: `{"event": 123}`, the latest event's number.
`progress` when a running run has progressed or ended: the running runs as a JSON list, each a LiveRun.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent

from daemon.state.database import ChangeWatch, open_reader
from daemon.state.layout import DATABASE_NAME
from daemon.web.site import Site, SiteOf

router = APIRouter(tags=["read"])
#: Seconds between checks; a step writes its progress every two seconds.
_SECONDS = 1.0


class Look:
    """Finds the changes of a workspace since its last call; for one client."""

    def __init__(self, site: Site) -> None:
        """Watch the workspace of `site`; its whole state is new to the first call of `news`."""
        self._overview = site.overview
        self._watch: ChangeWatch | None = None
        self._running: tuple[object, ...] = ()

    def news(self) -> list[ServerSentEvent]:
        """Return the events `changed` and `progress` that are due since the last call; none without a database."""
        path = self._overview.state / DATABASE_NAME
        if not path.exists():
            return []
        if self._watch is None:
            self._watch = ChangeWatch(open_reader(path))
        events: list[ServerSentEvent] = []
        if self._watch.changed():
            latest = self._overview.rows("SELECT max(id) AS event FROM event")
            events.append(ServerSentEvent(event="changed", data={"event": latest[0].event if latest else None}))
        running = self._overview.live_runs()
        if running != self._running:
            self._running = running
            events.append(ServerSentEvent(event="progress", data=[run.model_dump(mode="json") for run in running]))
        return events


@router.get("/live", response_class=EventSourceResponse)
async def live(site: SiteOf) -> AsyncIterator[ServerSentEvent]:
    """Stream the events `changed` and `progress`, checked once a second, until shutdown or 50 newer streams."""
    look = Look(site)
    with site.stream() as ended:
        while not ended.is_set():
            for events in await run_in_threadpool(look.news):
                yield events
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), _SECONDS)
