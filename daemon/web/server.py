"""Serves the page on an address or a socket, until SIGTERM or SIGINT."""

import asyncio
import contextlib
import os
import socket
import stat
import sys
import threading
from pathlib import Path

import uvicorn

from daemon.settings.model import Settings
from daemon.settings.web import Address
from daemon.web.app import make_app
from daemon.web.security import load_token
from pipeline.errors import DropforgeError

#: Who may connect to the socket: the daemon's user and its group.
_SOCKET_MODE = 0o660
#: For what is asked at the end; the streams to open pages end by themselves.
_LAST_SECONDS = 1


class CannotListen(DropforgeError):
    """The address of the page cannot be used."""


def serve(settings: Settings, listening: socket.socket, *, with_lifeline: bool = False) -> None:
    """
    Serve the page on a listening socket until SIGTERM, SIGINT or, `with_lifeline`, until standard input closes.

    Standard input is the daemon's end of a pipe: it closes with the daemon, however that ended.
    """
    app = make_app(settings, load_token(settings.state_folder))
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        # Whoever asks is told by nothing but the connection: no header of a proxy is believed.
        proxy_headers=False,
        timeout_graceful_shutdown=_LAST_SECONDS,
        lifespan="off",
        ws="none",
    )
    server = _Server(config, app.state.site.closing)
    if with_lifeline:
        threading.Thread(target=_end_with_daemon, args=(server,), name="lifeline", daemon=True).start()
    server.run(sockets=[listening])


class _Server(uvicorn.Server):
    """Lets the streams to open pages end; those that it must cut off leave a traceback each."""

    def __init__(self, config: uvicorn.Config, closing: asyncio.Event) -> None:
        super().__init__(config)
        self._closing = closing

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End, with what listens told first."""
        self._closing.set()
        await super().shutdown(sockets)


def _end_with_daemon(server: uvicorn.Server) -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    server.should_exit = True


def listen(address: Address) -> socket.socket:
    """Return a socket that listens. Raises `CannotListen`."""
    try:
        return _on_socket(address.socket) if address.socket is not None else _on_port(address)
    except OSError as error:
        where = str(address.socket) if address.socket is not None else f"{address.host}:{address.port}"
        message = f"the page cannot be served on {where}: {error.strerror}"
        raise CannotListen(message, "name another address: web.listen in dropforge.toml, or --listen") from error


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
