"""The champion that a withdrawn drop is still in and the way back from it, and the drops whose rows are replaced."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import select
from starlette.testclient import TestClient

from daemon.state.database import transaction
from daemon.state.states import HookState, Purpose
from daemon.state.tables import Drop, Promotion, Run
from daemon.web.server import make_app
from pipeline import durable
from pipeline.artifacts import Replacement
from tests.daemon.champions.test_approval import House
from tests.daemon.conftest import LivedIn
from tests.made_artifacts import dataset_of


@pytest.fixture
def house(tmp_path: Path) -> House:
    """Give a house in which nobody is asked."""
    return House(tmp_path, "")


def test_the_way_back_that_is_named_is_not_to_an_unhealthy_model(house: House, dropforge: Callable[..., Any]) -> None:
    for _ in range(2):
        house.run()
    with transaction(house.daemon.engine) as session:
        row = session.exec(select(Promotion).where(Promotion.generation == 1)).one()
        row.health_state = HookState.FAILED
        session.add(row)
    assert "rollback --track default --to 0 " in dropforge("drops", "withdraw", "2", "--reason", "deletion").out


def test_where_every_former_champion_has_a_withdrawn_drop_none_is_named(
    house: House, dropforge: Callable[..., Any]
) -> None:
    for _ in range(2):
        house.run()
    house.withdraw(1)
    (house.folder / "base").rename(house.folder / "elsewhere")
    said = dropforge("drops", "withdraw", "2", "--reason", "deletion").out
    words = "every former one has withdrawn drops, lost its place by a rollback or is gone"
    assert f"generation 2, was trained on it; {words}: dropforge history --track default\n" in said
    assert "dropforge rollback" not in said


def test_replaced_rows_are_told_with_both_drops_by_the_last_run_that_is_no_trial(
    lived_in: LivedIn, dropforge: Callable[..., Any]
) -> None:
    found = [Replacement(old=old, new=new, rows=rows) for old, new, rows in [(2, 6, 40), (2, 5, 1), (5, 6, 3)]]
    folder = lived_in.settings.work_folder / "runs"
    for run, replacements in ((2, found[:1]), (3, found)):
        data = dataset_of(120, replacements=replacements)
        durable.write_json(folder / str(run) / "prepare.json", data.model_dump(mode="json"))
    lines = [" ".join(line.split()) for line in dropforge("drops").out.splitlines()]
    by_drop = {line.split()[0]: line for line in lines}
    assert by_drop["6"].endswith("third.jsonl: replaces 40 records of drop 2 and 3 records of drop 5")
    assert by_drop["5"].endswith("second.jsonl: 3 records replaced by drop 6; replaces 1 record of drop 2")
    assert by_drop["2"].endswith("first.jsonl: 40 records replaced by drop 6 and 1 record replaced by drop 5")
    page = TestClient(make_app(lived_in.settings, "t" * 43), base_url="http://127.0.0.1:8765")
    assert "40 records replaced by drop 6 and 1 record replaced by drop 5" in page.get("/drops/2").text
    assert "3 records replaced by drop 6; replaces 1 record of drop 2" in page.get("/drops").text
    with transaction(lived_in.engine) as session:
        last = session.get_one(Run, 3)
        last.purpose, last.about_drop = Purpose.TRIAL, 2
    assert dropforge("drops", "--json").json["drops"][-2]["replaced"] == "40 records replaced by drop 6"
    (folder / "2" / "prepare.json").write_text('{"replacements": 1}')
    assert dropforge("drops", "--json").json["drops"][-2]["replaced"] is None


def test_the_list_says_how_well_the_champions_answers_agree_with_a_drop(
    lived_in: LivedIn, dropforge: Callable[..., Any]
) -> None:
    preview = {"records": 100, "points": 6.0, "metric": "exact_match", "usual": 81.3}
    with transaction(lived_in.engine) as session:
        drop = session.get_one(Drop, 2)
        drop.preview, drop.first_run = preview, None
    lines = dropforge("drops").out.splitlines()
    words = (
        "agreement 6.0 points: the champion's answers to 100 new records (exact match); far below its 81.3 on "
        "held-out records: a new kind of task, or wrong answers"
    )
    assert [line.split()[0] for line in lines if line.endswith(words)] == ["2"]
    told = {drop["id"]: drop["preview"] for drop in json.loads(dropforge("drops", "--json").out)["drops"]}
    assert (told.pop(2), set(told.values())) == (preview, {None})
    with transaction(lived_in.engine) as session:
        session.get_one(Drop, 2).first_run = 3
    assert "agreement" not in dropforge("drops").out
