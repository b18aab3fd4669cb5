"""The pages, drawn from a state folder that has been lived in."""

import html
import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from daemon.state.clauses import Suspension
from daemon.state.database import transaction
from daemon.state.states import DropState
from daemon.state.tables import Drop, Run
from daemon.views.overview import Overview
from daemon.views.reader import reading
from daemon.web.security import cookie_name
from daemon.web.server import make_app
from pipeline import durable
from pipeline.artifacts import TrialScores
from tests.daemon.conftest import lines
from tests.daemon.web.conftest import HERE, TOKEN

PAGES = (
    "/",
    "/runs",
    "/runs?track=default&state=failed",
    "/runs?before=3",
    "/runs/1",
    "/runs/2",
    "/runs/3",
    "/drops",
    "/drops?track=default&state=rejected",
    "/drops?before=4",
    "/drops/1",
    "/drops/2",
    "/drops/4",
    "/tracks/default",
    "/tracks/support",
    "/tracks/default?before=1",
    "/inbox",
    "/inbox?before=4",
)
MARKUP = '<script>alert(1)</script><img src=x onerror=alert(1)>" onmouseover="alert(1)'
TURNS = "\u202e\u2066\x1b[31m\x00\x7f"
#: Elements and attributes by which a page could run or load something.
_RUNS = re.compile(r"^on|^style$|^srcdoc$")


class Elements(HTMLParser):
    """All that a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_drawn_and_who_may_only_look_is_offered_nothing_else(reader: TestClient, path: str) -> None:
    answer = reader.get(path)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    forms = [attributes for tag, attributes in Elements(answer.text).found if tag == "form"]
    assert all(one.get("method", "get") == "get" for one in forms)


@pytest.mark.parametrize("path", ["/runs/99", "/drops/99", "/tracks/none", "/runs/1/report", "/nowhere"])
def test_what_there_is_not_is_said_on_a_page(reader: TestClient, path: str) -> None:
    answer = reader.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/html")


def test_before_the_first_daemon_every_list_is_empty(visitor: TestClient, lived_in: Any) -> None:
    lived_in.engine.dispose()
    for path in lived_in.settings.state_folder.glob("dropforge.db*"):
        path.unlink()
    for path in ("/", "/runs", "/drops", "/inbox", "/tracks/default"):
        assert visitor.get(path).status_code == 200, path


def test_what_strangers_write_is_text(person: TestClient, lived_in: Any) -> None:
    hostile = MARKUP + TURNS
    row = {"instruction": f"say {hostile}", "input": hostile, "output": hostile, "tags": ["fine"]}
    lived_in.take(f"{MARKUP.replace('/', '_')}\u202e.jsonl", json.dumps(row) + "\n")
    lived_in.take("bad.jsonl", json.dumps({MARKUP: hostile, "instruction": "x"}) + "\n")
    newest = Overview.of(lived_in.settings).drops(most=2)
    person.post(f"/drops/{newest[1].id}/withdraw", data={"reason": hostile})
    person.post("/tracks/default/pause", data={"reason": hostile})
    paths = ("/", "/drops", "/inbox", *(f"/drops/{drop.id}" for drop in newest), "/tracks/default", "/runs")
    shown = 0
    for path in paths:
        text = person.get(path).text
        shown += "&lt;script&gt;alert(1)" in text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text), path
        for tag, attributes in Elements(text).found:
            assert not [name for name in attributes if _RUNS.match(name)], (path, tag, attributes)
            source = attributes.get("src") or attributes.get("href") or "/"
            assert source.startswith(("/", "#", "?")) or source == "data:,", (path, tag, source)
            if tag == "script":
                assert set(attributes) >= {"src"}
    assert shown >= 4


def test_runs_that_run_at_once_are_all_shown(person: TestClient, lived_in: Any) -> None:
    lived_in.take("first.jsonl", '{"instruction": "say e", "output": "e"}\n', track="support")
    lived_in.attempt(lived_in.claim(), "prepare", None)
    page = person.get("/").text
    assert "<title>2 runs" in page
    assert [re.search(f"<h3>Run {run} of track", page) is not None for run in (3, 4)] == [True, True]
    assert [f'action="/runs/{run}/cancel"' in page for run in (3, 4)] == [True, True]
    assert [one["run"]["id"] for one in person.get("/api/v1/status").json()["running"]] == [3, 4]


def test_the_page_says_where_the_job_of_a_step_runs(person: TestClient, lived_in: Any) -> None:
    told = {"job": 4711, "state": "RUNNING", "reason": "None", "nodes": "n2", "since": 1}
    durable.write_hint(lived_in.settings.state_folder / "runs/3/attempts/train-1/job-state.json", told)
    with transaction(lived_in.engine) as session:
        session.get_one(Run, 3).error = "Slurm ended job 4710"
    for path in ("/", "/runs/3"):
        page = person.get(path).text
        assert ("train on n2<" in page, "Slurm ended job 4710" in page) == (True, True), path
    assert person.get("/api/v1/runs/3").json()["progress"]["where"] == "on n2"


def test_the_card_runs_nothing_whatever_is_in_it(person: TestClient, lived_in: Any) -> None:
    root = lived_in.settings.state_folder
    folder = root / "runs/1/attempts/decide-1/report"
    folder.mkdir()
    (folder / "report.html").write_text("<script>alert(1)</script>")
    verdict = json.loads((root / "runs/1/decide.json").read_text())
    (root / "runs/1/decide.json").write_text(json.dumps({**verdict, "report": str(folder.relative_to(root))}))
    answer = person.get("/runs/1/report")
    assert answer.text == "<script>alert(1)</script>"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox allow-popups; default-src 'none'")
    assert "script" not in policy
    assert "allow-scripts" not in policy
    assert "/runs/1/report" in person.get("/runs/1").text


@contextmanager
def _traced(path: Path, said: list[str]) -> Iterator[sqlite3.Connection]:
    with reading(path) as base:
        base.set_trace_callback(said.append)
        yield base


@pytest.mark.parametrize("path", [*PAGES, "/api/v1/status"])
def test_no_page_reads_a_whole_table(
    owner: TestClient, lived_in_once: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of the newest may go through a table from its end; nothing else may without an index."""
    said: list[str] = []
    monkeypatch.setattr("daemon.views.reader.reading", lambda place: _traced(place, said))
    assert owner.get(path).status_code == 200
    asked = {one for one in said if one.startswith("SELECT")}
    assert asked
    assert len(said) < 150
    with sqlite3.connect(lived_in_once.settings.state_folder / "dropforge.db") as base:
        for question in asked:
            plan = [row[3] for row in base.execute(f"EXPLAIN QUERY PLAN {question}")]
            scans = [line for line in plan if re.match(r"SCAN (run|drop|event|promotion|attempt)\b(?!.*INDEX)", line)]
            assert not scans or question.endswith(f"LIMIT {question.rpartition(' ')[2]}"), (question, plan)
    base.close()


def test_a_drop_that_was_left_out_says_what_it_is_worth(visitor: TestClient, lived_in: Any) -> None:
    with transaction(lived_in.engine) as session:
        drop = session.get_one(Drop, 2)
        drop.worth_points, drop.worth_half_width, drop.worth_run = -3.0, 0.5, 3
    worth = "worth −3.0 points ±0.5 of these two models (run 3)"
    assert f"<small><bdi>{worth}</bdi></small>" in visitor.get("/drops").text
    assert f"It is {worth}. " in visitor.get("/drops/2").text


@pytest.mark.parametrize("points", [6.0, 79.5, None])
def test_a_drop_says_how_well_the_champions_answers_agree(
    visitor: TestClient, lived_in: Any, points: float | None
) -> None:
    with transaction(lived_in.engine) as session:
        preview: dict[str, object] = {"records": 100, "points": points, "metric": "rougeL", "usual": 81.3}
        drop = session.get_one(Drop, 2)
        drop.preview, drop.first_run = preview, None
    page = html.unescape(visitor.get("/drops/2").text)
    assert ("agreement" in page) == bool(points)
    words = f"Before any training: agreement {points} points: the champion's answers to 100 new records (rougeL)"
    assert (f"<p>{words}.</p>" in page) == (points == 79.5)
    far = "; far below its 81.3 on held-out records: a new kind of task, or wrong answers."
    assert (f'<p class="notice bad">{words}{far} It is used all the same.</p>' in page) == (points == 6.0)
    for changed in ({"first_run": 3}, {"first_run": None, "state": DropState.WITHDRAWN}):
        with transaction(lived_in.engine) as session:
            session.get_one(Drop, 2).sqlmodel_update(changed)
        page = html.unescape(visitor.get("/drops/2").text)
        assert (f'<p class="notice bad">{words}{far}</p>' in page) == (points == 6.0)


def test_a_suspended_drop_lists_what_was_found_and_what_helps(visitor: TestClient, lived_in: Any) -> None:
    with transaction(lived_in.engine) as session:
        drop = session.get_one(Drop, 2)
        scores = TrialScores(groups=9, wins=1, losses=8, p_value=0.01)
        found = Suspension(blamed_run=2, trial=3, tested=(2,), control=4, scores=scores)
        drop.state, drop.suspension = DropState.SUSPENDED, found.model_dump(mode="json")
        session.add(drop)
    page = visitor.get("/drops/2").text
    assert "<bdi>run 2 was worse with it, and so was run 3, which tried it alone</bdi>" in page
    assert "<li>Withdraw what is out of date: dropforge drops withdraw DROP --reason TEXT</li>" in page
    (short,) = [line for line in visitor.get("/drops").text.splitlines() if "run 2 was worse with it" in line]
    assert "Withdraw" not in short


def test_a_form_that_chooses_nothing_shows_all(reader: TestClient) -> None:
    assert reader.get("/runs?track=&state=").text == reader.get("/runs").text
    assert reader.get("/drops?track=&state=").text == reader.get("/drops").text
    assert reader.get("/runs?track=&state=failed").text != reader.get("/runs").text


def test_no_request_reads_more_of_a_drop_than_its_first_10_000_rows(lived_in: Any, visitor: TestClient) -> None:
    lived_in.take("long.jsonl", lines(*(f"w{number}" for number in range(10_021))))
    (drop,) = Overview.of(lived_in.settings).drops(most=1)
    assert "Further rows" in visitor.get(f"/drops/{drop.id}?after=9980").text
    last = visitor.get(f"/drops/{drop.id}?after=10000").text
    assert "Rows 10,001 to 10,020" in last
    assert "Further rows" not in last
    assert "Rows after the first 10,020 are not shown here." in last
    for path in (f"/drops/{drop.id}", f"/api/v1/drops/{drop.id}/rows"):
        assert visitor.get(f"{path}?after=10001").status_code == 422


def test_the_first_records_of_a_drop_are_shown_as_the_model_sees_them(lived_in: Any, tiny_llama: Path) -> None:
    settings = lived_in.settings.model_copy(update={"base_model": str(tiny_llama)})
    there: dict[str, Any] = {"base_url": HERE, "follow_redirects": False}
    person = TestClient(
        make_app(settings, TOKEN), **there, cookies={cookie_name(TOKEN): TOKEN}, headers={"origin": HERE}
    )
    row = {"instruction": "say </pre>", "output": "<b>ok</b>"}
    lived_in.take("seen.jsonl", json.dumps(row) + "\n")
    drop = Overview.of(settings).drops(most=1)[0].id
    assert f'action="/drops/{drop}/shown"' in person.get(f"/drops/{drop}").text
    page = person.post(f"/drops/{drop}/shown")
    assert page.status_code == 200, page.text
    begin, learned = (
        "say &lt;/pre&gt;&lt;|im_end|&gt;\n&lt;|im_start|&gt;assistant\n",
        "&lt;b&gt;ok&lt;/b&gt;&lt;|im_end|&gt;",
    )
    assert f"{begin}<mark>{learned}</mark>" in page.text
    assert "of which the last" in page.text
    stranger = TestClient(make_app(settings, TOKEN), **there)
    assert stranger.post(f"/drops/{drop}/shown").status_code in {401, 403}
    assert "/shown" not in stranger.get(f"/drops/{drop}").text
    (lived_in.settings.state_folder / "drops" / f"{Overview.of(settings).drop(drop).sha256}.jsonl").unlink()
    gone = person.post(f"/drops/{drop}/shown")
    assert (gone.status_code, "were not kept" in gone.text) == (404, True)
