from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from daemon.state.database import create, open_engine


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    create(tmp_path / "state.db")
    engine = open_engine(tmp_path / "state.db")
    yield engine
    engine.dispose()
