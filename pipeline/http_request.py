"""One request to an HTTP server, on a unix socket or at a host and port; who may use it, a contract says."""

import contextlib
import http.client
import json
import socket
import threading
import time

#: Bytes of an answer.
_MOST_BYTES = 1 << 26


def request(
    server: str | tuple[str, int], method: str, path: str, body: object | None, seconds: float
) -> tuple[int, bytes]:
    """
    Send one request, with `body` as JSON unless it is `None`; return the status and the body of the answer.

    `server` is the path of a unix socket, or host and port. Raises `OSError` if it cannot be reached, speaks no HTTP,
    or does not send the whole answer within `seconds`, or sends more than 67 MB.
    """
    connection = _UnixConnection(server) if isinstance(server, str) else http.client.HTTPConnection(*server)
    connection.timeout, end = seconds, time.monotonic() + seconds
    content = None if body is None else json.dumps(body).encode()
    try:
        with contextlib.closing(connection), contextlib.ExitStack() as opened:
            connection.connect()
            # The timeout of a socket begins anew with each byte that comes.
            timer = threading.Timer(end - time.monotonic(), _shut_down, (connection.sock,))
            timer.start()
            opened.callback(timer.join)
            opened.callback(timer.cancel)
            connection.request(method, path, content, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            said = reply.read(_MOST_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        if time.monotonic() >= end:
            raise TimeoutError(f"no whole answer within {seconds:g} s") from error
        raise error if isinstance(error, OSError) else ConnectionError(str(error) or type(error).__name__) from error
    if time.monotonic() >= end:
        raise TimeoutError(f"no whole answer within {seconds:g} s")
    if len(said) > _MOST_BYTES:
        raise ConnectionError(f"the answer has more than {_MOST_BYTES:,} bytes")
    return reply.status, said


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
