"""The page says of a deed what the terminal says of it."""

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from daemon.web.server import make_app

TOKEN = "t" * 43
Page = Callable[..., list[str]]


@pytest.fixture
def page(lived_in: Any) -> Page:
    """Do a thing as a program that has the page's token, and return its words."""
    headers = {"authorization": f"Bearer {TOKEN}"}
    client = TestClient(make_app(lived_in.settings, TOKEN), base_url="http://127.0.0.1:8765", headers=headers)

    def act(path: str, **body: Any) -> list[str]:
        return list(client.post(f"/api/v1/{path}", json=body).json()["words"])

    return act


def test_a_track_is_paused_and_resumed_in_the_same_words(page: Page, dropforge: Callable[..., Any]) -> None:
    paused, resumed = page("tracks/support/pause", reason="a fair"), page("tracks/support/resume")
    assert paused == dropforge("pause", "support", "--reason", "a fair").out.splitlines()
    assert resumed == dropforge("resume", "support").out.splitlines()


def test_the_page_names_the_champion_of_a_withdrawn_drop_and_the_run_of_one_that_is_back(page: Page) -> None:
    words = page("drops/2/withdraw", reason="wrong labels")
    assert any("generation 1, was trained on it; to let the latest one without withdrawn drops" in one for one in words)
    back = page("drops/2/restore", reason="they were right")
    assert back[0] == "drop 2 (first.jsonl) is accepted again: the next run of track default uses it"
    assert back[1].endswith(" is queued: it begins next"), "it is due"
