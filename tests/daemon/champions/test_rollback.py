"""Going back to a former champion: what moves, what is refused, and what cannot come back by itself."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from daemon.champions import base_models, decisions, promotion
from daemon.state.events import Word
from daemon.state.tables import Promotion
from pipeline.errors import DropforgeError
from tests.daemon.champions.conftest import Champions


def back(champions: Champions, to: int | None = None, **how: Any) -> Promotion:
    return decisions.rollback(champions.engine, champions.root, "default", Word("it swears", 50), to=to, **how)


def test_a_model_that_takes_long_to_load_serves_from_when_it_was_loaded(
    champions: Champions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promotion, "monotonic", iter([5.0, 95.0]).__next__)
    assert back(champions).created_at == 50 + 90_000


def test_a_second_rollback_does_not_guess_which_generation_is_meant(champions: Champions) -> None:
    back(champions)
    assert champions.serving == (2, 4)
    assert champions.linked == (2, 3)
    with pytest.raises(DropforgeError, match="the model of generation 3 was rolled back from") as refused:
        back(champions)
    assert "dropforge rollback --track default --to GENERATION" in refused.value.hint
    back(champions, 1)
    assert champions.serving == (1, 5)
    shutil.rmtree(champions.root / "models" / champions.ids[2])
    with pytest.raises(DropforgeError, match="the model of generation 4 is not there any more"):
        back(champions)


def test_a_model_that_was_promoted_twice_is_not_its_own_former_champion(champions: Champions) -> None:
    champions.promote("three", 3)
    back(champions)
    assert champions.serving == (2, 5)


def test_a_person_brings_a_blocked_model_back_and_lifts_the_block(champions: Champions) -> None:
    back(champions)
    back(champions, 3)
    assert champions.serving == (3, 5)
    champions.ids.append(champions.promote("four", 5))
    champions.promote("three", 6)
    assert champions.serving == (3, 7)


def test_a_base_model_that_changed_is_refused(champions: Champions, tmp_path: Path) -> None:
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(DropforgeError, match="holds another model"):
        back(champions, 0)


def test_a_base_model_that_moved_is_found_at_its_new_place(champions: Champions, tmp_path: Path) -> None:
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    champions.find_base(base_models.Base(moved, champions.ids[0]))
    back(champions, 0)
    assert (champions.root / "tracks/default/champion").readlink() == moved


def test_a_model_that_is_collected_while_its_files_are_checked_is_refused(champions: Champions) -> None:
    before = champions.serving
    with pytest.raises(DropforgeError, match="is not there any more"):
        back(champions, try_out=shutil.rmtree)
    assert champions.serving == before
