"""Events for an open page, from a real server: what changes is told, and to a reader who has gone nothing is owed."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from daemon.state.layout import DATABASE_NAME
from daemon.views.overview import Overview
from daemon.web import api
from daemon.web.api import changes
from pipeline import durable
from pipeline.contract import PROGRESS_NAME, Progress

Look = Iterator[list[Any]]


@pytest.fixture
def look(lived_in: Any) -> Look:
    return changes(Overview.of(lived_in.settings))


def told(look: Look) -> dict[str | None, Any]:
    return {one.event: one.data for one in next(look)}


def test_who_begins_is_told_all_and_then_only_what_is_new(look: Look, lived_in: Any) -> None:
    first = told(look)
    assert set(first) == {"changed", "progress"}
    assert first["progress"][0]["run"]["id"] == 3
    assert first["progress"][0]["run"]["progress"]["tokens_per_second"] == 250.0
    assert told(look) == {}
    lived_in.take("more.jsonl", '{"instruction": "say e", "output": "e"}\n')
    assert told(look)["changed"]["event"] > first["changed"]["event"]
    assert told(look) == {}
    folder = lived_in.settings.state_folder / "runs" / "3" / "attempts" / "train-1"
    durable.write_hint(folder / PROGRESS_NAME, Progress(step="train", done=13, total=30, loss=0.25).model_dump())
    news = told(look)
    assert set(news) == {"progress"}, "though the database is the same"
    assert news["progress"][0]["run"]["progress"]["done"] == 13
    with lived_in.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE run SET state = 'failed', token = NULL, ended_at = 1 WHERE id = 3")
    assert told(look)["progress"] == []


@pytest.mark.parametrize("good_looks", [0, 1])
def test_the_stream_ends_if_the_database_cannot_be_read(
    app: FastAPI, program: TestClient, lived_in: Any, monkeypatch: pytest.MonkeyPatch, good_looks: int
) -> None:
    path, looks = lived_in.settings.state_folder / DATABASE_NAME, count()

    def damage_before() -> bool:
        if next(looks) == good_looks:
            path.rename(path.with_name("whole"))
            path.write_bytes(b"no database" * 1000)
        return False

    monkeypatch.setattr(api, "_SECONDS", 0)
    app.state.site.is_ending = damage_before
    assert program.get("/api/v1/live").text.count("event: changed") == good_looks


def test_without_a_database_there_is_nothing_to_tell_yet(look: Look, lived_in: Any) -> None:
    lived_in.engine.dispose()
    for path in lived_in.settings.state_folder.glob("dropforge.db*"):
        path.unlink()
    assert told(look) == {}
