"""A model becomes the champion: its links and its row, where the power is cut in between, and where a link is wrong."""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine
from sqlmodel import Session

from daemon.champions import base_models, promotion
from daemon.dispatch.upkeep import Upkeep
from daemon.settings.model import Settings
from daemon.state.database import transaction
from daemon.state.events import Word
from daemon.state.tables import Event, Track
from daemon.state.troubles import Troubles
from pipeline.errors import DropforgeError
from tests.daemon.champions.conftest import Champions
from tests.model_folder import write_model
from tests.run_owner import candidate, judged


class PowerCut(BaseException):
    """The daemon is gone: nothing may catch this and tidy up."""


def test_a_changed_base_is_noted_and_leaves_the_champion(champions: Champions, tmp_path: Path) -> None:
    other = base_models.Base(tmp_path / "other", write_model(tmp_path / "other", b"other"))
    champions.find_base(other)
    with transaction(champions.engine) as session:
        row = session.get_one(Track, "default")
    assert (row.base_model_id, row.base_path) == (other.model_id, str(tmp_path / "other"))
    assert (champions.serving, champions.linked) == ((3, 3), (3, 2))
    assert champions.history[0].count("base_changed") == 1


def test_a_track_without_a_base_has_no_champion_and_the_error_says_what_to_do(champions: Champions) -> None:
    with (
        transaction(champions.engine) as session,
        pytest.raises(DropforgeError, match="track new has no champion") as missing,
    ):
        promotion.champion(session, "new")
    assert "base_model" in missing.value.hint


def test_links_to_merged_models_are_relative_so_that_the_state_folder_can_be_moved(champions: Champions) -> None:
    assert (champions.root / "tracks/default/champion").readlink() == Path("../../models") / champions.ids[3]


# --- crashes


@contextmanager
def crash_at(monkeypatch: pytest.MonkeyPatch, point: int) -> Iterator[list[str]]:
    """Cut the power at the `point`-th rename, link or commit, before it is done; yield what was reached."""
    reached: list[str] = []

    def reach(name: str) -> None:
        reached.append(name)
        if len(reached) == point:
            raise PowerCut

    def cut(name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object, **options: object) -> None:
            reach(name)
            real(*arguments, **options)

        return call

    @contextmanager
    def cut_transaction(engine: Engine) -> Iterator[Session]:
        with transaction(engine) as session:
            yield session
            reach("commit")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", cut("rename", os.rename))
        patch.setattr(os, "symlink", cut("symlink", os.symlink))
        patch.setattr(promotion, "transaction", cut_transaction)
        yield reached


#: Two links, each made aside and renamed, and the row.
POINTS = ("symlink", "rename", "symlink", "rename", "commit")


@pytest.mark.parametrize("point", range(1, len(POINTS) + 1))
def test_a_promotion_that_was_cut_anywhere_did_not_happen_and_is_done_by_the_next_try(
    champions: Champions, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    run, identity = candidate(champions.engine, champions.root, "four")
    champions.ids.append(identity)
    won = judged("promoted", candidate_model_id=identity, champion_generation=3)
    before = champions.history
    with crash_at(monkeypatch, point) as reached, pytest.raises(PowerCut):
        promotion.promote(champions.engine, champions.root, run, won, Word("", 10))
    assert tuple(reached) == POINTS[:point]
    assert champions.linked[0] == (3 if point < 3 else 4)
    promotion.mend_links(champions.engine, champions.root, "default")
    assert (champions.history, champions.serving, champions.linked) == (before, (3, 3), (3, 2))
    assert sorted(path.name for path in (champions.root / "tracks/default").iterdir()) == ["champion", "previous"]
    promotion.promote(champions.engine, champions.root, run, won, Word("", 40))
    assert (champions.serving, champions.linked) == ((4, 4), (4, 3))
    assert champions.history[0] == [*before[0], "promoted"]


def test_links_that_are_right_are_looked_at_while_another_process_writes(champions: Champions) -> None:
    path = champions.root / "dropforge.db"
    impatient = create_engine("sqlite://", creator=lambda: _at_once(path), execution_options={"path": path})
    with transaction(champions.engine) as session:
        session.add(Event(at=1, kind="meanwhile"))
        session.flush()
        promotion.mend_links(impatient, champions.root, "default")


def _at_once(path: Path) -> sqlite3.Connection:
    """Open the database for a writer that does not wait for its turn, and begin to write."""
    connection = sqlite3.connect(path, timeout=0, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    return connection


def test_a_track_whose_link_cannot_be_mended_is_named_and_the_others_are(champions: Champions, tmp_path: Path) -> None:
    troubles = Troubles()
    for name in ("bad", "good"):
        base_models.ensure_base(champions.engine, champions.root, name, base_models.Base(tmp_path / "base", "base"), 1)
        (champions.root / "tracks" / name / "champion").unlink()
    (champions.root / "tracks/bad/champion/kept").mkdir(parents=True)
    Upkeep(champions.engine, Settings(state=str(champions.root)), troubles).maintain(1)
    assert [whose for whose in troubles.words if whose.startswith("track ")] == ["track bad"]
    assert (champions.root / "tracks/good/champion").is_symlink()
