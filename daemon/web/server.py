"""Serves the page on an address or a socket, until SIGTERM or SIGINT."""

import contextlib
import os
import socket
import stat
from pathlib import Path

import structlog
import uvicorn

from daemon.settings.model import Settings
from daemon.settings.web import Address
from daemon.web.app import make_app
from daemon.web.security import load_token
from pipeline.errors import DropforgeError

#: Who may connect to the socket: the daemon's user and its group.
_SOCKET_MODE = 0o660
#: Open pages listen for ever; nothing of theirs is lost.
_LAST_SECONDS = 1
log = structlog.get_logger()


class CannotListen(DropforgeError):
    """The address of the page cannot be used."""


def serve(settings: Settings, listening: socket.socket) -> None:
    """Serve the page on a listening socket until SIGTERM or SIGINT, or SIGINT a second time at once."""
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
    uvicorn.Server(config).run(sockets=[listening])


def listen(address: Address) -> socket.socket:
    """Return a socket that listens. Raises `CannotListen`."""
    try:
        return _on_socket(address.socket) if address.socket is not None else _on_port(address)
    except OSError as error:
        where = str(address.socket) if address.socket is not None else f"{address.host}:{address.port}"
        message = f"the page cannot be served on {where}: {error.strerror}"
        raise CannotListen(message, "name another address: web.listen in dropforge.toml, or --listen") from error


def address_words(listening: socket.socket, token: str) -> str:
    """Return the address to open in a browser, or how to reach a socket; the token is in it."""
    if listening.family == socket.AF_UNIX:
        path = listening.getsockname()
        return f"ssh -L 8765:{path} HOST, then http://localhost:8765/?token={token}"
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/?token={token}"


def _on_port(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((address.host, address.port))
    made.listen()
    return made


def _on_socket(path: Path) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode) and not _answers(path):
            path.unlink()  # of a server that is gone
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o777 & ~_SOCKET_MODE)
    try:
        made.bind(str(path))
    finally:
        os.umask(before)
    made.listen()
    return made


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True
