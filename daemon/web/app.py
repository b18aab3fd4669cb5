"""The web application: routes, static files, and error responses for browsers and programs."""

import sqlite3
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import DatabaseError
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from daemon.metrics import CONTENT_TYPE, metrics_text
from daemon.settings.model import Settings, SettingsError
from daemon.state.database_file import in_words
from daemon.state.layout import DATABASE_NAME
from daemon.views.reader import NotThere
from daemon.web import actions, api, pages, upload
from daemon.web.security import Guard
from daemon.web.site import Site, draw, site_of
from pipeline.errors import DropforgeError, os_words

API = "/api/v1"
_HERE = Path(__file__).parent
#: Bytes of a request's body, and files of an upload.
_MOST_BODY, _MOST_FILES = 1_000_000, 100
_NOT_FOUND, _CONFLICT, _UNREADABLE, _MACHINE = 404, 409, 422, 503


def make_app(settings: Settings, token: str) -> FastAPI:
    """
    Return the ASGI application for the workspace of `settings`.

    Requests that change something need `token`, and if `settings.web.closed` all do. Requests with a Host header that
    is neither loopback nor in `settings.web` are refused.
    """
    app = FastAPI(
        title="Dropforge",
        version="1",
        description="What `dropforge --json` says, and what the command line does.",
        openapi_url=f"{API}/openapi.json",
        # FastAPI's own documentation pages load scripts from other hosts.
        docs_url=None,
        redoc_url=None,
    )
    app.state.site = Site(settings, token)
    for router in (api.router, actions.router):
        app.include_router(router, prefix=API, max_body_size=_MOST_BODY)
    files: dict[str, Any] = {
        "max_body_size": settings.intake.max_bytes,
        "form_limits": {"max_files": _MOST_FILES, "max_fields": 10},
    }
    app.include_router(upload.router, prefix=API, **files)
    app.include_router(upload.forms, include_in_schema=False, **files)
    # After the API's routers: the pattern of forms, /{kind}/{target}/{deed}, would match paths of the API too.
    for router in (pages.router, actions.forms):
        app.include_router(router, include_in_schema=False, max_body_size=_MOST_BODY)
    app.add_api_route("/metrics", _metrics, include_in_schema=False)
    app.mount("/static", StaticFiles(directory=_HERE / "static"), name="static")
    for kind in (DropforgeError, HTTPException, RequestValidationError, OSError, sqlite3.Error, DatabaseError):
        app.add_exception_handler(kind, _failed)
    app.add_middleware(Guard, settings=settings.web, token=token)
    return app


def _metrics(request: Request) -> Response:
    return Response(metrics_text(site_of(request).settings), media_type=CONTENT_TYPE)


def _failed(request: Request, error: Exception) -> Response:
    """Answer an error with status, message and hint, as JSON under /api/; re-raise an unforeseen database error."""
    match error:
        case NotThere() | SettingsError():  # the only error of settings that a request can cause is an unknown track
            return _error(request, _NOT_FOUND, error.message, error.hint)
        case DropforgeError():
            return _error(request, _CONFLICT, error.message, error.hint)
        case HTTPException():
            return _error(request, error.status_code, str(error.detail), "")
        case RequestValidationError():
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            hint = f"the requests and their fields: {API}/openapi.json"
            return _error(request, _UNREADABLE, f"{where}: {first['msg']}", hint)
        case OSError():
            return _error(request, _MACHINE, os_words(error), "see whether its disk is full: df -h")
    words = in_words(error, site_of(request).settings.state_folder / DATABASE_NAME)
    if words is None:
        raise error
    return _error(request, _MACHINE, words.message, words.hint)


def _error(request: Request, status: int, message: str, hint: str) -> Response:
    if request.url.path.startswith("/api/"):
        body = {"schema": 1, "error": {"code": status, "message": message, "hint": hint}}
        return JSONResponse(body, status_code=status)
    return draw(request, "error.html", {"status": status, "message": message, "hint": hint}, status)
