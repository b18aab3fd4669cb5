"""`/api/v1` for readers: what `dropforge --json` says, by the same functions."""

from fastapi import APIRouter

from daemon.views.overview import DropView, RunDetail, RunView
from daemon.web.pages import MOST_LISTED, Before, State, Track
from daemon.web.site import Number, SiteOf

router = APIRouter(tags=["read"])


@router.get("/runs")
def list_runs(site: SiteOf, track: Track = None, state: State = None, before: Before = None) -> list[RunView]:
    """List runs, newest first, a page at a time."""
    return site.overview.runs(track, None if state is None else [state], MOST_LISTED, before)


@router.get("/runs/{run_id}")
def show_run(site: SiteOf, run_id: Number) -> RunDetail:
    """Show one run."""
    return site.overview.run(run_id)


@router.get("/drops")
def list_drops(site: SiteOf, track: Track = None, state: State = None, before: Before = None) -> list[DropView]:
    """List drops, newest first, a page at a time."""
    return site.overview.drops(track, state, MOST_LISTED, before)
