"""The pages, drawn from a state folder that has been lived in."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from daemon.web.app import make_app

TOKEN = "t" * 32


@pytest.fixture
def client(lived_in: Any) -> TestClient:
    return TestClient(make_app(lived_in.settings, TOKEN), base_url="http://127.0.0.1:8765")


@pytest.mark.parametrize(
    "path",
    [
        "/", "/runs", "/runs?track=default&state=failed", "/runs/1", "/runs/2", "/runs/3", "/drops", "/drops/1",
        "/tracks/support", "/drops/2", "/drops/4", "/tracks/default", "/compare", "/compare?runs=1,2", "/inbox",
        "/api/v1/runs", "/api/v1/runs/1", "/api/v1/drops", "/api/v1/openapi.json", "/static/style.css",
    ],
)  # fmt: skip
def test_a_page_is_drawn(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200, answer.text


def test_a_form_that_chooses_nothing_shows_all(client: TestClient) -> None:
    assert client.get("/runs?track=&state=").text == client.get("/runs").text
    assert client.get("/drops?track=&state=").text == client.get("/drops").text
    assert client.get("/runs?track=&state=failed").text != client.get("/runs").text
