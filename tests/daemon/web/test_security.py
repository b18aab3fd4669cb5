"""Who may read and who may change: foreign names, foreign pages, no token, GET."""

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from daemon.views.overview import Overview
from daemon.web import api, pages
from daemon.web.security import cookie_name, load_token
from pipeline.errors import DropforgeError
from tests.daemon.web.conftest import HERE, TOKEN

FORBIDDEN, MISDIRECTED, NOT_ALLOWED = 403, 421, 405
CANCEL = "/runs/3/cancel"
READERS = (("", pages.router), ("/api/v1", api.router))


def is_asked_to_stop(lived_in: Any) -> bool:
    return Overview.of(lived_in.settings).run(3).cancel_requested


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "[::1", "localhost.", "10.0.0.1:8765"]
)
def test_who_asks_by_another_name_is_refused(reader: TestClient, host: str) -> None:
    assert reader.get("/", headers={"host": host}).status_code == MISDIRECTED
    assert reader.get("/static/style.css", headers={"host": host}).status_code == MISDIRECTED


def test_the_names_of_this_machine_and_those_in_the_settings_are_ours(with_settings: Callable[..., TestClient]) -> None:
    client = with_settings(hosts=["box.example"])
    for host in ("127.0.0.1:8765", "localhost:9000", "[::1]:8765", "LOCALHOST"):
        assert client.get("/", headers={"host": host}).status_code == 200, host
    assert client.get("/", headers={"host": "box.example"}).status_code == 200
    assert client.get("/", headers={"host": "other.example"}).status_code == MISDIRECTED
    headers = {"host": "box.example", "origin": "https://box.example"}
    assert client.get("/", headers=headers).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:3000", "http://127.0.0.1", ""])
@pytest.mark.parametrize("path", ["/", "/api/v1/runs"])
def test_another_page_may_not_even_look(owner: TestClient, origin: str, path: str) -> None:
    assert owner.get(path, headers={"origin": origin}).status_code == MISDIRECTED


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:3000", None])
def test_another_page_and_one_that_says_no_origin_change_nothing_though_the_browser_sends_the_cookie(
    app: FastAPI, lived_in: Any, origin: str | None
) -> None:
    client = TestClient(app, base_url=HERE, cookies={cookie_name(TOKEN): TOKEN})
    answer = client.post(CANCEL, headers={} if origin is None else {"origin": origin})
    assert answer.status_code == (FORBIDDEN if origin is None else MISDIRECTED)
    assert not is_asked_to_stop(lived_in)


def _changing(app: FastAPI) -> list[str]:
    schema = app.openapi()["paths"]
    found = [path for path, methods in schema.items() if "post" in methods]
    routes = ["/runs/3/cancel", "/runs/2/retry", "/drops/2/withdraw", "/tracks/default/rollback", "/upload"]
    return [*(path.format(run_id=3, drop_id=2, name="default", key="failed-2") for path in found), *routes]


def test_get_changes_nothing(app: FastAPI, person: TestClient, lived_in: Any) -> None:
    before = _content(lived_in)
    read_too = "/api/v1/runs/3/review"
    paths = _changing(app)
    assert len(paths) >= 15
    for path in paths:
        for method in ("GET", "HEAD"):
            answer = person.request(method, path, params={"reason": "x"})
            assert path == read_too or answer.status_code in {404, NOT_ALLOWED}, (method, path)
    names = {"run_id": 1, "drop_id": 2, "name": "default"}
    found = [f"{prefix}{route.path}" for prefix, router in READERS for route in _routes(router)]
    assert len(found) >= 19
    found.remove("/api/v1/live")  # it has no end
    for path in found:
        person.get(path.format(**names), params={"first": 1, "second": 2, "runs": "1,2"})
    assert _content(lived_in) == before


def test_every_route_that_changes_asks_for_the_token(app: FastAPI, visitor: TestClient, lived_in: Any) -> None:
    nobody = {"origin": HERE}
    for headers in (nobody, {**nobody, "authorization": f"Bearer {TOKEN[:-1]}x"}):
        for path in _changing(app):
            for method in ("POST", "PUT", "DELETE"):
                answer = visitor.request(method, path, headers=headers, json={})
                assert answer.status_code == FORBIDDEN, (method, path)
    assert not is_asked_to_stop(lived_in)


def test_one_visit_turns_the_token_into_a_cookie_that_only_our_page_sends(visitor: TestClient) -> None:
    answer = visitor.get("/", params={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"{cookie_name(TOKEN)}={TOKEN};")
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert visitor.post(CANCEL, headers={"origin": HERE}).status_code == 200


@pytest.mark.parametrize("token", ["x", TOKEN + "x", "\u00e9", "\x00"])
def test_a_wrong_token_is_no_visit(reader: TestClient, token: str) -> None:
    answer = reader.get("/", params={"token": token})
    assert answer.status_code == FORBIDDEN
    assert "set-cookie" not in answer.headers
    elsewhere = reader.get("/", params={"token": TOKEN}, headers={"host": "evil.example"})
    assert elsewhere.status_code == MISDIRECTED
    assert "set-cookie" not in elsewhere.headers


@pytest.mark.parametrize("chosen", [{"listen": "0.0.0.0:8765", "token": "all"}, {"listen": "unix:/run/web.sock"}])
def test_where_reading_asks_for_the_token_too_nothing_is_shown_without(
    with_settings: Callable[..., TestClient], chosen: dict[str, str]
) -> None:
    client = with_settings(**chosen)
    for path in ("/", "/runs", "/api/v1/runs", "/api/v1/openapi.json", "/runs/1/report", "/api/v1/live", "/metrics"):
        assert client.get(path).status_code == FORBIDDEN, path
    assert client.get("/", params={"token": TOKEN}).status_code == 200
    assert client.get("/runs").status_code == 200
    if "token" not in chosen:
        assert with_settings(**chosen, token="changes").get("/runs").status_code == 200  # noqa: S106 - a choice


@pytest.mark.parametrize("path", ["/", "/runs/1", "/api/v1/runs", "/nowhere", "/runs/99"])
def test_no_answer_is_stored_framed_or_runs_what_is_not_ours(reader: TestClient, path: str) -> None:
    headers = reader.get(path).headers
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy


def test_the_token_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    token = load_token(tmp_path)
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(token) >= 40
    assert load_token(tmp_path) == token


def test_a_token_that_is_a_link_or_empty_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "web-token").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="web-token"):
        load_token(tmp_path)
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "web-token").unlink()
    for text in (b"", b"\xff" * 64):
        (tmp_path / "web-token").write_bytes(text)
        with pytest.raises(DropforgeError, match="there is no token in"):
            load_token(tmp_path)


def _routes(router: APIRouter) -> list[APIRoute]:
    return [route for route in router.routes if isinstance(route, APIRoute)]


def _content(lived_in: Any) -> dict[str, bytes]:
    """Return all that lies in state folder and inbox, but for what SQLite itself keeps beside its file."""
    folders = (lived_in.settings.state_folder, lived_in.settings.inbox_folder)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files if not path.name.endswith(("-wal", "-shm"))}
