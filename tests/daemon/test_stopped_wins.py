"""A win that waits and what is against it: a withdrawn drop, a barred model, a verdict that cannot be read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog

from daemon.state_folder import FOLDERS
from pipeline.contract import LOG_NAME
from tests.daemon.test_approval import MANUAL, House


@pytest.fixture
def house(tmp_path: Path) -> House:
    """Give a house in which nobody is asked."""
    return House(tmp_path, "")


# --- what is said of it


def test_the_log_says_of_a_stopped_win_what_is_against_it(house: House) -> None:
    run = house.at("decide")
    house.withdraw(1)
    with structlog.testing.capture_logs() as logged:
        house.daemon.finish_runs(house.now, "promoted")
    (told,) = [one for one in logged if one["event"] == "run_finished"]
    assert told["outcome"] == "awaiting_approval"
    against = "it was trained on drop 1 (1.jsonl), withdrawn since: the customer asked for it"
    assert told["sentence"].startswith(f"won, but {against} (dropforge promote {run} --force --reason TEXT takes it")


def test_the_champion_that_is_named_was_trained_on_no_withdrawn_drop(
    house: House, dropforge: Callable[..., Any]
) -> None:
    for _ in range(2):
        house.run()
    house.withdraw(1)
    said = dropforge("drops", "withdraw", "2", "--reason", "deletion").out
    assert "generation 2, was trained on it; to let the latest one without withdrawn drops serve: " in said
    assert "dropforge rollback --track default --to 0 --reason TEXT" in said


def test_where_every_former_champion_has_a_withdrawn_drop_none_is_named(
    house: House, dropforge: Callable[..., Any]
) -> None:
    for _ in range(2):
        house.run()
    house.withdraw(1)
    (house.folder / "base").rename(house.folder / "elsewhere")
    said = dropforge("drops", "withdraw", "2", "--reason", "deletion").out
    assert "generation 2, was trained on it; no former one is without withdrawn drops" in said
    assert "rollback" not in said


def test_withdrawing_does_not_say_of_a_barred_win_that_it_waits(tmp_path: Path, dropforge: Callable[..., Any]) -> None:
    house = House(tmp_path, MANUAL)
    run = house.barred_win()
    said = dropforge("drops", "withdraw", str(run), "--reason", "deletion").out
    assert said == f"drop {run} ({run}.jsonl) is withdrawn: no later run of track default uses it\n"


DAMAGED = (b"{", b"[]", b"", b"\xff", b'{"outcome": "promoted"}', b'{"candidate_model_id": []}')


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
    assert f"run {run} of track default won, waits for approval" in dropforge("status").out
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
