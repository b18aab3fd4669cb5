"""Going back to a former champion: what moves, what is refused, and what cannot come back by itself."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Engine

from daemon.champions import base_models, decisions, promotion
from daemon.state.database import create, open_engine, transaction
from daemon.state.events import Word
from daemon.state.tables import Promotion
from daemon.system.folders import WorkFolder
from pipeline.errors import DropforgeError
from pipeline.models.manifest import model_id
from tests.model_folder import write_model
from tests.run_owner import crown


class House(NamedTuple):
    """A state folder with a base model and three models that took its place, one after the other."""

    engine: Engine
    state: Path
    ids: list[str]

    def promote(self, name: str, generation: int) -> str:
        return crown(self.engine, WorkFolder(self.state), name, generation)

    def back(self, to: int | None = None, **how: Any) -> Promotion:
        return decisions.rollback(self.engine, WorkFolder(self.state), "default", Word("it swears", 50), to=to, **how)

    @property
    def serving(self) -> tuple[int, int]:
        """Which model serves, by its place in `ids`, and of which generation it is."""
        with transaction(self.engine) as session:
            model = promotion.champion(session, "default")
        return self.ids.index(model.model_id), model.generation

    def linked(self, name: str = "champion") -> str:
        return model_id((self.state / "tracks/default" / name).resolve())


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    state = tmp_path / "state"
    create(state / "dropforge.db")
    engine = open_engine(state / "dropforge.db")
    base = base_models.Base(tmp_path / "base", write_model(tmp_path / "base", b"base"))
    base_models.ensure_base(engine, WorkFolder(state), "default", base, 1)
    made = House(engine, state, [base.model_id])
    made.ids.extend([made.promote("one", 0), made.promote("two", 1), made.promote("three", 2)])
    yield made
    engine.dispose()


def test_a_model_that_takes_long_to_load_serves_from_when_it_was_loaded(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promotion, "monotonic", iter([5.0, 95.0]).__next__)
    assert house.back().created_at == 50 + 90_000


def test_a_second_rollback_does_not_guess_which_generation_is_meant(house: House) -> None:
    house.back()
    assert house.serving == (2, 4)
    assert (house.linked(), house.linked("previous")) == (house.ids[2], house.ids[3])
    with pytest.raises(DropforgeError, match="the model of generation 3 was rolled back from") as refused:
        house.back()
    assert "dropforge rollback --track default --to GENERATION" in refused.value.hint
    house.back(1)
    assert house.serving == (1, 5)
    shutil.rmtree(house.state / "models" / house.ids[2])
    with pytest.raises(DropforgeError, match="the model of generation 4 is not there any more"):
        house.back()


def test_a_model_that_was_promoted_twice_is_not_its_own_former_champion(house: House) -> None:
    house.promote("three", 3)
    house.back()
    assert house.serving == (2, 5)


def test_a_person_brings_a_blocked_model_back_and_lifts_the_block(house: House) -> None:
    house.back()
    house.back(3)
    assert house.serving == (3, 5)
    house.ids.append(house.promote("four", 5))
    house.promote("three", 6)
    assert house.serving == (3, 7)


def test_a_base_model_that_changed_is_refused(house: House, tmp_path: Path) -> None:
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(DropforgeError, match="holds another model"):
        house.back(0)


def test_a_base_model_that_moved_is_found_at_its_new_place(house: House, tmp_path: Path) -> None:
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    base_models.ensure_base(house.engine, WorkFolder(house.state), "default", base_models.Base(moved, house.ids[0]), 20)
    house.back(0)
    assert (house.state / "tracks/default/champion").readlink() == moved


@pytest.mark.parametrize(("to", "words"), [(9, "no champion of generation 9"), (3, "is the champion of track")])
def test_a_generation_that_is_no_former_champion_is_refused(house: House, to: int, words: str) -> None:
    with pytest.raises(DropforgeError, match=words) as refused:
        house.back(to)
    assert "dropforge history" in refused.value.hint


def test_a_model_that_is_collected_while_its_files_are_checked_is_refused(house: House) -> None:
    before = house.serving
    with pytest.raises(DropforgeError, match="is not there any more"):
        house.back(try_out=shutil.rmtree)
    assert house.serving == before
