import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlalchemy import Engine, create_engine
from sqlmodel import Session, select

from daemon.champions import base_models, promotion
from daemon.dispatch.upkeep import Upkeep
from daemon.queue import states
from daemon.settings.model import Settings
from daemon.state.database import create, open_engine, transaction
from daemon.state.events import Word
from daemon.state.states import RunState
from daemon.state.tables import Event, Promotion, Run, Track
from daemon.state.troubles import Troubles
from daemon.system.folders import WorkFolder
from pipeline.errors import DropforgeError
from tests.run_owner import judged


class PowerCut(BaseException):
    """The daemon is gone: nothing may catch this and tidy up."""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    create(folder / "state.db")
    return folder


@pytest.fixture
def engine(state: Path) -> Iterator[Engine]:
    engine = open_engine(state / "state.db")
    yield engine
    engine.dispose()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_model(tmp_path / "base")


@pytest.fixture
def track(engine: Engine, state: Path, base: Path) -> str:
    base_models.ensure_base(engine, WorkFolder(state), "default", base_models.Base(base, "base-id"), 1)
    return "default"


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "name").write_text(folder.name)
    return folder


class Win(NamedTuple):
    """A run whose model won, and what it was compared with."""

    run: int
    name: str
    over: int = 0
    reason: str = ""


def candidate(engine: Engine, state: Path, name: str, over: int = 0) -> Win:
    """Make a merged model and the run that made it."""
    make_model(state / "models" / name)
    with transaction(engine) as session:
        run = Run(track="default", state=RunState.RUNNING, token=name, trigger="drop", created_at=1, not_before=1)
        session.add(run)
        session.flush()
        return Win(run.id or 0, name, over)


def promote(engine: Engine, state: Path, win: Win, now: int) -> Promotion:
    verdict = judged("promoted", candidate_model_id=win.name, champion_generation=win.over)
    word = Word(win.reason, now)
    return promotion.promote(engine, WorkFolder(state), win.run, verdict, word)


def served(state: Path, link: str = "champion") -> str:
    """Return the name of the model that one gets by following a link."""
    return (state / "tracks/default" / link / "name").read_text()


def serving(engine: Engine) -> tuple[str, int]:
    with transaction(engine) as session:
        model = promotion.champion(session, "default")
    return model.model_id, model.generation


def promotions(engine: Engine) -> list[tuple[str, int]]:
    with transaction(engine) as session:
        rows = session.exec(select(Promotion)).all()
    return [(row.model_id, row.generation) for row in rows]


def events(engine: Engine) -> list[str]:
    with transaction(engine) as session:
        return [event.kind for event in session.exec(select(Event))]


# --- base models


def test_a_changed_base_is_noted_and_leaves_the_champion(
    engine: Engine, state: Path, tmp_path: Path, track: str
) -> None:
    promote(engine, state, candidate(engine, state, "m1"), 10)
    other = make_model(tmp_path / "other")
    base_models.ensure_base(engine, WorkFolder(state), track, base_models.Base(other, "other-id"), 20)
    with transaction(engine) as session:
        row = session.get_one(Track, track)
    assert (row.base_model_id, row.base_path) == ("other-id", str(other))
    assert serving(engine) == ("m1", 1)
    assert (served(state), served(state, "previous")) == ("m1", "base")
    assert events(engine).count("base_changed") == 1


def test_a_track_without_a_base_has_no_champion_and_the_error_says_what_to_do(engine: Engine) -> None:
    with transaction(engine) as session:
        states.ensure_track(session, "new", 1)
        with pytest.raises(DropforgeError, match="track new has no champion") as missing:
            promotion.champion(session, "new")
    assert "base_model" in missing.value.hint


# --- promotion


@pytest.mark.usefixtures("track")
def test_links_to_merged_models_are_relative_so_that_the_state_folder_can_be_moved(engine: Engine, state: Path) -> None:
    promote(engine, state, candidate(engine, state, "m1"), 10)
    assert (state / "tracks/default/champion").readlink() == Path("../../models/m1")
    assert served(state.rename(state.with_name("elsewhere"))) == "m1"


# --- crashes


@contextmanager
def crash_at(monkeypatch: pytest.MonkeyPatch, point: int) -> Iterator[list[str]]:
    """Cut the power at the `point`-th rename, link or commit, before it is done; yield what was reached."""
    reached: list[str] = []

    def cut(name: str) -> None:
        reached.append(name)
        if len(reached) == point:
            raise PowerCut

    real_rename, real_symlink = os.rename, os.symlink

    def rename(*arguments: object, **options: object) -> None:
        cut("rename")
        real_rename(*arguments, **options)  # type: ignore[arg-type]

    def symlink(*arguments: object, **options: object) -> None:
        cut("symlink")
        real_symlink(*arguments, **options)  # type: ignore[arg-type]

    @contextmanager
    def cut_transaction(engine: Engine) -> Iterator[Session]:
        with transaction(engine) as session:
            yield session
            cut("commit")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        patch.setattr(os, "symlink", symlink)
        for module in (promotion, base_models):
            patch.setattr(module, "transaction", cut_transaction)
        yield reached


#: Two links, each made aside and renamed, and the row.
POINTS = ("symlink", "rename", "symlink", "rename", "commit")


@pytest.mark.usefixtures("track")
@pytest.mark.parametrize("point", range(1, len(POINTS) + 1))
def test_a_promotion_that_was_cut_anywhere_did_not_happen_and_is_done_by_the_next_try(
    engine: Engine, state: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    promote(engine, state, candidate(engine, state, "m1"), 5)
    before = (events(engine), promotions(engine))
    better = candidate(engine, state, "m2", over=1)
    with crash_at(monkeypatch, point) as reached, pytest.raises(PowerCut):
        promote(engine, state, better, 10)
    assert tuple(reached) == POINTS[:point]
    assert served(state) == ("m1" if point < 3 else "m2")
    promotion.mend_links(engine, WorkFolder(state), "default")
    assert (events(engine), promotions(engine), serving(engine)) == (*before, ("m1", 1))
    assert (served(state), served(state, "previous")) == ("m1", "base")
    assert sorted(path.name for path in (state / "tracks/default").iterdir()) == ["champion", "previous"]
    promote(engine, state, better, 40)
    assert serving(engine) == ("m2", 2)
    assert (served(state), served(state, "previous")) == ("m2", "m1")
    assert events(engine).count("promoted") == 2


@pytest.mark.usefixtures("track")
def test_links_that_are_right_are_looked_at_while_another_process_writes(engine: Engine, state: Path) -> None:
    impatient = create_engine(
        "sqlite://", creator=lambda: _at_once(state), execution_options={"path": state / "state.db"}
    )
    with transaction(engine) as session:
        session.add(Event(at=1, kind="meanwhile"))
        session.flush()
        promotion.mend_links(impatient, WorkFolder(state), "default")


def _at_once(state: Path) -> sqlite3.Connection:
    """Open the database for a writer that does not wait for its turn, and begin to write."""
    connection = sqlite3.connect(state / "state.db", timeout=0, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    return connection


def test_a_track_whose_link_cannot_be_mended_is_named_and_the_others_are_mended(engine: Engine, state: Path) -> None:
    troubles = Troubles()
    settings = Settings(state=str(state))
    for name in ("bad", "good"):
        base_models.ensure_base(engine, WorkFolder(state), name, base_models.Base(state.parent / "base", "base"), 1)
        (state / "tracks" / name / "champion").unlink()
    (state / "tracks/bad/champion/kept").mkdir(parents=True)
    Upkeep(engine, settings, troubles).maintain(1)
    assert [whose for whose in troubles.words if whose.startswith("track ")] == ["track bad"]
    assert (state / "tracks/good/champion").is_symlink()
