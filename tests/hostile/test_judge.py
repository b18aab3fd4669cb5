"""A judge that is an enemy: it drips, never ends, or answers with more than anybody can hold."""

import contextlib
import socket
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.artifacts import Judgement
from pipeline.contract import Attempt
from pipeline.judge import client as judge_client
from pipeline.judge.step import judge
from tests.pipeline.judge.test_step import Bench, lines

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
_MIB = 1 << 20
#: Parts of an answer, as they are sent.
Parts = Iterator[bytes]


class RawEndpoint:
    """Sends what a function gives, part by part, to whoever asks, until they are gone or `over` is set."""

    def __init__(self, parts: Callable[[], Parts]) -> None:
        self.over = threading.Event()
        self.sent = 0
        self._parts = parts
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}/v1"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._server.accept()
            with connection, contextlib.suppress(OSError):
                if self.over.is_set():
                    return
                connection.recv(_MIB)
                for part in self._parts():
                    if self.over.is_set():
                        break
                    connection.sendall(part)
                    self.sent += len(part)

    def close(self) -> None:
        self.over.set()
        socket.create_connection(self._server.getsockname()).close()
        self._thread.join()
        self._server.close()


Judged = Callable[..., tuple[Judgement, RawEndpoint]]


@pytest.fixture
def judged(tmp_path: Path, make_attempt: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch) -> Iterator[Judged]:
    """Let such an endpoint judge one record in one try: judged(parts, seconds)."""
    made: list[RawEndpoint] = []
    monkeypatch.setattr(judge_client, "TRIES", 1)

    def ask(parts: Callable[[], Parts], seconds: float = 300) -> tuple[Judgement, RawEndpoint]:
        made.append(RawEndpoint(parts))
        attempt = Bench(tmp_path, make_attempt).attempt(made[-1].url, lines(1), timeout_seconds=seconds)
        return judge(attempt), made[-1]

    yield ask
    for one in made:
        one.close()


def drip(before: bytes, drop: bytes) -> Parts:
    """Give a drop again and again, each long before anybody loses patience with one."""
    yield before
    pause = threading.Event()
    while not pause.wait(0.01):
        yield drop


def pour(before: bytes, part: bytes) -> Parts:
    yield before
    while True:
        yield part


DRIPS: dict[str, tuple[bytes, bytes]] = {
    "a body of blanks": (_HEAD + b"\r\n", b" "),
    "a header": (_HEAD + b"X-Long: ", b"x"),
    "answers that go on": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a chunk": (_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
}


@pytest.mark.parametrize("what", DRIPS)
def test_one_that_drips_is_given_up_after_its_time_in_all(
    what: str, judged: Judged, capfd: pytest.CaptureFixture[str]
) -> None:
    judgement, _ = judged(lambda: drip(*DRIPS[what]), 0.5)
    assert judgement.failed == 1
    assert "no answer within 0.5 s" in capfd.readouterr().err


FLOODS: dict[str, tuple[bytes, bytes]] = {
    "a body without end": (_HEAD + b"\r\n", b" " * _MIB),
    "a body said to have 1 GB": (_HEAD + b"Content-Length: 1073741824\r\n\r\n", b" " * _MIB),
    "chunks without end": (_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"100000\r\n" + b" " * _MIB + b"\r\n"),
    "a header without end": (_HEAD + b"X-Long: ", b"x" * _MIB),
}


@pytest.mark.parametrize("what", FLOODS)
def test_one_that_floods_is_not_listened_to(what: str, judged: Judged) -> None:
    judgement, endpoint = judged(lambda: pour(*FLOODS[what]))
    # One question: what else was sent lies in the buffers of the two ends.
    assert (judgement.failed, endpoint.sent < 32 * _MIB) == (1, True)


def test_an_answer_that_unpacks_to_far_more_is_not_unpacked(judged: Judged) -> None:
    packer = zlib.compressobj(1, wbits=31)
    packed = b"".join([*(packer.compress(b" " * _MIB) for _ in range(128)), packer.flush()])
    head = _HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    tracemalloc.start()
    try:
        judgement, _ = judged(lambda: iter((head, packed)))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (judgement.failed, most < 32 * _MIB) == (1, True), most
