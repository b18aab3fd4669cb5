"""A win that waits and what is against it: a blocked model, a verdict that cannot be read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon.queue.snapshots import waiting_drops
from daemon.state.database import transaction
from daemon.state.layout import FOLDERS
from pipeline import durable
from pipeline.contract import LOG_NAME
from tests.daemon.champions.test_approval import MANUAL, House

PINNED = '[gate]\non = "pinned"\n'


@pytest.fixture
def house(tmp_path: Path) -> House:
    """Give a house in which nobody is asked."""
    return House(tmp_path, PINNED)


def test_a_win_of_a_blocked_model_is_over_and_is_not_trained_again_every_night(
    house: House, dropforge: Callable[..., Any]
) -> None:
    first = house.run()
    house.back()
    run = house.at("decide")
    # The new drop repeats old rows: the same data makes the same model.
    identity = durable.read_json(house.root / f"runs/{first}/merge.json")["model_id"]
    (path,) = (house.root / f"runs/{run}/attempts").glob("decide-*/result.json")
    result = durable.read_json(path)
    result["artifact"]["candidate_model_id"] = identity
    durable.write_json(path, result)
    house.daemon.finish_runs(house.now)
    assert house.row(run).state == "succeeded"
    assert house.serves == (2, b"base weights")
    assert house.row(run).outcome == "awaiting_approval"
    with transaction(house.daemon.engine) as session:
        assert waiting_drops(session, "default") == 0
    said = dropforge("status").out
    assert "won, but its model is blocked: the track was rolled back to generation 0: it swears" in said
    assert "waits for approval" not in said


DAMAGED = (b"", b"\xff", b'{"candidate_model_id": []}')


@pytest.mark.parametrize("damage", DAMAGED)
def test_one_damaged_verdict_is_named_where_it_is_asked_for_and_ends_nothing_else(
    tmp_path: Path, dropforge: Callable[..., Any], damage: bytes
) -> None:
    house = House(tmp_path, MANUAL)
    run = house.run()
    log = next((house.root / f"runs/{run}/attempts").glob("train-*")) / LOG_NAME
    log.write_text("trained\n")
    path = house.root / f"runs/{run}/decide.json"
    path.write_bytes(damage)
    for words in (("status",), ("status", "--json"), ("runs",), ("champion",), ("history",), ("logs", str(run))):
        done = dropforge(*words)
        assert (done.code in {0, 69}, done.err) == (True, ""), words
    assert f"run {run} of track default: won" in dropforge("status").out
    for words in (("show", str(run)), ("promote", str(run)), ("report", str(run))):
        done = dropforge(*words)
        assert done.code == 1, words
        assert f"error: the verdict of run {run} is damaged: {path}\nhint: bring runs/{run}/decide.json" in done.err
    assert f"or: dropforge promote {run} --force --reason TEXT" in dropforge("promote", str(run)).err
    assert dropforge("drops", "withdraw", "1", "--reason", "deletion").err == ""
    assert house.force(run).generation == 1


# --- the folders that rights are tried in


def test_every_folder_that_is_made_in_the_state_folder_is_known(house: House, dropforge: Callable[..., Any]) -> None:
    house.run()
    assert dropforge("backup").code == 0
    made = {path.name for path in house.root.iterdir() if path.is_dir()}
    assert {"backups", "drops", "incoming", "models", "predictions", "runs", "spool", "tracks"} <= made <= {*FOLDERS}
