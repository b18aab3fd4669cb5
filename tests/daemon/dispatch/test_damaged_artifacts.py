"""A published file, or one beside it, that is damaged: it is named where it is needed, and ends nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon.dispatch.stale_steps import invalidate
from daemon.state.database import transaction
from daemon.state.states import RunState
from daemon.state.tables import Drop
from daemon.system.folders import WorkFolder
from pipeline import durable
from tests import run_owner
from tests.daemon.champions.test_approval import MANUAL, House
from tests.run_owner import end_with_card

DAMAGED = (b"", b"[1]")


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_artifact_is_named_with_a_remedy(
    tmp_path: Path, dropforge: Callable[..., Any], damage: bytes
) -> None:
    house = House(tmp_path, MANUAL)
    runs = [house.run(), house.run("not_shown_better")]
    for step, words in (
        ("prepare", ("show", "2")),
        ("merge", ("promote", "2", "--force", "--reason", "mine")),
    ):
        path = house.root / f"runs/{runs[1]}/{step}.json"
        whole = path.read_bytes()
        path.write_bytes(damage)
        done = dropforge(*words)
        assert done.code == 1, words
        assert done.err.startswith(f"error: what step {step} of run 2 published is damaged: {path}\nhint: bring ")
        path.write_bytes(whole)


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_run_whose_artifact_is_damaged_fails_by_its_name_and_does_the_step_again(
    tmp_path: Path, damage: bytes
) -> None:
    house = House(tmp_path, "")
    run = house.at("train")
    (house.root / f"runs/{run}/prepare.json").write_bytes(damage)
    house.daemon.finish_runs(house.now, "promoted")
    row = house.row(run)
    assert row.state == RunState.FAILED
    assert row.error == f"what step prepare of run 1 published is damaged: {house.root}/runs/1/prepare.json"
    assert row.hint is not None
    assert row.hint.endswith("dropforge retry 1 --from prepare")
    invalidate(WorkFolder(house.root), run, "prepare")
    run_owner.retry(house.daemon.engine, run, house.now)
    house.daemon.finish_runs(house.now, "promoted")
    assert house.row(run).outcome == "promoted"


def test_a_run_of_a_drop_that_the_database_lacks_fails_and_the_next_one_ends(
    tmp_path: Path, dropforge: Callable[..., Any]
) -> None:
    house = House(tmp_path, "")
    run = house.at("evaluate")
    with transaction(house.daemon.engine) as session:
        session.delete(session.get_one(Drop, 1))
    house.daemon.finish_runs(house.now)
    assert house.row(run).state == RunState.FAILED, "it would be judged as if it was not trained on that drop"
    assert house.row(run).error == f"run {run} was made of drop 1, which the database lacks"
    shown = dropforge("show", run, "--json").json["run"]
    assert [(drop["id"], drop["name"]) for drop in shown["snapshot"]] == [(1, None)]
    assert dropforge("show", run).code == 0
    assert house.row(house.run()).outcome == "promoted"


def test_damaged_data_of_a_card_is_named(
    new_workspace: Callable[[], Any], made_reports: Any, dropforge: Callable[..., Any]
) -> None:
    made = new_workspace()
    run = end_with_card(made, made_reports, "guard_failed")
    card = made.settings.state_folder / f"runs/{run}/attempts/decide-1/report/report.json"
    for damage in DAMAGED:
        card.write_bytes(damage)
        done = dropforge("report", run, "--json")
        assert done.code == 1, damage
        assert f"error: the data of the report of run {run} is damaged or gone: {card}" in done.err
        assert done.json["error"]["code"] == 1


def test_hints_that_are_no_objects_are_none(lived_in: Any, dropforge: Callable[..., Any]) -> None:
    root = lived_in.settings.state_folder
    durable.write_hint(root / "watcher.json", [1])
    durable.write_hint(root / "runs/3/attempts/train-1/progress.json", {"step": 1})
    for words in (("status",), ("show", "3"), ("runs",)):
        assert dropforge(*words).err == "", words
