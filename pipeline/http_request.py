"""One request to an HTTP server, on a unix socket or at a host and port; who may use it, a contract says."""

import contextlib
import http.client
import json
import socket


def request(
    server: str | tuple[str, int], method: str, path: str, body: object | None, seconds: float
) -> tuple[int, bytes]:
    """
    Send one request, with `body` as JSON unless it is `None`; return the answer's status and all that it says.

    `server` is the path of a unix socket, or host and port. Raises `OSError` if it is not there, says nothing for
    `seconds`, or speaks no HTTP.
    """
    connection = _UnixConnection(server) if isinstance(server, str) else http.client.HTTPConnection(*server)
    connection.timeout = seconds
    content = None if body is None else json.dumps(body).encode()
    try:
        with contextlib.closing(connection):
            connection.request(method, path, content, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read()
    except http.client.HTTPException as error:
        raise ConnectionError(str(error) or type(error).__name__) from error


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
