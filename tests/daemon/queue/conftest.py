from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from daemon.state.database import migrate, open_engine


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    migrate(tmp_path / "state.db")
    engine = open_engine(tmp_path / "state.db")
    yield engine
    engine.dispose()
