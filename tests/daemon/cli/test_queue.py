"""`move`, `pause`, `resume`, and what `status` says of them."""

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from daemon.web.server import make_app
from tests.daemon.web.conftest import HERE, TOKEN

Command = Callable[..., Any]


@pytest.mark.usefixtures("busy")
def test_a_moved_run_is_first_in_status(dropforge: Command) -> None:
    assert [run["id"] for run in dropforge("status", "--json").json["runs"]] == [3, 4, 5]
    ended = dropforge("move", "5")
    assert (ended.code, ended.out) == (0, "the order is now: run 5, run 4\n")
    assert [run["id"] for run in dropforge("status", "--json").json["runs"]] == [3, 5, 4]
    assert dropforge("move", "3").code == 1, "it runs"


@pytest.mark.usefixtures("busy")
def test_status_says_that_a_track_is_paused_why_and_how_it_goes_on(dropforge: Command) -> None:
    words = "track support is paused by ada: the card is lent out; to resume: dropforge resume support"
    ended = dropforge("status")
    assert ended.out.count(words) == 2, "as a line, and at the run that waits"
    found = dropforge("status", "--json").json
    assert [(one["track"], one["by"], one["reason"]) for one in found["paused"]] == [
        ("support", "ada", "the card is lent out")
    ]
    assert found["runs"][-1]["paused"] == words


def test_a_track_is_paused_and_resumed_in_the_same_words_as_on_the_page(lived_in: Any, dropforge: Command) -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    client = TestClient(make_app(lived_in.settings, TOKEN), base_url=HERE, headers=headers)
    paused = client.post("/api/v1/tracks/default/pause", json={"reason": "a fair"}).json()["words"]
    resumed = client.post("/api/v1/tracks/default/resume", json={}).json()["words"]
    assert paused == ["track default is paused: no run of it begins; to resume: dropforge resume default"]
    assert dropforge("pause", "--reason", "a fair").out.splitlines() == paused
    assert dropforge("resume").out.splitlines() == resumed
    assert dropforge("status", "--json").json["paused"] == []
