"""`/metrics` of the page: for whoever may read it, and for no page elsewhere."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from daemon.metrics.exposition import CONTENT_TYPE, metrics_text
from daemon.settings.web import WebSettings
from daemon.web.app import make_app

TOKEN = "t" * 43
HERE = "http://127.0.0.1:8765"


def scraper(lived_in: Any, **web: Any) -> TestClient:
    settings = lived_in.settings.model_copy(update={"web": WebSettings(**web)})
    return TestClient(make_app(settings, TOKEN), base_url=HERE)


def test_prometheus_reads_what_the_command_prints(lived_in: Any) -> None:
    answer = scraper(lived_in).get("/metrics")
    assert (answer.status_code, answer.headers["content-type"]) == (200, CONTENT_TYPE)
    names = [line.split()[2] for line in metrics_text(lived_in.settings).decode().splitlines() if "# TYPE" in line]
    assert [line.split()[2] for line in answer.text.splitlines() if "# TYPE" in line] == names
    assert "dropforge_up" in names


@pytest.mark.parametrize(("header", "status"), [({}, 403), ({"authorization": f"Bearer {TOKEN}"}, 200)])
def test_where_reading_takes_the_token_so_do_the_metrics(lived_in: Any, header: dict[str, str], status: int) -> None:
    client = scraper(lived_in, token="all")  # noqa: S106 - a choice
    assert client.get("/metrics", headers=header).status_code == status


def test_a_page_elsewhere_may_not_ask_for_them(lived_in: Any) -> None:
    client = scraper(lived_in)
    assert client.get("/metrics", headers={"origin": "https://evil.example"}).status_code == 421
    assert client.get("/metrics", headers={"host": "evil.example"}).status_code == 421
    assert client.post("/metrics").status_code in {403, 405}
