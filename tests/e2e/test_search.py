"""A search through the real daemon: several trainings, of which the dev rows send one to the gate."""

import json
from typing import Any

import pytest

from pipeline.search_settings import settings_words
from tests.e2e.test_second_night import drop


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_search_that_is_killed_goes_on_and_sends_one_candidate_to_the_gate(workspace: Any, tiny: Any) -> None:
    toml = workspace.folder / "dropforge.toml"
    searched = '[train.search]\nwhen = "asked"\nspace = { rank = [2, 4, 8] }\n'
    toml.write_text(toml.read_text().replace("dev = 0\n", "dev = 0.15\n") + searched)
    workspace.start()
    drop(workspace.inbox, "first.jsonl", tiny.rows(400, seed=1))
    workspace.wait_for_runs("succeeded")
    assert workspace.published(1, "train")["candidates"] == []

    assert "rank: 2, 4" in workspace.cli("search")
    trials = workspace.state / "runs/2/checkpoints"
    workspace.wait(lambda: list(trials.glob("*1/ended.json")))
    workspace.kill()
    workspace.start()
    workspace.wait_for_runs("succeeded", "succeeded")
    adapter = workspace.published(2, "train")
    tried = adapter["candidates"]
    assert [one["settings"] for one in tried] == [{"rank": 2}, {"rank": 4}, {"rank": 8}]
    assert sum(one["chosen"] for one in tried) == 1
    (chosen,) = (one for one in tried if one["chosen"])
    config = json.loads((workspace.state / adapter["folder"] / "adapter_config.json").read_text())
    assert config["r"] == chosen["settings"]["rank"]
    verdict = workspace.published(2, "decide")
    assert verdict["uses"] == 1, "the search before it counts as one candidate"
    page = (workspace.state / verdict["report"] / "report.html").read_text()
    shown = workspace.cli("show", "2")
    for one in tried:
        words = settings_words(one["settings"])
        assert (words in page, words in shown) == (True, True)
    assert workspace.stop() == 0
    assert workspace.processes() == []
