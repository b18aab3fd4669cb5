"""What the overview says of a state folder that the daemon's own functions have written."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from starlette.testclient import TestClient

from daemon.queue import order
from daemon.system.folders import StateFolder, WorkFolder
from daemon.views.overview import Overview
from daemon.web.server import make_app
from pipeline import durable
from pipeline.artifacts import Remark
from tests import run_owner
from tests.made_artifacts import dataset_of


@pytest.fixture
def overview(lived_in: Any) -> Overview:
    return Overview.of(lived_in.settings)


def test_a_database_without_tables_is_empty(tmp_path: Path) -> None:
    (tmp_path / "dropforge.db").touch()
    assert Overview(StateFolder(tmp_path), WorkFolder(tmp_path)).runs() == []


def test_what_the_last_run_left_out_is_told_until_the_next_one(lived_in: Any, dropforge: Callable[..., Any]) -> None:
    told = "13 held-out records or documents count as 9"
    for run, units in ((1, 99), (3, 13)):
        warnings = (Remark(code="groups", numbers={"units": units, "groups": 9}),)
        data = dataset_of(9, rows_over_window=600, warnings=warnings)
        durable.write_json(lived_in.settings.state_folder / f"runs/{run}/prepare.json", data.model_dump(mode="json"))
    page = TestClient(make_app(lived_in.settings, "t" * 43), base_url="http://127.0.0.1:8765")
    for said in (dropforge("status").out, dropforge("drops").out, page.get("/").text, page.get("/inbox").text):
        assert f"track default, run 3: {told}" in said
        assert "99 held-out" not in said
    assert "left out: 600 records longer than the window\n" in dropforge("show", "3").out
    assert "<p>Left out: 600 records longer than the window</p>" in page.get("/runs/3").text


def test_no_hook_is_pending_where_none_is_set(lived_in: Any, dropforge: Callable[..., Any]) -> None:
    for command in ("status", "history"):
        assert "hooks." not in dropforge(command).out, "the daemon has not noted yet that there are none"
    page = TestClient(make_app(lived_in.settings, "t" * 43), base_url="http://127.0.0.1:8765")
    assert "pending" not in page.get("/tracks/default").text
    path = lived_in.folder / "dropforge.toml"
    path.write_text(path.read_text().replace("[gate]", '[hooks]\nhealth = ["true"]\n[gate]'))
    said = dropforge("status").out
    assert "generation 1: hooks.health runs once the daemon does" in said
    assert "after_promotion" not in said


def test_claiming_and_intake_ask_nothing_that_takes_longer_with_every_run_or_drop(lived_in: Any) -> None:
    asked: list[tuple[str, Any]] = []
    event.listen(lived_in.engine, "before_cursor_execute", lambda *told: asked.append((told[2], told[3])))
    run_owner.claim(lived_in.engine, lived_in.tick(), run_owner.configure)
    order.next_due(lived_in.engine)
    lived_in.take("again.jsonl", '{"instruction": "say a", "output": "a"}\n')
    lived_in.take("bad.jsonl", "no record")
    plans: list[tuple[str, str]] = []
    with lived_in.engine.connect() as connection:
        for statement, values in [question for question in asked if question[0].startswith("SELECT")]:
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values).all()
            plans += [(statement, str(row[3])) for row in rows]
    newest = re.compile(r"ORDER BY (\"?\w+\"?\.)?id DESC\s+LIMIT")
    scans = [plan for plan in plans if re.match(r"SCAN (run|drop)\b(?!.*COVERING INDEX)", plan[1])]
    assert [plan for plan in scans if not newest.search(plan[0])] == []
    by_name = [line for statement, line in plans if "name_bytes = ?" in statement]
    assert by_name
    assert all("drop_names (track=? AND role=? AND name_bytes=?)" in line for line in by_name)


def test_only_a_run_that_has_ended_has_taken_its_time(overview: Overview) -> None:
    assert {run.id: run.seconds is None for run in overview.runs()} == {1: False, 2: False, 3: True}
    assert overview.run(3).seconds is None
    assert overview.run(1).seconds == next(run.seconds for run in overview.ended_runs(5) if run.id == 1)


def test_a_verdict_that_is_not_applied_yet_has_its_sentence(lived_in: Any, overview: Overview) -> None:
    runs = lived_in.settings.work_folder / "runs"
    (runs / "3/decide.json").write_bytes((runs / "1/decide.json").read_bytes())
    run = overview.run(3)
    assert (run.outcome, run.sentence, run.gain) == (None, overview.run(1).sentence, overview.run(1).gain)
