"""The API: what its document says it takes, and what the commands say with --json."""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from starlette.testclient import TestClient

from daemon.web.server import make_app
from tests.daemon.web.conftest import HERE, TOKEN

#: It goes on for ever; tests/daemon/web/test_live.py has it.
ENDLESS = "/api/v1/live"


def test_the_document_names_what_can_be_done_and_has_words_for_each(app: FastAPI) -> None:
    document = app.openapi()
    operations = [one for methods in document["paths"].values() for one in methods.values()]
    assert len(operations) >= 22
    assert all(one.get("description") and one["operationId"] for one in operations)
    assert all(path.startswith("/api/v1/") for path in document["paths"])


def test_page_and_command_say_the_same(program: TestClient, dropforge: Callable[..., Any]) -> None:
    assert program.get("/api/v1/runs").json() == dropforge("runs", "--json").json["runs"]
    assert program.get("/api/v1/runs/1").json() == dropforge("show", "1", "--json").json["run"]
    assert program.get("/api/v1/drops").json() == dropforge("drops", "--json").json["drops"]
    assert program.get("/api/v1/tracks/default/champions").json() == dropforge("history", "--json").json["history"]


def test_lists_are_read_a_page_at_a_time(program: TestClient, lived_in: Any) -> None:
    with lived_in.engine.begin() as connection:
        for number in range(100, 220):
            connection.exec_driver_sql(
                "INSERT INTO run (id, track, state, trigger, created_at, not_before, ended_at, failures, deaths, "
                "cancel_requested) VALUES (?, 'default', 'failed', 'drop', 1, 1, 2, 0, 0, 0)",
                (number,),
            )
    seen: list[int] = []
    before: dict[str, int] = {}
    while page := program.get("/api/v1/runs", params=before).json():
        assert len(page) <= 50
        seen += [run["id"] for run in page]
        before = {"before": seen[-1]}
    assert seen == [*range(219, 99, -1), 3, 2, 1]


def test_an_error_says_what_to_do(program: TestClient) -> None:
    answer = program.get("/api/v1/runs/99")
    assert answer.status_code == 404
    assert answer.json() == {
        "schema": 1,
        "error": {"code": 404, "message": "there is no run 99", "hint": "list them: dropforge runs"},
    }
    assert program.get("/api/v1/runs/1/report").status_code == 404
    wrong = program.post("/api/v1/tracks/default/rollback", json={"to": 0})
    assert wrong.status_code == 422
    assert "reason" in wrong.json()["error"]["message"]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_nothing_that_can_be_asked_is_an_error_of_ours(
    lived_in: Any, monkeypatch: pytest.MonkeyPatch, mode: GenerationMode
) -> None:
    monkeypatch.setattr("daemon.web.actions.require_answer", lambda _folder: None)
    app = make_app(lived_in.settings, TOKEN)
    headers = {"host": HERE.removeprefix("http://"), "authorization": f"Bearer {TOKEN}"}
    answers: Counter[int] = Counter()
    schema: Any = schemathesis.openapi.from_asgi("/api/v1/openapi.json", app, headers=headers)
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path == ENDLESS:
            continue

        @seed(1)
        @settings(max_examples=5, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            answer = case.call(headers={**(case.headers or {}), **headers})
            answers[answer.status_code] += 1
            assert answer.status_code < 500, (case.method, case.formatted_path, case.body, answer.text)

        with suppress(Unsatisfiable):  # nothing can be wrong where nothing is taken
            ask()
    assert answers.total() > 50, answers
    assert {200, 404} <= set(answers) if mode == GenerationMode.POSITIVE else answers[422] > answers[200], answers
