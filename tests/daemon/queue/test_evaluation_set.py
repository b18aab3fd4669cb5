"""A track that is judged on something else than before: who changed it, what, and what the champion scores on both."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon.queue import drops
from daemon.queue.evaluation_set import yardstick_before
from daemon.state.database import transaction
from daemon.state.events import Word
from daemon.system.programs import name_of, who
from daemon.views.overview import Overview
from pipeline import durable
from pipeline.contract import YardstickBefore
from tests.chaos.house import records
from tests.daemon.champions.test_approval import House

PINNED = '[gate]\non = "pinned"\n'
ME = name_of(os.getuid())


def put(house: House, name: str, mode: int = 0o644) -> None:
    """Drop a held-out file; one that others may write into waits for a person."""
    path = house.daemon.settings.inbox_folder / "heldout" / name
    path.write_bytes(records(name))
    path.chmod(mode)


def changes(house: House) -> list[str]:
    return [one.words for one in Overview(house.root).yardsticks("default")]


def score(house: House, run: int, candidate: float, champion: float) -> None:
    """Give a verdict that the script wrote its scores, and whose they are."""
    path = house.root / f"runs/{run}/decide.json"
    asked = durable.read_json(house.root / f"runs/{run}/evaluate.json")["champion"]["model_id"]
    scores = {"candidate_score": candidate, "champion_score": champion, "champion_model_id": asked}
    durable.write_json(path, {**durable.read_json(path), **scores})


def before(house: House, run: int, champion: str) -> YardstickBefore | None:
    with transaction(house.daemon.engine) as session:
        return yardstick_before(session, house.root, house.row(run), champion)


def test_a_track_that_is_judged_on_the_same_files_or_the_drops_own_shares_says_nothing(tmp_path: Path) -> None:
    house = House(tmp_path, "")
    house.run("not_shown_better")
    put(house, "proposed.jsonl")
    house.run("not_shown_better")
    house.restart(PINNED)
    put(house, "exam.jsonl")
    house.run("not_shown_better")
    assert len(changes(house)) == 1, "to pinned files"
    house.run("not_shown_better")
    house.run("worse")
    assert len(changes(house)) == 1


def test_a_changed_set_is_told_once_with_who_what_and_the_champions_scores(
    tmp_path: Path, dropforge: Callable[..., Any]
) -> None:
    house = House(tmp_path, PINNED)
    put(house, "exam.jsonl")
    house.run("promoted")
    score(house, 1, 71.0, 40.0)
    put(house, "foreign.jsonl", 0o664)
    house.run("not_shown_better")
    assert changes(house) == [], "what waits for approval changes nothing"
    score(house, 2, 30.0, 70.5)
    assert "drops accept 3" in dropforge("status").out
    assert dropforge("drops", "accept", 3, "--reason", "I read it").out == (
        "drop 3 (foreign.jsonl) is accepted: from the next run on it judges the candidates of track default\n"
    )
    dropforge("drops", "withdraw", 1, "--reason", "wrong answers")
    house.run("not_shown_better")
    said = (
        "The evaluation set changed since run 2. "
        f"Added: drop 3 (foreign.jsonl, 1 row, dropped by {ME}, accepted by {who()}). "
        f"Taken out: drop 1 (exam.jsonl, 1 row, withdrawn by {who()}). Records: 120 before, 120 now. "
        "The champion scored 70.5 points on the old one and scores 50.0 on this one."
    )
    assert changes(house) == [said]
    assert house.events().count("yardstick_changed") == 1
    out = dropforge("history").out
    assert "track default, run 3, 20" in out
    assert said in out
    (one,) = dropforge("history", "--json").json["yardsticks"]
    assert (one["run"], one["words"]) == (3, said)
    assert said in dropforge("show", 3).out
    assert said not in dropforge("show", 2).out


def test_settings_that_judge_on_something_else_are_a_change(tmp_path: Path) -> None:
    house = House(tmp_path, PINNED)
    put(house, "exam.jsonl")
    house.run("not_shown_better")
    house.restart("")
    house.run("not_shown_better")
    house.restart(PINNED)
    house.run("not_shown_better")
    back, away = changes(house)
    drop = f"drop 1 (exam.jsonl, 1 row, dropped by {ME})"
    shares = 'the drops\' own shares (gate.on = "all")'
    assert away.startswith(f"The evaluation set changed since run 1. Added: {shares}. Taken out: {drop}. Records: ")
    assert back.startswith(f"The evaluation set changed since run 2. Added: {drop}. Taken out: {shares}. Records: ")


def test_the_champions_old_score_is_that_of_its_own_verdict_and_metric_or_none(tmp_path: Path) -> None:
    house = House(tmp_path, PINNED)
    put(house, "exam.jsonl")
    house.run("not_shown_better")
    score(house, 1, 71.0, 40.0)
    put(house, "more.jsonl")
    house.run("not_shown_better")
    verdict = durable.read_json(house.root / "runs/1/decide.json")

    def old(model: str) -> float | None:
        found = before(house, 2, model)
        assert found is not None
        return found.champion_score

    assert old(verdict["candidate_model_id"]) == 71.0
    assert old(verdict["champion_model_id"]) == 40.0
    assert old("another") is None
    durable.write_json(house.root / "runs/1/decide.json", {**verdict, "metric": "rougeL"})
    assert old(verdict["candidate_model_id"]) is None


@pytest.mark.parametrize("step", ["prepare", "decide"])
def test_a_verdict_that_cannot_be_read_hides_no_change(tmp_path: Path, step: str) -> None:
    house = House(tmp_path, PINNED)
    put(house, "exam.jsonl")
    house.run("not_shown_better")
    (house.root / f"runs/1/{step}.json").write_text("{")
    put(house, "more.jsonl")
    house.run("not_shown_better")
    drop = f"drop 3 (more.jsonl, 1 row, dropped by {ME})"
    (said,) = changes(house)
    assert said == (
        f"The evaluation set changed since run 1. Added: {drop}. Records: 120 now. "
        "The champion was not judged on the old one and scores 50.0 on this one."
    )


def test_a_restored_drop_names_who_restored_it(tmp_path: Path) -> None:
    house = House(tmp_path, PINNED)
    put(house, "exam.jsonl")
    put(house, "more.jsonl")
    house.run("not_shown_better")
    house.withdraw(2)
    house.run("not_shown_better")
    drops.restore(house.daemon.engine, 2, Word("it was right", house.now, "ada"), house.daemon.settings)
    house.run("not_shown_better")
    back, away = changes(house)
    assert f"Added: drop 2 (more.jsonl, 1 row, dropped by {ME}, restored by ada). Records" in back
    assert "Taken out: drop 2 (more.jsonl, 1 row)" in away, "nobody was noted"
