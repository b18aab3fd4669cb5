"""The page of a blind review: one pair at a time, by a form, and nothing that tells whose answer is whose."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from daemon.views.overview import Overview
from tests.run_owner import end_with_card

MARKUP = "<script>alert(1)</script>\x1b[31m\u202e"


@pytest.fixture
def lived_in(new_workspace: Callable[[], Any], made_reports: Any) -> Any:
    """Return the workspace of the page: its run 1 won and waits for a review of two pairs."""

    def marked(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**line, "instruction": MARKUP, "champion": {**line["champion"], "text": "old"}} for line in lines]

    made = new_workspace()
    end_with_card(made, made_reports, "promoted", marked, review=2)
    return made


def test_each_pair_is_judged_by_a_form_and_the_result_comes_at_the_end(person: TestClient, lived_in: Any) -> None:
    assert 'href="/runs/1/review"' in person.get("/runs/1").text
    for place in (1, 2):
        page = person.get("/runs/1/review").text
        assert f"Pair {place} of 2" in page
        assert MARKUP not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[31m\\u202e" in page
        found = re.search('name="pair" value="([0-9a-f]+)"', page)
        assert found is not None
        assert person.post("/runs/1/review", data={"pair": found[1], "key": "7"}).status_code == 422
        for key in ("1", "u", "0") if place == 1 else ("0",):  # the second takes the first back
            answer = person.post("/runs/1/review", data={"pair": found[1], "key": key})
            assert (answer.status_code, answer.headers["location"]) == (303, "/runs/1/review")
    assert "neither in 2." in person.get("/runs/1/review").text
    assert "Judged blind" in person.get("/runs/1/report").text
    events = Overview.of(lived_in.settings).rows("SELECT detail FROM event WHERE kind = 'answer_chosen'")
    assert all(one.detail["by"].endswith(", on the page") for one in events)
    assert events[0].detail["pair"] != events[-1].detail["pair"]


def test_who_may_only_look_judges_nothing(visitor: TestClient) -> None:
    page = visitor.get("/runs/1/review").text
    assert "Answer 1" in page
    assert '<form method="post"' not in page
    assert visitor.post("/runs/1/review", data={"pair": "x", "key": "1"}).status_code in {401, 403}


def test_the_api_gives_the_pairs_and_takes_a_choice(program: TestClient) -> None:
    found = program.get("/api/v1/runs/1/review").json()
    assert [sorted(pair) for pair in found["left"]] == [
        ["earlier", "first", "id", "input", "instruction", "second"]
    ] * 2
    answer = program.post("/api/v1/runs/1/review", json={"pair": found["left"][0]["id"], "key": "1"})
    assert answer.json() == {"words": ["1 of 2 pairs are judged"]}
    refused = program.post("/api/v1/runs/1/review", json={"pair": "none", "key": "1"})
    assert refused.status_code == 409
    assert program.get("/api/v1/runs/9/review").status_code == 404
