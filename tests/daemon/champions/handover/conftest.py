"""A workspace with a champion that a run made."""

from pathlib import Path

import pytest

from tests.chaos.house import Daemon
from tests.daemon.champions.test_approval import House


@pytest.fixture
def promoted(tmp_path: Path) -> Daemon:
    """The daemon of a workspace in `tmp_path` whose first run was promoted."""
    house = House(tmp_path, "")
    house.run()
    return house.daemon
