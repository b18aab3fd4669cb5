"""
Serves the page on an address or a socket, until SIGTERM or SIGINT.

Strangers may open as many connections as they like. So there are never more than a few hundred: what brings no request
within seconds is cut, and where there are too many, what is idle goes first, the longest first.
"""

import asyncio
import contextlib
import logging
import os
import socket
import stat
import sys
import threading
import time
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from daemon.settings.model import Settings
from daemon.settings.web import Address
from daemon.web.app import make_app
from daemon.web.security import READING, load_token
from daemon.web.site import Site
from pipeline.errors import DropforgeError

#: Who may connect to the socket: the daemon's user and its group.
_SOCKET_MODE = 0o660
#: For what is asked at the end; the streams to open pages end by themselves.
_LAST_SECONDS = 1
#: Connections at once; what is accepted in one go must not take every descriptor before they are counted.
_MOST_CONNECTIONS, _BACKLOG = 200, 256
#: Within how long a request must be there, and the end of an answer be taken.
_REQUEST_SECONDS, _TAKEN_SECONDS = 10.0, 120.0
_TICKS_A_SECOND = 10
_SAID_AGAIN_SECONDS = 60.0
_log = logging.getLogger("uvicorn.error")


def serve(settings: Settings, listening: socket.socket, *, with_lifeline: bool = False) -> None:
    """
    Serve the page on a listening socket until SIGTERM, SIGINT or, `with_lifeline`, until standard input closes.

    Standard input is the daemon's end of a pipe: it closes with the daemon, however that ended.
    """
    app = make_app(settings, load_token(settings.state_folder))
    for noisy in (_log, logging.getLogger("asyncio")):
        noisy.addFilter(_OnceAMinute())
    config = uvicorn.Config(
        app,
        http=_Connection,
        backlog=_BACKLOG,
        log_config=None,
        access_log=False,
        server_header=False,
        # Whoever asks is told by nothing but the connection: no header of a proxy is believed.
        proxy_headers=False,
        timeout_graceful_shutdown=_LAST_SECONDS,
        lifespan="off",
        ws="none",
    )
    server = _Server(config, app.state.site)
    if with_lifeline:
        threading.Thread(target=_end_with_daemon, args=(server,), name="lifeline", daemon=True).start()
    server.run(sockets=[listening])


class _Connection(H11Protocol):
    """A connection that is cut where it brings no request in time, or others need its place."""

    since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request; cut the least of all connections if there are too many."""
        self.since = self.loop.time()
        super().connection_made(transport)
        if len(self.connections) > _MOST_CONNECTIONS:
            _log.warning("the page has too many connections: it cuts those that ask for nothing")
            least = min((one for one in self.connections if isinstance(one, _Connection)), key=_Connection.rank)
            least.cut()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        self.since = self.loop.time()
        super().on_response_complete()

    def rank(self) -> tuple[int, float]:
        """Order by what is asked for: nothing, something to read, events as they come, a change; the oldest first."""
        if not self._asks:
            return 0, self.since
        if self.scope["method"] not in READING:
            return 3, self.since
        return 2 if self.scope["path"].endswith("/live") else 1, self.since

    def cut_if_late(self) -> None:
        """Cut the connection if its next request, or the end of its last answer, takes too long."""
        longest = _TAKEN_SECONDS if self.transport.get_write_buffer_size() else _REQUEST_SECONDS
        if not self._asks and self.loop.time() - self.since > longest:
            self.cut()

    def cut(self) -> None:
        """End it here and now, so that it counts no more."""
        self.transport.abort()
        self.connections.discard(self)

    @property
    def _asks(self) -> bool:
        # uvicorn has none before the first request, whatever its types say.
        return self.cycle is not None and not self.cycle.response_complete  # type: ignore[redundant-expr]


class _Server(uvicorn.Server):
    """Cuts late connections, and lets the streams to open pages end: those that it must cut leave a traceback each."""

    def __init__(self, config: uvicorn.Config, site: Site) -> None:
        super().__init__(config)
        self._site = site

    async def on_tick(self, counter: int) -> bool:
        """Look once a second which connections are late."""
        for one in list(self.server_state.connections) if counter % _TICKS_A_SECOND == 0 else ():
            if isinstance(one, _Connection):
                one.cut_if_late()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End, with what listens told first."""
        self._site.end_streams()
        await super().shutdown(sockets)


class _OnceAMinute(logging.Filter):
    """Lets a sentence through once a minute: strangers can have it said."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a record is the first of its kind within a minute."""
        kind, now = str(record.msg).partition("\n")[0], time.monotonic()
        if now - self._said.get(kind, -_SAID_AGAIN_SECONDS) < _SAID_AGAIN_SECONDS:
            return False
        self._said[kind] = now
        return True


def _end_with_daemon(server: uvicorn.Server) -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    server.should_exit = True


def listen(address: Address) -> socket.socket:
    """Return a socket that listens. Raises `DropforgeError`."""
    try:
        return _on_socket(address.socket) if address.socket is not None else _on_port(address)
    except OSError as error:
        where = str(address.socket) if address.socket is not None else f"{address.host}:{address.port}"
        message = f"the page cannot be served on {where}: {error.strerror}"
        raise DropforgeError(message, "name another address: web.listen in dropforge.toml, or --listen") from error


def address_words(address: Address, token: str) -> str:
    """Return what to open in a browser, with the token in it; of a socket first how to reach it."""
    if address.socket is not None:
        return f"ssh -L 8765:{address.socket} HOST, then http://localhost:8765/?token={token}"
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"http://{host}:{address.port}/?token={token}"


def _on_port(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    # With the address free at once behind a server that ended.
    return socket.create_server((address.host, address.port), family=family)


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
