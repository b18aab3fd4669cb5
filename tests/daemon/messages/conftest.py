"""An address that is really there: it takes messages, refuses them, hangs, and comes back."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from daemon.messages.outbox import Messenger, open_outbox
from daemon.settings.sections import MessageSettings
from daemon.state.database import transaction
from daemon.state.events import record_event
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


def fail_hook(lived_in: Any, *errors: str) -> None:
    """Record that a hook failed by each of these errors."""
    with transaction(lived_in.engine) as session:
        for error in errors:
            record_event(session, "hook_failed", lived_in.tick(), track="default", run_id=1, error=error)


def messenger(lived_in: Any, troubles: Troubles | None = None) -> Messenger:
    """Return the messenger of a daemon that has just been started."""
    made = Messenger(lived_in.engine, lived_in.settings, troubles or Troubles())
    open_outbox(lived_in.engine, lived_in.settings, lived_in.now)
    return made
