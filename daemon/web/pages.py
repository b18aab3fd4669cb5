"""The HTML pages: each reads `daemon.views` and renders a template. A GET changes nothing."""

from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import AfterValidator

from daemon.champions.smoke_test import shown_records
from daemon.state.clauses import preview_clauses
from daemon.views.attention import attention, rejected_words
from daemon.views.drops import MOST_ROWS, drop_detail, drop_rows, first_outcomes, stored_file
from daemon.views.reader import NotThere
from daemon.web.site import MOST, MOST_SKIPPED, After, Number, Site, SiteOf, draw
from pipeline.artifacts import PAGE_NAME
from pipeline.errors import DropforgeError
from pipeline.report.story import review_words

router = APIRouter(default_response_class=HTMLResponse)
#: Most rows on a page of a list, champions on a page of a track, and rows of each list on the overview.
MOST_LISTED, MOST_CHAMPIONS, _MOST_LATEST = 50, 25, 10
_MOST_SHOWN = 3
Before = Annotated[int | None, Query(ge=1, le=MOST)]
#: A form sends an empty text for "all".
_OR_ALL = AfterValidator(lambda chosen: chosen or None)
Track = Annotated[str | None, Query(max_length=200), _OR_ALL]
State = Annotated[str | None, Query(max_length=40), _OR_ALL]
#: Headers of the evidence card, which needs inline style and images, and no scripts.
_CARD = {
    "content-security-policy": (
        "sandbox allow-popups; default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'self'"
    )
}


@router.get("/")
def overview(request: Request, site: SiteOf) -> Response:
    """Render what needs attention, running runs, queue, champions, the last ended runs and drops, and warnings."""
    seen = site.overview
    context = {
        "attention": attention(site.settings, seen),
        "running": seen.live_runs(),
        "queue": [run for run in seen.open_runs() if run.state != "running"],
        "latest": seen.ended_runs(_MOST_LATEST),
        "champions": seen.champions(site.settings.track_names),
        "drops": seen.drops(most=_MOST_LATEST),
        "lacks": (*seen.missing_rows(site.settings).values(), *seen.data_warnings()),
    }
    return draw(request, "overview.html", context)


@router.get("/runs")
def runs(request: Request, site: SiteOf, track: Track = None, state: State = None, before: Before = None) -> Response:
    """Render up to 50 runs, newest first, optionally of one track and state, with ids below `before`."""
    views = site.overview.runs(track, None if state is None else [state], MOST_LISTED, before)
    older = views[-1].id if len(views) == MOST_LISTED else None
    return draw(request, "runs.html", {"runs": views, "track": track, "state": state, "older": older})


@router.get("/runs/{run_id}")
def run(request: Request, site: SiteOf, run_id: Number) -> Response:
    """Render a run: settings, curves, verdict, and a link to its report if any. Raises `NotThere` if it is unknown."""
    seen = site.overview
    detail = seen.run(run_id)
    card = None
    with suppress(DropforgeError):
        seen.report_folder(run_id)
        card = f"/runs/{run_id}/report"
    context = {"run": detail, "curves": seen.curves(run_id), "story": seen.story(detail), "card": card}
    return draw(request, "run.html", context)


@router.get("/runs/{run_id}/report")
def report(site: SiteOf, run_id: Number) -> Response:
    """Return a run's report.html with headers that forbid scripts and other hosts. Raises `NotThere` if it has none."""
    page = site.overview.report_folder(run_id) / PAGE_NAME
    return HTMLResponse(page.read_bytes(), headers=_CARD)


@router.get("/runs/{run_id}/review")
def review(request: Request, site: SiteOf, run_id: Number) -> Response:
    """Render the first open pair of a run's blind review, or the result. Raises `DropforgeError` without answers."""
    progress = site.overview.review(run_id)
    result = None if progress.result is None else review_words(progress.result)
    return draw(request, "review.html", {"review": progress, "result": result})


@router.get("/drops")
def drops(request: Request, site: SiteOf, track: Track = None, state: State = None, before: Before = None) -> Response:
    """Render up to 50 drops, newest first, optionally of one track and state, and the number in each state."""
    views = site.overview.drops(track, state, MOST_LISTED, before)
    older = views[-1].id if len(views) == MOST_LISTED else None
    context = {"drops": views, "track": track, "state": state, "older": older, "counts": site.overview.drop_counts()}
    return draw(request, "drops.html", context)


@router.get("/drops/{drop_id}")
def drop(request: Request, site: SiteOf, drop_id: Number, after: After = 0) -> Response:
    """Render a drop, its champions, and up to 20 rows after the first `after`. Raises `NotThere` without the drop."""
    detail = drop_detail(site.overview, drop_id)
    rows = drop_rows(site.overview, detail.drop, after)
    following = after + MOST_ROWS if len(rows) == MOST_ROWS else None
    context = {
        "detail": detail,
        "agreement": preview_clauses(detail.drop),
        "rows": rows,
        "after": after,
        "next": following,
        "most_skipped": MOST_SKIPPED,
        "uses": site.overview.uses(drop_id),
        "lacks": site.overview.missing_rows(site.settings, detail.drop.track).values(),
    }
    return draw(request, "drop.html", context)


@router.post("/drops/{drop_id}/shown")
def shown(request: Request, site: SiteOf, drop_id: Number) -> Response:
    """Render a drop's first 3 records as the model sees them (seconds). Raises `NotThere` or as `shown_records`."""
    drop = site.overview.drop(drop_id)
    file = stored_file(site.overview, drop)
    if file is None:
        raise NotThere(f"the rows of drop {drop_id} were not kept", "drop the file again")
    records = shown_records(file, site.settings, drop.track, _MOST_SHOWN)
    return draw(request, "shown.html", {"drop": drop, "records": records})


@router.get("/tracks/{name}")
def track(request: Request, site: SiteOf, name: str, before: Before = None) -> Response:
    """Render up to 25 champions of a track, newest first, below generation `before`. Raises `NotThere` if unknown."""
    seen = site.overview
    require_track(site, name)
    views = seen.history(name, MOST_CHAMPIONS, before)
    older = views[-1].generation if len(views) == MOST_CHAMPIONS else None
    context = {
        "track": name,
        "champions": views,
        "older": older,
        "paused": next((pause for pause in seen.paused() if pause.track == name), None),
    }
    return draw(request, "track.html", context)


@router.get("/inbox")
def inbox(request: Request, site: SiteOf, track: Track = None, before: Before = None) -> Response:
    """Render the upload page: 50 drops with outcomes, newest first, files open for writing, missing rows, warnings."""
    views = site.overview.drops(track, None, MOST_LISTED, before)
    older = views[-1].id if len(views) == MOST_LISTED else None
    seen = site.overview
    rows = [(drop, rejected_words(seen, drop.id, drop.reason) if drop.state == "rejected" else "") for drop in views]
    waiting = seen.inbox_note()["waiting"]
    context = {"drops": rows, "track": track, "older": older, "waiting": waiting, "used": first_outcomes(seen, views)}
    context["lacks"] = (*seen.missing_rows(site.settings, track).values(), *seen.data_warnings(track))
    return draw(request, "inbox.html", context)


def require_track(site: Site, name: str) -> None:
    """Raise `NotThere` for a track that is neither in the settings nor in the database."""
    if name not in site.settings.track_names and name not in site.overview.tracks():
        raise NotThere(f"there is no track {name}", f"declared tracks: {', '.join(site.settings.track_names)}")
