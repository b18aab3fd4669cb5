"""Nights through the real daemon that go on from the champion, and one that must not."""

import json
from typing import Any

import pytest

from pipeline.models.manifest import Lineage, read_lineage, trained_ids


def trained(workspace: Any, run: int) -> list[dict[str, Any]]:
    """Return the rows that a run was trained on."""
    folder = workspace.state / workspace.published(run, "prepare")["folder"]
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def ids(workspace: Any, run: int) -> set[str]:
    return {row["id"] for row in trained(workspace, run)}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_second_night_goes_on_from_the_champion_until_a_drop_of_its_is_withdrawn(workspace: Any, tiny: Any) -> None:
    toml = workspace.folder / "dropforge.toml"
    toml.write_text(toml.read_text().replace("[train]\n", '[train]\nstart = "champion"\nreplay = 0.25\n'))
    rows = tiny.rows(600, seed=1)
    workspace.start()
    workspace.drop("first.jsonl", rows[:400])
    workspace.wait_for_runs("succeeded")
    assert workspace.runs()[0].outcome == "promoted", workspace.runs()[0].verdict
    assert "training: from the base, on " in workspace.cli("show", "1")

    workspace.drop("second.jsonl", rows[400:])
    workspace.wait_for_runs("succeeded", "succeeded")
    data, adapter, model = (workspace.published(2, step) for step in ("prepare", "train", "merge"))
    old = ids(workspace, 1)
    new = ids(workspace, 2) - old
    assert (data["start"]["generation"], data["start"]["drops"], data["old_rows"]) == (1, [1], len(old))
    assert data["train_rows"] == len(new) + round(len(new) / 4) == len(ids(workspace, 2))
    assert adapter["start"] == data["start"]
    base = adapter["base_model_id"]
    assert (model["base_model_id"], workspace.published(1, "train")["base_model_id"]) == (base, base)
    assert workspace.runs()[1].snapshot == [1, 2], "every drop behind the model"
    replayed = f"{data['replayed_rows']} of {len(old)} old ones"
    said = f"from the champion of generation 1, on {len(new)} new records and {replayed}"
    assert f"training: {said}\n" in workspace.cli("show", "2")
    report = workspace.state / workspace.published(2, "decide")["report"] / "report.html"
    assert said in report.read_text()
    assert [name in report.read_text() for name in ("first.jsonl", "second.jsonl")] == [True, True]

    if workspace.runs()[1].outcome != "promoted":  # what it learned is not the question
        workspace.cli("promote", "2", "--force", "--reason", "a test")
    champion = (workspace.state / "tracks/default/champion").resolve()
    assert trained_ids(champion) == old | new
    assert read_lineage(champion) == Lineage(base, 2)
    assert f"trained on: first.jsonl, second.jsonl\ntraining: {said}\n" in workspace.cli("champion")

    workspace.cli("drops", "withdraw", "1", "--reason", "it was wrong")
    workspace.drop("third.jsonl", tiny.rows(300, seed=2))
    workspace.wait((workspace.state / "runs/3/prepare.json").exists)
    data = workspace.published(3, "prepare")
    gone = {"code": "drops_gone", "numbers": {"generation": 2, "drops": "1"}}
    assert (data["start"], data["from_base"]) == (None, gone)
    assert 1 not in {row["drop"] for row in trained(workspace, 3)}
    assert "training: from the base, on " in workspace.cli("show", "3")
    assert workspace.stop() == 0
    assert workspace.processes() == []
