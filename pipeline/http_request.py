"""Send an HTTP request to a unix socket or to a host and port; an import contract says who may."""

import contextlib
import http.client
import json
import socket
import threading
import time

#: Most bytes of a response body.
_MOST_BYTES = 1 << 26


def request(
    server: str | tuple[str, int], method: str, path: str, body: object | None, seconds: float
) -> tuple[int, bytes]:
    """
    Send one request, with `body` as JSON unless it is `None`; return the status and the body of the answer.

    `server` is the path of a unix socket, or host and port. Raises `OSError` if it cannot be reached, speaks no HTTP,
    does not send a complete response within `seconds`, or sends more than 67 MB.
    """
    connection = _UnixConnection(server) if isinstance(server, str) else http.client.HTTPConnection(*server)
    connection.timeout, end = seconds, time.monotonic() + seconds
    sent = None if body is None else json.dumps(body).encode()
    try:
        with contextlib.closing(connection), contextlib.ExitStack() as opened:
            connection.connect()
            # A socket's timeout restarts with each received byte.
            timer = threading.Timer(end - time.monotonic(), _shut_down, (connection.sock,))
            timer.start()
            opened.callback(timer.join)
            opened.callback(timer.cancel)
            connection.request(method, path, sent, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            content = reply.read(_MOST_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        if time.monotonic() >= end:
            raise TimeoutError(f"no whole answer within {seconds:g} s") from error
        raise error if isinstance(error, OSError) else ConnectionError(str(error) or type(error).__name__) from error
    if time.monotonic() >= end:
        raise TimeoutError(f"no whole answer within {seconds:g} s")
    if len(content) > _MOST_BYTES:
        raise ConnectionError(f"the answer has more than {_MOST_BYTES:,} bytes")
    return reply.status, content


def _shut_down(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        connected.shutdown(socket.SHUT_RDWR)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP on a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        """Open the socket; it is closed with the connection."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
