"""
The web application, and its server on a TCP address or a Unix socket, until SIGTERM or SIGINT.

Strangers may open any number of connections. So a connection without a request is closed after a few seconds, and if
there are too many connections, the one that has been idle for the longest time is closed.
"""

import asyncio
import contextlib
import logging
import os
import socket
import sqlite3
import stat
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import DatabaseError
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from uvicorn.protocols.http.h11_impl import H11Protocol

from daemon.metrics import CONTENT_TYPE, metrics_text
from daemon.settings.model import Settings, SettingsError
from daemon.settings.sections import Address
from daemon.state.database_file import in_words
from daemon.state.layout import DATABASE_NAME
from daemon.system.processes import on_end_of_input
from daemon.views.reader import NotThere
from daemon.web import actions, api, pages, upload
from daemon.web.security import READING, Guard, load_token
from daemon.web.site import Site, draw, site_of
from pipeline.errors import DropforgeError, os_words

API = "/api/v1"
_HERE = Path(__file__).parent
#: Bytes of a request's body, and files of an upload.
_MOST_BODY, _MOST_FILES = 1_000_000, 100
_NOT_FOUND, _CONFLICT, _UNREADABLE, _MACHINE = 404, 409, 422, 503
#: Who may connect to the socket: the daemon's user and its group.
_SOCKET_MODE = 0o660
#: Seconds for open requests at shutdown; event streams end by themselves within one.
_LAST_SECONDS = 2
#: Most connections; a backlog that is accepted at once must not use up all descriptors before they are counted.
_MOST_CONNECTIONS, _BACKLOG = 200, 256
#: Time that a connection has to send a request.
_REQUEST_SECONDS = 10.0
_LOG_AGAIN_SECONDS = 60.0
_log = logging.getLogger("uvicorn.error")


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
    # After the API's routers: the pattern of forms, /{kind}/{target}/{action}, would match paths of the API too.
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
    """
    Answer an error with status, message and hint: as JSON under /api/, else as `error.html`.

    404 for `NotThere` and unknown tracks, 409 for any other `DropforgeError`, 422 for wrong fields, 503 for `OSError`
    and errors of the database, of which an unforeseen one is re-raised.
    """
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


def serve(settings: Settings, listening: socket.socket, *, with_lifeline: bool = False) -> None:
    """
    Serve the page on a listening socket until SIGTERM, SIGINT or, `with_lifeline`, until standard input closes.

    Call it last in a process of its own: it blocks, sets `tempfile.tempdir`, and after the shutdown raises the signal,
    if there was any, again, which ends the process. Standard input is a pipe from the daemon, which closes when the
    daemon ends, also if it is killed. Raises as `load_token`, which creates the token's file if it is missing.
    """
    # For files that are uploaded: /tmp may be in memory.
    tempfile.tempdir = str(settings.state_folder)
    app = make_app(settings, load_token(settings.state_folder))
    for noisy in (_log, logging.getLogger("asyncio")):
        noisy.addFilter(_once_a_minute())
    config = uvicorn.Config(
        app,
        http=_Connection,
        backlog=_BACKLOG,
        log_config=None,
        access_log=False,
        server_header=False,
        # The client's address is that of the connection: headers of a proxy are not trusted.
        proxy_headers=False,
        timeout_graceful_shutdown=_LAST_SECONDS,
        lifespan="off",
        ws="none",
    )
    server = uvicorn.Server(config)
    app.state.site.is_ending = lambda: server.should_exit
    if with_lifeline:
        on_end_of_input(partial(setattr, server, "should_exit", True))  # noqa: FBT003
    server.run(sockets=[listening])


class _Connection(H11Protocol):
    """A connection that is closed if no request comes within 10 s; may be aborted if there are too many."""

    since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit for a request; if there are more than 200 connections, abort that of the lowest rank."""
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > _MOST_CONNECTIONS:
            _log.warning("the page has too many connections: it cuts those that ask for nothing")
            others = (other for other in self.connections if isinstance(other, _Connection))
            first = min(others, key=_Connection.rank)
            first.transport.abort()
            self.connections.discard(first)

    def on_response_complete(self) -> None:
        """Start the time limit for the next request."""
        self._wait()
        super().on_response_complete()

    def rank(self) -> tuple[int, float]:
        """Return the sort key for aborting: first idle connections, then reads, streams, changes; older ones first."""
        # uvicorn has no cycle before the first request, whatever its types say.
        if self.cycle is None or self.cycle.response_complete:  # type: ignore[redundant-expr]
            return 0, self.since
        if self.scope["method"] not in READING:
            return 3, self.since
        return 2 if self.scope["path"].endswith("/live") else 1, self.since

    def _wait(self) -> None:
        self.since = self.loop.time()
        self.loop.call_later(_REQUEST_SECONDS, self._close_if_idle, (0, self.since))

    def _close_if_idle(self, rank: tuple[int, float]) -> None:
        """Close the connection, after its output is sent, if its rank is still `rank`: no request has come since."""
        if self.rank() == rank:
            self.transport.close()


def _once_a_minute() -> Callable[[logging.LogRecord], bool]:
    """Return a log filter that passes each message at most once a minute, as strangers can cause many."""
    logged: dict[str, float] = {}

    def is_new(record: logging.LogRecord) -> bool:
        kind, now = str(record.msg).partition("\n")[0], time.monotonic()
        if now - logged.get(kind, -_LOG_AGAIN_SECONDS) < _LOG_AGAIN_SECONDS:
            return False
        logged[kind] = now
        return True

    return is_new


def listen(address: Address) -> socket.socket:
    """
    Return a socket that listens on `address`; replace a Unix socket's file if no server answers on it.

    A Unix socket is open to its owner and group only. Raises `DropforgeError` if `address` cannot be used.
    """
    try:
        if address.socket is not None:
            return _on_socket(address.socket)
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        # With SO_REUSEADDR: the address is free at once after a server ended.
        return socket.create_server((address.host, address.port), family=family)
    except OSError as error:
        where = str(address.socket) if address.socket is not None else f"{address.host}:{address.port}"
        message = f"the page cannot be served on {where}: {error.strerror}"
        raise DropforgeError(message, "name another address: web.listen in dropforge.toml") from error


def address_words(address: Address, token: str) -> str:
    """Return the URL to open, with the token; for a Unix socket the ssh command to run, then the URL."""
    if address.socket is not None:
        return f"ssh -L 8765:{address.socket} HOST, then http://localhost:8765/?token={token}"
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"http://{host}:{address.port}/?token={token}"


def _on_socket(path: Path) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode) and not _answers(path):
            path.unlink()  # of a server that is gone
    with contextlib.ExitStack() as opened:
        made = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        before = os.umask(0o777 & ~_SOCKET_MODE)
        try:
            made.bind(str(path))
        finally:
            os.umask(before)
        made.listen()
        opened.pop_all()
    return made


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True
