"""A track whose base model and three models that won after it have served, one after the other."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlalchemy import Engine
from sqlmodel import col, select

from daemon.champions import base_models, promotion
from daemon.state.database import create, open_engine, transaction
from daemon.state.tables import Event, Promotion
from daemon.system.folders import WorkFolder
from pipeline.models.manifest import model_id
from tests.model_folder import write_model
from tests.run_owner import crown


class Champions(NamedTuple):
    """A state folder with champions; `ids` are their models, the base model first."""

    engine: Engine
    root: WorkFolder
    ids: list[str]

    def promote(self, name: str, over: int) -> str:
        return crown(self.engine, self.root, name, over)

    def find_base(self, base: base_models.Base) -> None:
        """Let the daemon find this base model."""
        base_models.ensure_base(self.engine, self.root, "default", base, 20)

    @property
    def serving(self) -> tuple[int, int]:
        """Which model serves, by its place in `ids`, and of which generation it is."""
        with transaction(self.engine) as session:
            model = promotion.champion(session, "default")
        return self.ids.index(model.model_id), model.generation

    @property
    def linked(self) -> tuple[int, int]:
        """Where the links of the champion and of the one before lead, by their places in `ids`."""
        folders = (self.root / "tracks/default" / name for name in ("champion", "previous"))
        champion, previous = (self.ids.index(model_id(folder.resolve())) for folder in folders)
        return champion, previous

    @property
    def history(self) -> tuple[list[str], list[tuple[str, int]]]:
        """The kinds of all events, and the model and generation of all champions."""
        with transaction(self.engine) as session:
            events = session.exec(select(Event.kind).order_by(col(Event.id))).all()
            rows = session.exec(select(Promotion).order_by(col(Promotion.generation))).all()
            return list(events), [(row.model_id, row.generation) for row in rows]


@pytest.fixture
def champions(tmp_path: Path) -> Iterator[Champions]:
    create(tmp_path / "state/dropforge.db")
    engine = open_engine(tmp_path / "state/dropforge.db")
    base = base_models.Base(tmp_path / "base", write_model(tmp_path / "base", b"base"))
    made = Champions(engine, WorkFolder(tmp_path / "state"), [base.model_id])
    made.find_base(base)
    made.ids.extend(made.promote(name, over) for over, name in enumerate(("one", "two", "three")))
    yield made
    engine.dispose()
