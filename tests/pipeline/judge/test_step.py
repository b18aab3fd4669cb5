"""The judge's step against scripted endpoints on the loopback interface: who wins, what is asked, how it gives up."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline import durable
from pipeline.artifacts import Judgement
from pipeline.config import GateConfig, JudgeConfig
from pipeline.contract import RESULT_NAME, SPEC_NAME, Attempt
from pipeline.errors import Interrupted
from pipeline.judge import client as judge_client
from pipeline.judge.step import PARALLEL, judge
from tests.made_artifacts import report_of, run_config
from tests.records_made import write_lines

KEY = "sk-0123-never-written"
RECORDS = 6


@dataclass
class Asked:
    """One request as the endpoint saw it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    number: int
    """How many came before it."""

    @property
    def answers(self) -> tuple[str, str]:
        """Answer A and answer B."""
        found = re.findall(r"^=== ANSWER [AB] \w+ ===\n(.*?)\n=== end", self.user, re.DOTALL | re.MULTILINE)
        return found[0], found[1]

    @property
    def user(self) -> str:
        return str(self.body["messages"][1]["content"])


@dataclass
class Answer:
    """What the endpoint says."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


Script = Callable[[Asked], Answer]


class ScriptedEndpoint:
    """A chat endpoint on a free port that answers as a function says and keeps what it was asked."""

    def __init__(self, script: Script) -> None:
        self.asked: list[Asked] = []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    request = Asked(self.path, dict(self.headers), body, len(outer.asked))
                    outer.asked.append(request)
                answer = script(request)
                sent = answer.text.encode()
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """A client that gave up is what some tests are about."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


Serve = Callable[[Script], ScriptedEndpoint]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A factory of endpoints."""
    made: list[ScriptedEndpoint] = []

    def start(script: Script) -> ScriptedEndpoint:
        made.append(ScriptedEndpoint(script))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """An event that scripts wait for; it opens when the test is over, so that no handler is left."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client would have waited between its tries."""
    seconds: list[float] = []

    async def pause(wait: float) -> None:
        seconds.append(wait)

    monkeypatch.setattr(judge_client, "_pause", pause)
    return seconds


def says(reply: str) -> Answer:
    return Answer(json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}))


def winner(name: str) -> Answer:
    return says(json.dumps({"winner": name}))


def longer(asked: Asked) -> Answer:
    first, second = (len(text) for text in asked.answers)
    return winner("A" if first > second else "B" if second > first else "tie")


def line(place: int, candidate: str, champion: str) -> dict[str, Any]:
    splits = {
        role: {"text": text, "tokens": 1, "scores": {}, "nll_sum": 1.0, "nll_tokens": 1, "degenerate": []}
        for role, text in (("candidate", candidate), ("champion", champion))
    }
    texts = {"instruction": "Say it.", "input": f"number {place}", "references": [f"reference {place}"]}
    facts = {"id": f"{place:032x}", "group": f"{place:032x}", "drop": 1, "pinned": False, "tags": []}
    return {**facts, **texts, **splits}


def lines(count: int = RECORDS, candidate: str = "a long answer", champion: str = "short") -> list[dict[str, Any]]:
    return [line(place, f"{candidate} {place}", f"{champion} {place}") for place in range(count)]


class Bench:
    """A run whose report is written; attempts at judging it."""

    def __init__(self, root: Path, make: Callable[..., Attempt]) -> None:
        self.root, self._make = root, make

    def attempt(self, url: str, rows: Sequence[dict[str, Any]], **settings: Any) -> Attempt:
        (self.root / "report").mkdir(exist_ok=True)
        write_lines(self.root / "report/records.jsonl", rows)
        config = run_config(
            "b", "b", judge=JudgeConfig(url=url, **{"model": "judge-1", "timeout_seconds": 300, **settings})
        )
        return self._make("judge", config=config, inputs={"evaluate": report_of(len(rows))})

    def judged_by(self, attempt: Attempt, on: str, drops: tuple[int, ...] | None) -> Attempt:
        """Return the attempt for a gate of that setting, where the champion was trained on `drops`."""
        gate = GateConfig.model_validate({"on": on})
        champion = attempt.spec.champion.model_copy(update={"drops": drops})
        config = attempt.config.model_copy(update={"gate": gate})
        return Attempt(attempt.spec.model_copy(update={"config": config, "champion": champion}))


@pytest.fixture
def bench(tmp_path: Path, make_attempt: Callable[..., Attempt]) -> Bench:
    return Bench(tmp_path, make_attempt)


def judgements(attempt: Attempt, judgement: Judgement) -> list[dict[str, Any]]:
    found = list(durable.read_jsonl(attempt.path(judgement.folder) / "judgements.jsonl"))
    assert len(found) == judgement.records
    results = [one["result"] for one in found]
    assert judgement.wins == results.count("win")
    assert judgement.losses == results.count("loss")
    assert judgement.inconsistent == results.count("inconsistent")
    assert judgement.ties == results.count("tie") + judgement.inconsistent
    assert judgement.failed == results.count("failed")
    assert judgement.wins + judgement.losses + judgement.ties + judgement.failed == judgement.records
    return found


def dead_url() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


# --- who wins


def test_a_win_is_the_same_winner_in_both_orders_and_equal_answers_are_ties_without_a_question(
    bench: Bench, serve: Serve
) -> None:
    endpoint = serve(lambda asked: winner("A") if "first" in asked.answers else longer(asked))
    texts = [("much longer", "short"), ("short", "much longer"), ("equal", "longs"), ("first", "second")]
    rows = [line(place, *each) for place, each in enumerate([*texts, ("same", " same\n")])]
    attempt = bench.attempt(endpoint.url, rows)
    judgement = judge(attempt)
    assert [tuple(one.values()) for one in judgements(attempt, judgement)] == [
        (rows[0]["id"], "A", "B", "win"),
        (rows[1]["id"], "B", "A", "loss"),
        (rows[2]["id"], "tie", "tie", "tie"),
        (rows[3]["id"], "A", "A", "inconsistent"),
        (rows[4]["id"], "tie", "tie", "tie"),
    ]
    assert (judgement.model, len(endpoint.asked)) == ("judge-1", 8)
    assert {one.answers for one in endpoint.asked} == {*texts, *((second, first) for first, second in texts)}


def test_the_request_is_deterministic_short_and_carries_no_key_that_nobody_set(bench: Bench, serve: Serve) -> None:
    endpoint = serve(longer)
    turns = [["user", "One?"], ["assistant", "1"]]
    judge(bench.attempt(endpoint.url + "/", [{**lines(1)[0], "turns": turns}]))
    first = endpoint.asked[0]
    assert first.path == "/v1/chat/completions"
    body = {name: value for name, value in first.body.items() if name != "messages"}
    assert body == {"model": "judge-1", "temperature": 0, "seed": 0, "max_tokens": 64, "stream": False}
    assert "Authorization" not in first.headers
    request = "user:\nOne?\n\nassistant:\n1\n\nuser:\nSay it.\n### Input:\nnumber 0"
    for quoted in (request, "reference 0", "a long answer 0", "short 0"):
        assert quoted in first.user


@pytest.mark.parametrize(
    ("on", "drops", "places"),
    [
        ("all", (1,), [0, 1, 2]),
        ("pinned", (1,), [4, 5]),
        ("seen", (1,), [0, 2, 4]),
        ("seen", (7,), [4, 5]),
        ("seen", None, [0, 1, 2]),
    ],
)
def test_only_records_that_the_gate_judges_on_are_asked_about(
    bench: Bench, serve: Serve, on: str, drops: tuple[int, ...] | None, places: list[int]
) -> None:
    rows = [{**one, "drop": 1 + place % 2, "pinned": place > 3} for place, one in enumerate(lines())]
    # Those with the lowest ids, whatever their order.
    attempt = bench.judged_by(bench.attempt(serve(longer).url, rows[::-1], records=3), on, drops)
    found = judgements(attempt, judge(attempt))
    assert [one["id"] for one in found] == [rows[place]["id"] for place in places]


# --- what cannot be read or reached


@pytest.mark.parametrize(
    "body",
    [says("banana").text, "<html>", '{"choices": []}', "[" * 100_000, winner("A").text + " " * (1 << 20)],
    ids=["words", "html", "no choices", "deep", "endless"],
)
def test_garbage_is_failed_and_never_a_win(
    bench: Bench, serve: Serve, body: str, capfd: pytest.CaptureFixture[str]
) -> None:
    endpoint = serve(lambda _: Answer(body))
    attempt = bench.attempt(endpoint.url, lines())
    judgement = judge(attempt)
    assert {one["result"] for one in judgements(attempt, judgement)} == {"failed"}
    assert (judgement.failed, len(endpoint.asked)) == (RECORDS, RECORDS), "the other order cannot make it count"
    assert "a reply without a winner" in capfd.readouterr().err


def test_a_busy_endpoint_is_asked_again_but_not_without_end(
    bench: Bench, serve: Serve, waits: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    endpoint = serve(lambda asked: Answer(status=503) if asked.number % 2 else longer(asked))
    attempt = bench.attempt(endpoint.url, lines(400), records=400)
    judgement = judge(attempt)
    judgements(attempt, judgement)
    in_all = judge_client.TRIES_IN_ALL
    assert len(waits) <= in_all + PARALLEL
    assert len(endpoint.asked) <= 2 * (in_all + PARALLEL)
    assert 0 < judgement.wins < 400
    assert judgement.wins + judgement.failed == 400
    err = capfd.readouterr().err
    assert "given up: 200 tries failed in all; the last: status 503" in err
    assert "the gate decides without them" in err


@pytest.mark.parametrize(("wish", "wait"), [("7", 7.0), ("9999", 60.0), ("soon", 1.0)])
def test_a_busy_endpoint_is_prompted_again_after_the_time_that_it_names_within_a_bound(
    bench: Bench, serve: Serve, waits: list[float], wish: str, wait: float
) -> None:
    busy = Answer(status=429, headers={"Retry-After": wish})
    endpoint = serve(lambda asked: longer(asked) if asked.number else busy)
    judgement = judge(bench.attempt(endpoint.url, lines(1)))
    assert (judgement.wins, judgement.failed, waits) == (1, 0, [wait])


def test_a_dead_port_is_given_up(bench: Bench, waits: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    attempt = bench.attempt(dead_url(), [*lines(), line(99, "same", "same")])
    judgement = judge(attempt)
    judgements(attempt, judgement)
    assert (judgement.failed, judgement.ties, judgement.records) == (RECORDS, 1, RECORDS + 1)
    assert sorted(waits) == sorted(RECORDS * [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0])
    assert "no connection (ConnectError" in capfd.readouterr().err


def test_a_redirect_is_not_followed(
    bench: Bench, serve: Serve, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    other = serve(longer)
    away = other.url.replace("127.0.0.1", "localhost") + "/chat/completions"
    endpoint = serve(lambda _: Answer(status=307, headers={"Location": away}))
    attempt = bench.attempt(endpoint.url, lines(), api_key_env="JUDGE_KEY")
    assert judge(attempt).failed == RECORDS
    assert other.asked == []
    assert len(endpoint.asked) <= PARALLEL
    assert "it redirects (status 307), which is not followed" in capfd.readouterr().err


@pytest.mark.parametrize(("status", "words"), [(401, "judge.api_key_env"), (404, "judge.model"), (405, "judge.url")])
def test_what_every_question_would_get_is_asked_once(
    bench: Bench, serve: Serve, waits: list[float], capfd: pytest.CaptureFixture[str], status: int, words: str
) -> None:
    endpoint = serve(lambda _: Answer(status=status))
    assert judge(bench.attempt(endpoint.url, lines(50))).failed == 50
    assert (len(endpoint.asked) <= PARALLEL, waits) == (True, [])
    assert words in capfd.readouterr().err


def test_refused_questions_are_no_reason_to_give_up(bench: Bench, serve: Serve) -> None:
    refused = re.compile(r"number \d*[13579]\n")
    endpoint = serve(lambda asked: Answer(status=400) if refused.search(asked.user) else longer(asked))
    judgement = judge(bench.attempt(endpoint.url, lines(20)))
    assert (judgement.wins, judgement.failed) == (10, 10)


def test_what_listens_here_is_not_asked_through_a_proxy_and_all_else_is(
    bench: Bench, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, endpoint = serve(longer), serve(longer)
    for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
    assert judge(bench.attempt(endpoint.url, lines(1))).wins == 1
    assert proxy.asked == []
    assert judge(bench.attempt("http://judge.invalid/v1", lines(1), model="other")).wins == 1
    assert {one.path for one in proxy.asked} == {"http://judge.invalid/v1/chat/completions"}


def test_a_proxy_that_cannot_be_used_is_given_up_without_its_password(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("http_proxy", f"gopher://name:{KEY}@proxy")
    assert judge(bench.attempt("http://judge.invalid/v1", lines())).failed == RECORDS
    err = capfd.readouterr().err
    assert ("proxy or certificates" in err, KEY in err) == (True, False)


# --- its key


@pytest.mark.parametrize(
    ("key", "words"), [(None, "JUDGE_KEY, which"), ("", "is not set"), (f"{KEY}\n2", "no key has")]
)
def test_without_a_usable_key_nothing_is_asked(
    bench: Bench,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    key: str | None,
    words: str,
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("JUDGE_KEY", key)
    endpoint = serve(longer)
    assert judge(bench.attempt(endpoint.url, lines(), api_key_env="JUDGE_KEY")).failed == RECORDS
    err = capfd.readouterr().err
    assert (endpoint.asked, words in err, KEY in err) == ([], True, False)


def start(attempt: Attempt, **environment: str) -> subprocess.Popen[bytes]:
    """Run the step as the worker does, its output in a file of the attempt's."""
    durable.write_json(attempt.folder / SPEC_NAME, attempt.spec.model_dump(mode="json"))
    argv = [sys.executable, "-P", "-m", "pipeline", "judge", str(attempt.folder / SPEC_NAME)]
    with (attempt.folder / "log.txt").open("wb") as log:
        return subprocess.Popen(argv, env={**os.environ, **environment}, stdout=log, stderr=log)


def test_the_key_is_written_nowhere_though_the_endpoint_repeats_it(bench: Bench, serve: Serve, tmp_path: Path) -> None:
    def repeat(asked: Asked) -> Answer:
        said = asked.headers["Authorization"]
        headers = {"Location": f"http://127.0.0.1:1/{KEY}", "Retry-After": "0", "X-Key": said}
        return Answer(says(said).text, statuses[asked.number % len(statuses)], headers)

    statuses = [200, 429, 400, 401, 307]
    endpoint = serve(repeat)
    attempt = bench.attempt(endpoint.url, lines(len(statuses)), api_key_env="JUDGE_KEY")
    assert start(attempt, JUDGE_KEY=f" {KEY}\n").wait() == 0
    assert len(endpoint.asked) >= len(statuses)
    assert {one.headers["Authorization"] for one in endpoint.asked} == {f"Bearer {KEY}"}
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert attempt.folder / RESULT_NAME in written
    assert b"JUDGE_KEY" in written[attempt.folder / SPEC_NAME], "its name is there"
    assert [path for path, data in written.items() if KEY.encode() in data] == []


# --- cut off


def test_a_later_attempt_asks_what_is_not_known_yet_and_nothing_else(
    bench: Bench, serve: Serve, gate: threading.Event
) -> None:
    attempts: list[Attempt] = []

    def until_stopped(asked: Asked) -> Answer:
        if asked.number < 5:
            return longer(asked)
        attempts[0].stop.set()
        gate.wait()
        return winner("A")

    first = serve(until_stopped)
    attempts.append(bench.attempt(first.url, lines()))
    with pytest.raises(Interrupted):
        judge(attempts[0])
    (kept,) = attempts[0].folder.rglob("judge.replies.jsonl")
    known = len(kept.read_bytes().splitlines())
    assert 1 <= known <= 5
    with kept.open("ab") as file:
        file.write(b'{"batch": "cut o')

    second = serve(longer)
    attempt = bench.attempt(second.url, lines())
    judgement = judge(attempt)
    assert {one["result"] for one in judgements(attempt, judgement)} == {"win"}
    assert len(second.asked) == 2 * RECORDS - known
    assert len({one.user for one in second.asked}) == len(second.asked)
    third = bench.attempt(dead_url(), lines())
    assert judge(third).wins == RECORDS, "all is known: no endpoint is needed"


def test_another_answer_or_another_judge_is_asked_anew(bench: Bench, serve: Serve) -> None:
    endpoint = serve(longer)
    old = judge(bench.attempt(endpoint.url, lines()))
    rows = [*lines()[:-1], line(RECORDS - 1, "s", "the champion is longer")]
    assert (old.wins, len(endpoint.asked)) == (RECORDS, 2 * RECORDS)
    assert judge(bench.attempt(endpoint.url, rows)).losses == 1
    assert len(endpoint.asked) == 2 * RECORDS + 2
    judge(bench.attempt(endpoint.url, rows, model="judge-2"))
    assert len(endpoint.asked) == 4 * RECORDS + 2


def test_sigterm_ends_it_at_once_though_the_endpoint_hangs(bench: Bench, serve: Serve, gate: threading.Event) -> None:
    begun = threading.Event()

    def hang(_: Asked) -> Answer:
        begun.set()
        gate.wait()
        return winner("A")

    attempt = bench.attempt(serve(hang).url, lines())
    process = start(attempt)
    assert begun.wait(300)
    process.send_signal(signal.SIGTERM)
    # The endpoint is let go by the fixture alone, and one answer may take 300 s.
    assert process.wait(60) == 75
    assert durable.read_json(attempt.folder / RESULT_NAME)["status"] == "interrupted"
