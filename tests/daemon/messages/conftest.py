"""An address that is really there: it takes messages, refuses them, hangs, and comes back."""

import base64
import email
import email.policy
import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from daemon.messages.messenger import Messenger
from daemon.messages.outbox import open_outbox
from daemon.settings.messages import MessageSettings
from daemon.state.troubles import Troubles


class Address:
    """A server that writes down what it was sent, in order, and how it answered."""

    def __init__(self) -> None:
        #: What it says next: a status, or `None` to say nothing before `release`.
        self.answer: int | None = 200
        self.taken: list[dict[str, Any]] = []
        self.refused: list[dict[str, Any]] = []
        self.arrived = threading.Event()
        self.release = threading.Event()
        made = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                made.arrived.set()
                if made.answer is None:
                    made.refused.append(sent)
                    made.release.wait()
                    return
                (made.taken if made.answer < 300 else made.refused).append(sent)
                self._answer(made.answer)

            def _answer(self, status: int) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it takes messages; an answer is waited for half a second."""
        return f"json://user:hunter2@127.0.0.1:{self._server.server_port}/?rto=0.5"

    @property
    def titles(self) -> list[str]:
        return [sent["title"] for sent in self.taken]

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Mailbox:
    """A mail server that takes what its one user sends, and keeps it as it came over the wire."""

    USER = b"\0anna\0hunter2"

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        made = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.wfile.write(b"220 here\r\n")
                for line in iter(self.rfile.readline, b""):
                    self.wfile.write(self._said(*line.strip().partition(b" ")[::2]) + b"\r\n")

            def _said(self, verb: bytes, rest: bytes) -> bytes:
                if verb.upper() == b"EHLO":
                    return b"250-here\r\n250 AUTH PLAIN"
                if verb.upper() == b"AUTH":
                    is_right = base64.b64decode(rest.removeprefix(b"PLAIN ")) == made.USER
                    return b"235 well" if is_right else b"535 wrong password"
                if verb.upper() == b"DATA":
                    self.wfile.write(b"354 go on\r\n")
                    made.taken.append(b"".join(iter(self.rfile.readline, b".\r\n")))
                return b"250 well"

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def url(self) -> str:
        """Where mails are sent to, as the settings have it."""
        port = self._server.server_address[1]
        return f"mailto://anna:hunter2@example.org:{port}/?smtp=127.0.0.1&to=box@example.org"

    @property
    def mails(self) -> list[EmailMessage]:
        """The mails as a person's program reads them."""
        return [email.message_from_bytes(sent, policy=email.policy.default) for sent in self.taken]

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    made = Mailbox()
    yield made
    made.close()


@pytest.fixture
def new_address(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Address]]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    made: list[Address] = []

    def make() -> Address:
        made.append(Address())
        return made[-1]

    yield make
    for address in made:
        address.close()


@pytest.fixture
def address(new_address: Callable[[], Address]) -> Address:
    return new_address()


def with_messages(lived_in: Any, **own: Any) -> Any:
    """Give a workspace addresses, from now on; the digest is none unless it is asked for."""
    settings = MessageSettings(**{"digest": "", **own})
    lived_in.settings = lived_in.settings.model_copy(update={"messages": settings})
    open_outbox(lived_in.engine, lived_in.settings, lived_in.now)
    return lived_in


def messenger(lived_in: Any, troubles: Troubles | None = None) -> Messenger:
    """Return the messenger of a daemon that has just been started."""
    made = Messenger(lived_in.engine, lived_in.settings, troubles or Troubles())
    open_outbox(lived_in.engine, lived_in.settings, lived_in.now)
    return made
