"""A file dropped on the page that the daemon itself serves, and a real run that goes on when the page is gone."""

import json
import os
import signal
import socket
from typing import Any

import pytest

from daemon.web.security import load_token
from tests.browser.served import Served
from tests.e2e.conftest import Workspace, workspace

__all__ = ["workspace"]
TRAINS = "Run 1 of track default trains"
_CURVE = "return document.querySelector('#running polyline.trained')?.getAttribute('points')"


@pytest.fixture
def page(workspace: Workspace, chromium: Any) -> Served:
    """Give the page of a workspace whose daemon serves it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = workspace.folder / "dropforge.toml"
    text = settings.read_text().replace("[intake]", f'[web]\nenabled = true\nlisten = "127.0.0.1:{port}"\n[intake]')
    settings.write_text(text.replace("epochs = 6.0", "epochs = 60.0"))
    made = Served(workspace.folder, chromium)
    made.port = port
    return made


def durable_line(row: dict[str, str]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def moves(page: Served) -> None:
    """Wait for another curve than the one that is drawn."""
    drawn = page.driver.execute_script(_CURVE)
    page.wait(lambda: page.driver.execute_script(_CURVE) not in {None, drawn})


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.timeout(600)
def test_a_run_goes_on_whatever_becomes_of_the_page(
    workspace: Workspace, page: Served, tiny: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("elsewhere") / "messages.jsonl"
    file.write_bytes(b"".join(durable_line(row) for row in tiny.rows(400, seed=1)))
    workspace.start()
    workspace.wait(lambda: _listens(page.port))
    page.token = load_token(workspace.state)
    page.enter()
    page.open("/inbox")
    page.drop(file)
    page.wait_for("is in the inbox", '[role="status"]')
    page.open("/")
    page.wait_for("messages.jsonl", "#drops")
    page.wait_for(TRAINS, "h1")
    page.wait(lambda: page.driver.execute_script(_CURVE))
    moves(page)
    (server,) = workspace.processes("daemon", "web", "--lifeline")
    os.kill(server, signal.SIGKILL)
    page.wait_for("no connection", "#health")
    page.wait(lambda: "no connection" not in page.text("#health"))
    moves(page)
    assert (workspace.state / "runs/1/attempts/train-1").is_dir()
    assert not (workspace.state / "runs/1/attempts/train-2").exists(), "the training noticed nothing"
    assert workspace.stop() == 0
    assert [run.state for run in workspace.runs()] == ["waiting"]
    page.wait_for("no connection", "#health")
    workspace.start()
    page.wait(lambda: "no connection" not in page.text("#health"))
    page.wait_for(TRAINS, "h1")
    moves(page)
    assert page.was_kept()
    run = workspace.runs()[0]
    assert (run.state, run.failures, run.deaths) == ("running", 0, 0)
    assert workspace.stop() == 0
    assert workspace.processes() == []
