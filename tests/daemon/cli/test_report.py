"""`report` and what `show` says of the evidence, on a state folder where runs have ended."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import Session
from starlette.testclient import TestClient

from daemon.state.states import OVERTAKEN
from daemon.state.tables import Run
from daemon.web.server import make_app
from pipeline import durable
from tests.run_owner import end_with_card

Command = Callable[..., Any]


@pytest.fixture
def workspace(new_workspace: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    return new_workspace()


def test_report_prints_the_page_or_the_data(workspace: Any, made_reports: Any, dropforge: Command) -> None:
    run = end_with_card(workspace, made_reports, "guard_failed")
    page = workspace.settings.state_folder / f"runs/{run}/attempts/decide-1/report/report.html"
    for arguments in (("report", run), ("report", run, "--path")):
        ended = dropforge(*arguments)
        assert (ended.code, ended.out) == (0, f"{page}\n"), "no display, no browser"
    found = dropforge("report", run, "--json").json["report"]
    assert found == durable.read_json(page.with_name("report.json"))
    assert found["verdict"]["outcome"] == "guard_failed"


def test_what_is_not_trained_has_no_training(workspace: Any, made_reports: Any, dropforge: Command) -> None:
    run = end_with_card(workspace, made_reports, "early")
    said = dropforge("show", run).out
    assert "Nothing was trained." in said
    assert "from the base" not in said
    page = workspace.settings.state_folder / f"runs/{run}/attempts/decide-1/report/report.html"
    assert "<dt>Training</dt><dd>none</dd>" in page.read_text(encoding="utf-8")
    assert "from the base, on " in dropforge("show", end_with_card(workspace, made_reports, "worse")).out


def test_records_and_groups_of_them_are_told_apart(workspace: Any, made_reports: Any) -> None:
    run = end_with_card(workspace, made_reports, "worse")
    path = workspace.settings.state_folder / f"runs/{run}/decide.json"
    client = TestClient(make_app(workspace.settings, "t" * 43), base_url="http://127.0.0.1:8765")
    verdict = durable.read_json(path)
    for groups, words in ((400, "<small>"), (100, "<small>in 100 groups: ")):
        durable.write_json(path, {**verdict, "groups": groups})
        tile = client.get(f"/runs/{run}").text.partition("<dt>Records</dt>")[2].partition("</div>")[0]
        assert f"<dd>400{words}{verdict['wins']} better, {verdict['losses']} worse" in tile


def test_a_backup_keeps_the_card_and_a_restore_brings_it_back(
    workspace: Any, made_reports: Any, dropforge: Command
) -> None:
    run = end_with_card(workspace, made_reports, "worse")
    page = workspace.settings.state_folder / f"runs/{run}/attempts/decide-1/report/report.html"
    whole = {path.name: path.read_bytes() for path in page.parent.iterdir()}
    assert set(whole) == {"report.html", "report.json"}
    backup = Path(dropforge("backup", "kept", "--json").json["backup"])
    kept = backup / page.relative_to(workspace.settings.state_folder)
    assert kept.read_bytes() == whole["report.html"]
    shutil.rmtree(page.parent)
    assert dropforge("report", run).code == 1
    page.parent.mkdir()
    page.write_text("torn")
    assert dropforge("restore", backup, "--json").json["missing"] == []
    assert {path.name: path.read_bytes() for path in page.parent.iterdir()} == whole
    assert dropforge("report", run, "--json").json["report"] == json.loads(whole["report.json"])


def test_report_opens_a_browser_where_there_is_a_display(
    workspace: Any, made_reports: Any, script: Command, tmp_path: Path
) -> None:
    run = end_with_card(workspace, made_reports, "promoted")
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/opened\n')
    browser.chmod(0o755)
    environment = {"BROWSER": f"{browser} %s", "DISPLAY": ":99"}
    out = script("report", str(run), folder=tmp_path, environment=environment).out
    assert (tmp_path / "opened").read_text() == f"{Path(out.removesuffix(chr(10))).as_uri()}\n"
    script("report", str(run), "--path", folder=tmp_path, environment=environment)
    assert len((tmp_path / "opened").read_text().splitlines()) == 1, "--path opens nothing"


def test_show_tells_the_core_of_the_evidence(workspace: Any, made_reports: Any, dropforge: Command) -> None:
    run = end_with_card(workspace, made_reports, "guard_failed")
    out = dropforge("show", run).out
    for words in (
        "\nwhy:\n  Both models answered the same 400 records; neither was trained on them. The new model scored 94.0",
        "\n  What it loses: suite builtin −27.6 points (the limit is 5.0 points).\nwhat to do next:\n  General ",
        "\n  No drop is suspended for this: all are trained on again, together with the next ones.\n",
        "guards: 1 of 8 failed\n",
        "drops that the champion knows: gain +6.0 points on 300 records, interval +0.4 to +11.5\n",
        "new drops: gain −4.5 points on 100 records, interval −15.2 to +6.3\n",
        f"report: {workspace.settings.state_folder}/runs/{run}/attempts/decide-1/report/report.html\n",
    ):
        assert words in out
    assert "token F1" not in out, "a guard that passed easily is not the core"
    (workspace.settings.state_folder / f"runs/{run}/attempts/decide-1/report/report.json").write_text('{"story": 1}')
    out = dropforge("show", run).out
    assert ("why:" in out, "guards: 1 of 8 failed\n" in out) == (False, True)


def test_show_says_nothing_of_what_to_do_about_a_win_that_came_too_late(
    workspace: Any, made_reports: Any, dropforge: Command
) -> None:
    run = end_with_card(workspace, made_reports, "promoted")
    assert "what to do next:\n  The new model serves by itself" in dropforge("show", run).out
    with Session(workspace.engine) as session, session.begin():
        session.get_one(Run, run).outcome = OVERTAKEN
    out = dropforge("show", run).out
    assert "\nwon, but another champion came first, with which it was not compared: " in out
    assert ("why:" in out, "what to do next" in out) == (True, False)
