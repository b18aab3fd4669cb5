"""What a person does on the page: the same that the commands do, with the reason and the person kept."""

import errno
import os
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
from starlette.testclient import TestClient

from daemon.state.events import Word
from daemon.views.overview import Overview


@pytest.fixture
def overview(lived_in: Any) -> Overview:
    return Overview.of(lived_in.settings)


def events(overview: Overview, kind: str) -> list[Any]:
    return [row.detail for row in overview.rows("SELECT detail FROM event WHERE kind = ? ORDER BY id", kind)]


def test_a_failed_run_is_retried(person: TestClient, overview: Overview) -> None:
    answer = person.post("/runs/2/retry", data={"since": ""})
    assert answer.status_code == 200
    assert "run 2 goes on where it stopped" in answer.text
    assert overview.run(2).state == "waiting"
    again = person.post("/runs/2/retry", data={"since": ""})
    assert again.status_code == 409
    assert "run 2 is waiting" in again.text


def test_a_run_goes_before_the_others(program: TestClient, lived_in: Any) -> None:
    program.post("/api/v1/runs/2/retry", json={})
    lived_in.take("fourth.jsonl", '{"instruction": "say e", "output": "e"}\n')
    answer = program.post("/api/v1/runs/4/move")
    assert answer.json() == {"words": ["the order is now: run 4, run 2"]}
    assert program.post("/api/v1/runs/1/move").status_code == 409


def test_a_track_is_paused_with_a_reason_and_goes_on(person: TestClient, overview: Overview) -> None:
    assert person.post("/tracks/default/pause", data={"reason": "   "}).status_code == 422
    assert overview.paused() == []
    assert person.post("/tracks/default/pause", data={"reason": "  disks are moved "}).status_code == 200
    (pause,) = overview.paused()
    assert pause.reason == "disks are moved"
    assert pause.by.endswith(", on the page")
    assert "disks are moved" in person.get("/").text
    assert person.post("/tracks/default/resume").status_code == 200
    assert overview.paused() == []
    assert person.post("/tracks/nowhere/pause", data={"reason": "x"}).status_code == 404


def test_a_drop_is_withdrawn_and_restored_with_a_reason(person: TestClient, overview: Overview) -> None:
    assert person.post("/drops/6/withdraw", data={"reason": ""}).status_code == 422
    answer = person.post("/drops/6/withdraw", data={"reason": "wrong file"})
    assert answer.status_code == 200
    assert "run 3 is cancelled with it" in answer.text
    assert [(drop.state, drop.reason) for drop in overview.drops() if drop.id == 6] == [("withdrawn", "wrong file")]
    assert person.post("/drops/6/restore", data={"reason": "it was right"}).status_code == 200
    assert events(overview, "drop_restored")[0]["reason"] == "it was right"


def test_a_held_out_file_that_waits_is_accepted(
    person: TestClient, lived_in: Any, overview: Overview, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.inbox.waiting_limit.WaitingLimit.why_it_waits", lambda *_: "it is a stranger's")
    lived_in.take("theirs.jsonl", '{"instruction": "q9", "output": "a"}\n', "heldout")
    (drop,) = overview.drops(state="proposed")
    assert f"/drops/{drop.id}" in person.get("/").text
    assert person.post(f"/drops/{drop.id}/accept").status_code == 200
    assert overview.drops(state="proposed") == []
    assert events(overview, "drop_accepted")[-1]["by"].endswith(", on the page")


def test_a_rollback_wants_its_reason_and_happens(
    person: TestClient, overview: Overview, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr("daemon.web.actions.require_answer", lambda folder: tried.append(folder.name))
    monkeypatch.setattr("daemon.champions.promotion.check_files", lambda *_: None)
    assert person.post("/tracks/default/rollback", data={"to": "0"}).status_code == 422
    champion = overview.champion("default")
    assert champion is not None
    assert champion.generation == 1
    answer = person.post("/tracks/default/rollback", data={"to": "", "reason": "it swears"})
    assert answer.status_code == 200, answer.text
    assert tried == ["base"]
    champion = overview.champion("default")
    assert champion is not None
    assert (champion.generation, champion.kind) == (2, "rollback")
    assert champion.reason == f"rolled back to generation 0 by {champion.approved_by}: it swears"
    assert "is blocked: no run promotes it again" in answer.text
    assert "it swears" in person.get("/tracks/default").text


def test_what_is_no_win_that_waits_is_promoted_by_force_alone(
    person: TestClient, program: TestClient, overview: Overview
) -> None:
    for reason in ("", "looked at it"):
        answer = person.post("/runs/2/promote", data={"reason": reason})
        assert answer.status_code == 409
        assert "run 2 failed" in answer.text
        assert program.post("/api/v1/runs/2/promote", json={"reason": reason}).status_code == 409
    assert person.post("/runs/2/promote", data={"force": "true"}).status_code == 422
    forced = person.post("/runs/2/promote", data={"force": "true", "reason": "I know better"})
    assert forced.status_code == 409
    assert "run 2 published no model" in forced.text
    champion = overview.champion("default")
    assert champion is not None
    assert champion.generation == 1


def test_what_needs_attention_is_dismissed(
    person: TestClient, program: TestClient, lived_in: Any, overview: Overview, dropforge: Callable[..., Any]
) -> None:
    (key,) = [one["key"] for one in dropforge("attention", "--json").json["attention"]]
    assert f'action="/attention/{key}/dismiss"' in person.get("/").text
    assert "Needs attention (1)" in person.get("/").text
    answer = person.post(f"/attention/{key}/dismiss")
    assert answer.status_code == 200
    assert "dismissed for a day: The daemon is not running" in answer.text
    assert "Nothing: no failed run" in person.get("/").text
    assert events(overview, "attention_dismissed")[0]["by"].endswith(", on the page")
    assert program.post(f"/api/v1/attention/{key}/dismiss").status_code == 404
    assert dropforge("attention").out == "KEY  WHAT\n"
    with lived_in.engine.begin() as base:
        base.exec_driver_sql("DELETE FROM event WHERE kind = 'attention_dismissed'")
    ended = dropforge("attention", "--dismiss", key, "--dismiss", "typo")
    assert (ended.code, ended.out) == (1, "dismissed for a day: The daemon is not running\n")


NUMBERS = ("99", "x", "0", str(1 << 70), "9" * 19, "9" * 30, "9" * 5000)


@pytest.mark.parametrize(
    "path",
    [*(f"/runs/{one}/cancel" for one in NUMBERS), "/drops/2/cancel", "/runs/2/explode", "/x/y/z"],
    ids=lambda path: path[:20],
)
def test_what_there_is_not_cannot_be_done(person: TestClient, path: str) -> None:
    answer = person.post(path)
    assert answer.status_code in {404, 409}
    assert answer.headers["content-type"].startswith("text/html")


def test_a_body_of_more_than_a_megabyte_is_not_read(program: TestClient, person: TestClient) -> None:
    large = b'{"reason": "%s"}' % (b"x" * 1_000_000)
    for content in (large, iter([large[:10], large[10:]])):
        answer = program.post("/api/v1/drops/6/withdraw", content=content)
        assert answer.status_code == 413
    assert person.post("/drops/6/withdraw", data={"reason": "x" * 1_000_000}).status_code == 413
    assert program.post("/api/v1/drops/6/withdraw", json={"reason": "x" * 2000}).status_code == 200


def test_a_number_beyond_the_databases_is_no_error_of_ours(program: TestClient, person: TestClient) -> None:
    assert program.post(f"/api/v1/runs/{1 << 70}/cancel").status_code == 422
    assert person.get(f"/runs/{1 << 70}").status_code == 422


def test_the_page_and_the_command_leave_the_same_event(
    program: TestClient, dropforge: Callable[..., Any], overview: Overview
) -> None:
    program.post("/api/v1/drops/5/withdraw", json={"reason": "why"})
    assert dropforge("drops", "withdraw", "6", "--reason", "why").code == 0
    by_page, by_command = events(overview, "drop_withdrawn")
    assert by_page == {**by_command, "by": f"{by_command['by']}, on the page"}


def test_what_the_machine_refuses_is_said(
    program: TestClient, person: TestClient, lived_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.state.database_file.BUSY_SECONDS", 0.01)
    with lived_in.engine.begin():  # holds the write lock
        answer = program.post("/api/v1/runs/3/cancel")
        assert answer.status_code == 503
        assert "cannot be used: database is locked" in answer.json()["error"]["message"]
    full = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    monkeypatch.setattr("daemon.queue.run_queue.cancel", full)
    answer = person.post("/runs/3/cancel")
    assert answer.status_code == 503
    assert "No space left on device" in answer.text


def test_a_win_that_waits_is_promoted(program: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def approve(_engine: Any, _root: Any, run: int, word: Word) -> Any:
        asked.append((run, word.reason, word.by))
        values = {"track": "default", "generation": 2, "overrode": None, "run_id": run, "model_id": "abc"}
        return type("Row", (), values)

    monkeypatch.setattr("daemon.champions.decisions.approve", approve)
    answer = program.post("/api/v1/runs/2/promote", json={"reason": "looked at it"})
    assert answer.json()["words"] == ["track default serves model abc of run 2, as generation 2"]
    assert asked[0][:2] == (2, "looked at it")
    assert asked[0][2].endswith(", on the page")
