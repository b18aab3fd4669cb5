"""The page of a workspace that has been lived in, asked without a socket: as a stranger, and as who has the token."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from daemon.web.security import cookie_name
from daemon.web.server import make_app
from tests.daemon.conftest import LivedIn

TOKEN = "t" * 43
HERE = "http://127.0.0.1:8765"


@pytest.fixture
def app(lived_in: Any) -> FastAPI:
    return make_app(lived_in.settings, TOKEN)


@pytest.fixture
def visitor(app: FastAPI) -> TestClient:
    """A browser without the token."""
    return TestClient(app, base_url=HERE, follow_redirects=False)


@pytest.fixture(scope="session")
def reader(lived_in_once: LivedIn) -> TestClient:
    """A browser without the token, for tests that change nothing."""
    return TestClient(make_app(lived_in_once.settings, TOKEN), base_url=HERE, follow_redirects=False)


@pytest.fixture(scope="session")
def owner(lived_in_once: LivedIn) -> TestClient:
    """A browser with the token, for tests that change nothing."""
    return TestClient(make_app(lived_in_once.settings, TOKEN), base_url=HERE, cookies={cookie_name(TOKEN): TOKEN})


@pytest.fixture
def person(app: FastAPI) -> TestClient:
    """A browser with the token, on our own page."""
    return TestClient(
        app, base_url=HERE, follow_redirects=False, cookies={cookie_name(TOKEN): TOKEN}, headers={"origin": HERE}
    )


@pytest.fixture
def program(app: FastAPI) -> TestClient:
    """A program with the token."""
    return TestClient(app, base_url=HERE, headers={"authorization": f"Bearer {TOKEN}"})


@pytest.fixture
def with_settings(lived_in: Any) -> Callable[..., TestClient]:
    """Make a browser without the token for a page with other settings."""

    def make(**web: Any) -> TestClient:
        settings = lived_in.settings
        changed = type(settings.web).model_validate(web)
        return TestClient(make_app(settings.model_copy(update={"web": changed}), TOKEN), base_url=HERE)

    return make
