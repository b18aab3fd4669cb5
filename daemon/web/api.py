"""
`/api/v1`, reading: the JSON of the commands with `--json`, from the same functions of `daemon.views`; and events.

Events for an open page are at `/live` (text/event-stream). `changed` at the beginning and after each change of the
database: `{"event": 123}`, the latest event's number. `progress` when a running run has progressed or ended: the
running runs as a JSON list, each a LiveRun.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent

from daemon.champions.blind_review import Review
from daemon.state.database import ChangeWatch, open_reader
from daemon.state.layout import DATABASE_NAME
from daemon.views.attention import Attention, attention
from daemon.views.champion_history import ChampionView, ServingView
from daemon.views.drops import DropDetail, DropRow, DropView, drop_detail, drop_rows
from daemon.views.overview import DaemonView, Overview
from daemon.views.runs import LiveRun, PauseView, RunDetail, RunView
from daemon.web.pages import MOST_CHAMPIONS, MOST_LISTED, Before, State, Track, require_track
from daemon.web.site import After, Number, SiteOf
from pipeline.artifacts import Frozen
from pipeline.contract import Curve
from pipeline.errors import DropforgeError

router = APIRouter(tags=["read"])
#: Seconds between looks for events; a step writes its progress every two seconds.
_SECONDS = 1.0
#: Most event streams at once; a new one ends the oldest, whose page connects again.
_MOST_STREAMS = 50


class Standing(Frozen):
    """The state of the workspace."""

    daemon: DaemonView
    attention: tuple[Attention, ...]
    """Items that need a person, the most urgent first."""
    running: tuple[LiveRun, ...]
    """The running runs, the oldest first."""
    queue: tuple[RunView, ...]
    """Waiting and queued runs, in the order of the queue."""
    paused: tuple[PauseView, ...]
    champions: tuple[ServingView, ...]
    drops: dict[str, dict[str, int]]
    """Number of drops by track and state."""


@router.get("/status")
def status(site: SiteOf) -> Standing:
    """Return whether the daemon runs, what needs a person, open runs, pauses, champions and numbers of drops."""
    seen = site.overview
    return Standing(
        daemon=seen.daemon(),
        attention=attention(site.settings, seen),
        running=seen.live_runs(),
        queue=tuple(run for run in seen.open_runs() if run.state != "running"),
        paused=tuple(seen.paused()),
        champions=tuple(seen.champions(site.settings.track_names)),
        drops=seen.drop_counts(),
    )


@router.get("/runs")
def list_runs(site: SiteOf, track: Track = None, state: State = None, before: Before = None) -> list[RunView]:
    """List up to 50 runs, of a track and in a state if given, newest first; `before`: only ids below it."""
    return site.overview.runs(track, None if state is None else [state], MOST_LISTED, before)


@router.get("/runs/{run_id}")
def show_run(site: SiteOf, run_id: Number) -> RunDetail:
    """Return one run with its attempts, settings and verdict; 404 if there is no such run."""
    return site.overview.run(run_id)


@router.get("/runs/{run_id}/curves")
def show_curves(site: SiteOf, run_id: Number) -> Curve:
    """Return the loss curves of a run's training so far, empty before it begins; 404 if there is no such run."""
    return site.overview.curves(site.overview.run(run_id).id)


@router.get("/runs/{run_id}/report")
def show_report(site: SiteOf, run_id: Number) -> dict[str, Any]:
    """Return the data of a run's evidence card (schemas/report.schema.json); 404 if it has none."""
    return site.overview.report_data(run_id)


@router.get("/runs/{run_id}/review")
def show_review(site: SiteOf, run_id: Number) -> Review:
    """Return the pairs left in a run's blind review, or its result; 404 without the run, 409 without answers."""
    return site.overview.review(run_id)


@router.get("/drops")
def list_drops(site: SiteOf, track: Track = None, state: State = None, before: Before = None) -> list[DropView]:
    """List up to 50 drops, of a track and in a state if given, newest first; `before`: only ids below it."""
    return site.overview.drops(track, state, MOST_LISTED, before)


@router.get("/drops/{drop_id}")
def show_drop(site: SiteOf, drop_id: Number) -> DropDetail:
    """Return one drop with its findings and the champions trained on it; 404 if there is no such drop."""
    return drop_detail(site.overview, drop_id)


@router.get("/drops/{drop_id}/rows")
def show_rows(site: SiteOf, drop_id: Number, after: After = 0) -> tuple[DropRow, ...]:
    """Return up to 20 rows of a drop, after the first `after`, with long texts cut; none if its file was not kept."""
    return drop_rows(site.overview, site.overview.drop(drop_id), after)


@router.get("/tracks/{name}/champions")
def list_champions(site: SiteOf, name: str, before: Before = None) -> list[ChampionView]:
    """List up to 25 champions of a track, newest first; `before`: only generations below it; 404 if it is unknown."""
    require_track(site, name)
    return site.overview.history(name, MOST_CHAMPIONS, before)


def changes(overview: Overview) -> Iterator[list[ServerSentEvent]]:
    """
    Yield, without end, the list of events that are due since the last list: `changed`, `progress`, both or none.

    At first `changed` is due if there is a database, and `progress` if a run is running.
    """
    path = overview.state / DATABASE_NAME
    watch: ChangeWatch | None = None
    running: tuple[LiveRun, ...] = ()
    while True:
        events: list[ServerSentEvent] = []
        if path.exists():
            watch = watch or ChangeWatch(open_reader(path))
            if watch.changed():
                latest = overview.rows("SELECT max(id) AS event FROM event")
                events.append(ServerSentEvent(event="changed", data={"event": latest[0].event if latest else None}))
            before, running = running, overview.live_runs()
            if running != before:
                events.append(ServerSentEvent(event="progress", data=[run.model_dump(mode="json") for run in running]))
        yield events


@router.get("/live", response_class=EventSourceResponse)
async def live(site: SiteOf) -> AsyncIterator[ServerSentEvent]:
    """Stream the events `changed` and `progress`, once a second, until shutdown, 50 newer streams or a read error."""
    news, own = changes(site.overview), object()
    site.streams.append(own)
    try:
        while not site.is_ending() and own in site.streams[-_MOST_STREAMS:]:
            for events in await run_in_threadpool(next, news):
                yield events
            await asyncio.sleep(_SECONDS)
    except (DropforgeError, OSError, ValueError, sqlite3.Error):
        return  # the page connects again
    finally:
        site.streams.remove(own)
