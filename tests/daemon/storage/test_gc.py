"""Collections on real databases and folders: what goes, what never goes, and a collection that is killed anywhere."""

import itertools
import json
import os
import random
import shutil
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlmodel import col, select

from daemon.champions import base_models, promotion
from daemon.dispatch.dispatcher import Dispatcher
from daemon.dispatch.spool import LocalExecutor
from daemon.settings.model import GcSettings, Settings
from daemon.state.database import create, open_engine, transaction
from daemon.state.events import Word
from daemon.state.states import AttemptState, RunState, SuspectEnd
from daemon.state.tables import Attempt, Drop, Run, Suspect
from daemon.storage import gc
from daemon.system.folders import WorkFolder
from daemon.system.processes import lock_holder
from pipeline import durable
from pipeline.errors import DropforgeError
from tests import run_owner
from tests.chaos.faults import Death
from tests.run_owner import judged, spool_of

NOW = 1_950_000_000_000  # far enough that every file of a test is older than a day
DAY = 86_400_000
WHOLE = os.environ.get("DROPFORGE_CHAOS") == "whole"
ENDED = (RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED, RunState.CRASHED)
OPEN = (RunState.QUEUED, RunState.RUNNING, RunState.WAITING)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def template(folder: Path) -> Path:
    """Return a database without rows, made once a folder: making it takes longer than a test's own work."""
    path = folder / "template.db"
    if not path.exists():
        create(path)
    return path


class History:
    """A state folder that is written row by row and file by file."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.root = folder / "state"
        self.base = folder / "base"
        write(self.base / "model.safetensors", "base")
        self.settings = Settings(state=str(self.root), base_model=str(self.base), gc=GcSettings(**limits))
        self.engine = open_engine(self.root / "dropforge.db")
        if self.root.exists():  # a copy
            return
        empty = template(folder.parent)
        self.root.mkdir()
        shutil.copy(empty, self.root / "dropforge.db")
        base = base_models.Base(self.base, "base")
        base_models.ensure_base(self.engine, WorkFolder(self.root), "default", base, NOW - 100 * DAY)

    def run(
        self,
        state: str = "succeeded",
        *,
        days: float = 1,
        model: str | None = "",
        outcome: str = "worse",
        attempts: tuple[str, ...] = ("published",),
    ) -> int:
        """Add a run that ended `days` ago with its files; `model` is its name ("" gives it one of its own)."""
        over = state in ENDED
        with transaction(self.engine) as session:
            drop = session.get_one(Drop, run_owner.add_drop(session))
            if state == RunState.QUEUED and session.exec(select(Run).where(Run.state == "queued")).first():
                state = RunState.WAITING
            row = Run(
                track="default",
                state=state,
                trigger="drop",
                created_at=NOW - 90 * DAY,
                not_before=0,
                token="t" if state == RunState.RUNNING else None,
                ended_at=NOW - round(days * DAY) if over else None,
                outcome=outcome if state == RunState.SUCCEEDED else None,
            )
            session.add(row)
            session.flush()
            row.snapshot = None if state == RunState.QUEUED else [drop.id or 0]
            number = row.id or 0
            name = f"{number:04d}" if model == "" else model
            for count, attempt in enumerate(attempts, 1):
                if state != RunState.QUEUED:
                    facts: dict[str, Any] = {"number": count, "fence": f"{number}-{count}", "state": attempt}
                    session.add(Attempt(run_id=number, step="train", started_at=0, ended_at=1, **facts))
        write(self.root / "drops" / f"{drop.sha256}.jsonl", "{}\n")
        if state == RunState.QUEUED:
            return number
        folder = self.root / "runs" / str(number)
        write(folder / "checkpoints" / "step-1-1" / "weights", "c" * 50)
        write(folder / "attempts/prepare-1/train.jsonl", "d" * 20)
        write(folder / "attempts/prepare-1/log.txt", "hello")
        write(folder / "prepare.json", json.dumps({"folder": f"runs/{number}/attempts/prepare-1"}))
        for count, attempt in enumerate(attempts, 1):
            place = f"runs/{number}/attempts/train-{count}"
            write(self.root / place / "adapter/adapter_model.safetensors", "a" * 30)
            write(self.root / place / "log.txt", "hello")
            if attempt == AttemptState.PUBLISHED:
                write(folder / "train.json", json.dumps({"folder": f"{place}/adapter"}))
        if name is not None and "published" in attempts:
            write(self.root / "models" / name / "model.safetensors", "m" * 100)
            write(folder / "merge.json", json.dumps({"model_id": name, "folder": f"models/{name}"}))
            write(self.root / "predictions" / f"key-{name}" / f"{number}.jsonl", "p" * 40)
            write(folder / "evaluate.json", json.dumps({"prediction_keys": {name: f"key-{name}"}}))
            write(folder / "attempts/evaluate-1/report/records.jsonl", "r" * 10)
        return number

    def promote(self, run: int) -> str:
        """Make a run's model the champion."""
        name = durable.read_object(self.root / "runs" / str(run) / "merge.json")["model_id"]
        with transaction(self.engine) as session:
            over = promotion.champion(session, "default").generation
        won = judged("promoted", candidate_model_id=name, champion_generation=over)
        return promotion.promote(self.engine, WorkFolder(self.root), run, won, Word("", NOW)).model_path

    def point(self, name: str, target: Path) -> None:
        link = self.root / "tracks/default" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(target, link.parent))

    def copy(self, folder: Path) -> "History":
        """The same history in another place."""
        shutil.copytree(self.root, folder / "state", symlinks=True)
        made = History(folder)
        made.settings = self.settings.model_copy(update={"state": str(made.root)})
        return made

    def collect(self, *, dry_run: bool = False, now: int = NOW) -> gc.Collected:
        return gc.collect(self.engine, self.settings, now, dry_run=dry_run)

    def files(self) -> set[str]:
        """Every file and folder of the state folder, but for the database."""
        paths = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*"))
        return {path for path in paths if not path.startswith(("dropforge.db", "gc.lock"))}

    def there(self, *paths: str) -> list[bool]:
        return [(self.root / path).exists() for path in paths]


@pytest.fixture
def history(tmp_path: Path) -> Callable[..., History]:
    return lambda **limits: History(tmp_path, **limits)


# --- what goes


def test_the_newest_losers_are_kept_and_the_others_leave_their_story_only(history: Callable[..., History]) -> None:
    made = history(keep_models=1)
    old, new = made.run(days=3), made.run(days=2)
    found = made.collect()
    assert made.there(f"models/{old:04d}", f"models/{new:04d}") == [False, True]
    assert made.there(f"runs/{new}/attempts/train-1/adapter", f"runs/{new}/checkpoints") == [True, False]
    folder = made.root / f"runs/{old}"
    story = ("prepare-1/log.txt", "train-1/log.txt", "evaluate-1/report/records.jsonl")
    notes = ("evaluate.json", "merge.removed.json", "prepare.removed.json", "train.removed.json")
    left = [path for path in folder.rglob("*") if path.is_file() or not any(path.iterdir())]
    expected = {*(f"attempts/{name}" for name in story), *notes}
    assert {path.relative_to(folder).as_posix() for path in left} == expected
    assert found.bytes == 100 + 30 + 20 + 50 + 50
    assert {item.why for item in found.items if item.path.startswith(f"models/{old:04d}")} == {
        f"run {old}: worse, beyond gc.keep_models = 1"
    }


def test_a_failed_run_loses_its_files_by_the_same_limits_and_can_be_retried_from_its_first_step(
    history: Callable[..., History],
) -> None:
    made = history(keep_models=1)
    old, new = made.run("failed", days=3, attempts=("failed",)), made.run("failed", days=2, attempts=("failed",))
    made.collect()
    assert made.there(f"runs/{old}/checkpoints", f"runs/{old}/attempts/train-1/adapter") == [False, False]
    assert made.there(f"runs/{old}/prepare.json", f"runs/{old}/attempts/train-1/log.txt") == [False, True]
    assert made.there(f"runs/{new}/checkpoints", f"runs/{new}/prepare.json") == [True, True]
    run_owner.retry(made.engine, old, NOW)
    with transaction(made.engine) as session:
        (used,) = session.exec(select(Drop).where(col(Drop.id).in_(session.get_one(Run, old).snapshot or ()))).all()
    assert made.there(f"drops/{used.sha256}.jsonl") == [True]


def test_a_cancelled_run_that_lost_its_model_evaluates_again_when_it_is_retried(
    history: Callable[..., History],
) -> None:
    made = history(keep_models=1)
    old, ended = made.run("cancelled", days=3), made.run(days=3)
    made.run("cancelled", days=2), made.run(days=2)
    made.collect()
    assert made.there(f"runs/{old}/merge.json", f"runs/{old}/evaluate.json") == [False, False]
    assert made.there(f"runs/{ended}/merge.json", f"runs/{ended}/evaluate.json") == [False, True]


def test_what_the_database_does_not_know_goes_when_it_is_older_than_a_day(history: Callable[..., History]) -> None:
    made = history()
    stale = ["models/unknown", "runs/77"]
    for path in stale:
        write(made.root / path / "file", "x")
    assert made.collect(now=round(1000 * (made.root / "models").stat().st_mtime) + DAY - 60_000).items == ()
    assert {item.path for item in made.collect().items} == set(stale)
    assert made.there(*stale) == [False] * len(stale)


def test_what_a_run_that_cannot_be_read_may_need_is_kept_and_the_rest_collected(
    history: Callable[..., History],
) -> None:
    made = history(keep_models=0)
    loser, other = made.run(days=30), made.run("waiting")
    folder = made.root / f"runs/{other}"
    folder.rename(made.root / "aside")
    # What the kernel says to root, too, and not only to another user.
    folder.touch()
    later = round(1000 * folder.stat().st_mtime) + 2 * DAY
    with pytest.raises(DropforgeError, match=f"files of run {other} cannot be read"):
        made.collect(now=later)
    assert made.there(f"models/{loser:04d}", f"models/{other:04d}", f"runs/{other}") == [False, True, True]


def test_the_oldest_predictions_go_and_never_those_of_a_champion_or_an_open_run(
    history: Callable[..., History], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "PREDICTIONS_BYTES", 130)
    made = history(keep_models=9)
    made.promote(made.run(model="champion"))
    made.run("running", model="open")
    for name in ("old", "new"):
        made.run(model=name)
    paths = [f"predictions/key-{name}" for name in ("champion", "open", "old", "new")]
    for age, path in enumerate(paths, 1):
        os.utime(made.root / path / f"{age}.jsonl", (age, age))
    made.collect()
    assert made.there(*paths) == [True, True, False, True]


# --- what never goes


@pytest.mark.parametrize(
    "change",
    [
        # A base that moved while it is the champion has its new place in the track's row alone.
        pytest.param("UPDATE track SET champion_path = 'models/it'", id="champion"),
        pytest.param("UPDATE track SET base_path = 'models/it'", id="base"),
        pytest.param("UPDATE promotion SET run_id = NULL, model_path = 'models/it' WHERE generation = 1", id="former"),
        pytest.param("UPDATE promotion SET previous_path = 'models/it' WHERE generation = 3", id="previous"),
        # A promotion before its commit, and an older database that was put back, until a daemon starts on it.
        pytest.param("", id="link"),
        pytest.param("settings", id="base of a track"),
    ],
)
def test_whatever_names_a_champion_keeps_it_by_itself(history: Callable[..., History], change: str) -> None:
    made = history(keep_models=0, keep_champions=1)
    for _ in range(3):
        made.promote(made.run())
    write(made.root / "models/it/model.safetensors", "it")
    assert "models/it" in {item.path for item in made.collect(dry_run=True).items}, "nothing else names it"
    if change == "settings":
        tracks_of = {"more": {"base_model": str(made.root / "models/it")}}
        made.settings = made.settings.model_copy(update={"tracks": tracks_of})
    elif change:
        with transaction(made.engine) as session:
            session.connection().exec_driver_sql(change)
    else:
        made.point("champion", made.root / "models/it")
    made.collect()
    assert made.there("models/it") == [True]


def test_a_model_that_a_merge_of_an_open_run_is_about_to_publish_is_kept(history: Callable[..., History]) -> None:
    made = history(keep_models=0)
    made.run(model="same")
    open_run = made.run("running", model=None)
    write(made.root / f"runs/{open_run}/attempts/merge-1/result.json", json.dumps({"artifact": {"model_id": "same"}}))
    made.collect()
    assert made.there("models/same") == [True]


def test_a_former_champion_that_an_open_run_goes_on_from_is_kept(history: Callable[..., History]) -> None:
    made = history(keep_models=0, keep_champions=1)
    start, other = (made.promote(made.run(days=60 - age)) for age in range(2))
    open_run = made.run("waiting", model=None)
    told = {"champion": {"model_id": "start", "path": start, "generation": 1}}
    write(made.root / f"runs/{open_run}/attempts/prepare-1/spec.json", json.dumps(told))
    for age in range(3):
        made.promote(made.run(days=40 - age))
    made.collect()
    assert made.there(start, other) == [True, False]
    with transaction(made.engine) as session:
        row = session.get_one(Run, open_run)
        row.state, row.ended_at = RunState.CANCELLED, NOW - 40 * DAY
        session.add(row)
    made.collect()
    assert made.there(start) == [False]


def test_the_model_of_a_trial_is_kept_until_its_drop_is_on_trial_no_more(history: Callable[..., History]) -> None:
    made = history(keep_models=0)
    blamed, trial = made.run(days=3), made.run(days=2, outcome="guard_failed")
    with transaction(made.engine) as session:
        session.add(Suspect(track="default", drop_id=1, blamed_run=blamed, trial_run=trial))
    made.collect()
    assert made.there(f"models/{blamed:04d}", f"models/{trial:04d}") == [False, True]
    with transaction(made.engine) as session:
        session.exec(select(Suspect)).one().ended = SuspectEnd.CLEARED
    made.collect()
    assert made.there(f"models/{trial:04d}") == [False]


# --- how it goes


def test_no_row_can_change_and_nothing_be_published_while_files_are_moved(
    history: Callable[..., History], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = history(keep_models=0)
    made.run()
    seen: list[str] = []
    real = gc._throw_away

    def probe(*arguments: Any) -> None:
        other = sqlite3.connect(made.root / "dropforge.db", timeout=0, isolation_level=None)
        with closing(other), pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        assert lock_holder(made.root / "gc.lock") is not None
        seen.append("locked")
        real(*arguments)

    monkeypatch.setattr(gc, "_throw_away", probe)
    made.collect()
    assert seen
    assert lock_holder(made.root / "gc.lock") is None


def test_others_write_while_a_collection_searches_and_what_came_into_use_is_kept(
    history: Callable[..., History], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = history(keep_models=0, keep_champions=1)
    loser, approved, retried = made.run(), made.run(), made.run("failed", attempts=("failed",))
    real = gc.find_garbage

    def find(*arguments: Any) -> Iterator[gc.Item]:
        found = list(real(*arguments))
        assert lock_holder(made.root / "gc.lock") is None
        made.promote(approved)
        run_owner.retry(made.engine, retried, NOW)
        return iter(found)

    monkeypatch.setattr(gc, "find_garbage", find)
    found = made.collect()
    left = made.there(f"models/{loser:04d}", f"models/{approved:04d}", f"runs/{retried}/checkpoints")
    assert left == [False, True, True]
    assert f"models/{approved:04d}" not in {item.path for item in found.items}


def test_the_work_of_a_collection_grows_as_what_is_kept_does(tmp_path: Path) -> None:
    def calls(runs: int) -> int:
        made = History(tmp_path / str(runs), keep_models=runs)
        for _ in range(runs):
            made.run()
        made.collect()
        counted = itertools.count()
        sys.setprofile(lambda _frame, event, _argument: next(counted) if event == "call" else None)
        try:
            assert not made.collect().items
        finally:
            sys.setprofile(None)
        return next(counted)

    assert calls(60) < 5 * calls(15)


@pytest.mark.parametrize("automatic", [True, False])
def test_the_dispatcher_collects_at_its_start_and_after_a_run_unless_told_not_to(
    history: Callable[..., History], automatic: bool
) -> None:
    made = history(keep_models=0, automatic=automatic)
    made.run()
    dispatcher = Dispatcher(made.engine, made.settings, LocalExecutor(spool_of(made.root)))
    dispatcher.tick(NOW)
    dispatcher.upkeep.finish()
    assert made.there("models/0001") == [not automatic]
    made.run()
    dispatcher.tick(NOW)
    dispatcher.upkeep.finish()
    assert made.there("models/0002") == [True], "nothing has ended since"
    dispatcher.upkeep.may_collect = True
    dispatcher.tick(NOW)
    dispatcher.upkeep.finish()
    assert made.there("models/0002") == [not automatic]


def test_runs_go_on_while_a_collection_searches(
    history: Callable[..., History], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = history(keep_models=0)
    made.run()
    made.run("waiting")
    searching, go_on = threading.Event(), threading.Event()
    real = gc.find_garbage

    def find(*arguments: Any) -> Iterator[gc.Item]:
        searching.set()
        assert go_on.wait(30)
        return real(*arguments)

    monkeypatch.setattr(gc, "find_garbage", find)
    dispatcher = Dispatcher(made.engine, made.settings, LocalExecutor(spool_of(made.root)))
    dispatcher.upkeep.collect_garbage(NOW)
    assert searching.wait(30)
    dispatcher.tick(NOW)
    with transaction(made.engine) as session:
        assert "base has no readable config.json" in (session.get_one(Run, 2).error or "")
    go_on.set()
    dispatcher.upkeep.finish()
    assert made.there("models/0001") == [False]


def test_the_command_says_what_it_removes_and_the_dry_run_the_same(
    lived_in: Any, dropforge: Callable[..., Any]
) -> None:
    root = lived_in.settings.state_folder
    attempt = root / "runs/2/attempts/train-1"
    write(attempt / "adapter/adapter_model.safetensors", "a" * 2000)
    write(attempt / "log.txt", "hello")
    write(lived_in.folder / "dropforge.toml", "[gc]\nkeep_models = 0\n[tracks.support]\n")
    planned = dropforge("gc", "--dry-run")
    assert planned.code == 0
    table = [" ".join(line.split()) for line in planned.out.splitlines()]
    assert "2.0 kB runs/2/attempts/train-1/adapter run 2: failed, beyond gc.keep_models = 0" in table
    assert table[-2].endswith(" inbox/rejected/bad.jsonl drop 4 was rejected, beyond gc.rejected_days = 90")
    assert table[-1].endswith(" would be given back, by 2 files and folders")
    said = dropforge("gc", "--dry-run", "--json").json
    assert (attempt / "adapter").exists()
    done = dropforge("gc", "--json").json
    assert not (attempt / "adapter").exists()
    assert (done["items"], done["bytes"], done["dry_run"]) == (said["items"], said["bytes"], False)
    assert list((lived_in.folder / "inbox" / "rejected").iterdir()) == []
    assert dropforge("gc").out == "0 bytes given back, by 0 files and folders\n"
    assert (root / "runs/2/attempts/train-1/log.txt").exists()


def kill_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Let the process die before its `calls`th change of the file system from now on."""
    left = iter(range(calls))

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if next(left, None) is None:
                raise Death
            return real(*arguments, **named)

        return call

    for name in ("rename", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


def lived(folder: Path) -> History:
    made = History(folder, keep_models=1, keep_champions=1)
    made.promote(made.run(days=9))
    for days in (8, 7):
        made.run(days=days)
    made.run("failed", days=6, attempts=("failed", "lost"))
    made.run("failed", days=5, attempts=("failed",))
    made.run("waiting")
    return made


def test_a_collection_that_is_killed_anywhere_ends_the_same_when_it_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "PREDICTIONS_BYTES", 50)
    made = lived(tmp_path / "first")
    whole = made.copy(tmp_path / "whole")
    whole.collect()
    end = whole.files()
    # Every fourth point, from a random one on, unless everything is tried.
    step = 1 if WHOLE else 4
    points = random.SystemRandom().randrange(step)
    while True:
        again = made.copy(tmp_path / str(points))
        with monkeypatch.context() as patch:
            kill_after(patch, points)
            try:
                again.collect()
            except Death:
                killed = True
            else:
                killed = False
        for reference in again.root.glob("runs/*/merge.json"):
            name = durable.read_object(reference)["model_id"]
            assert (again.root / "models" / name).is_dir(), f"{reference} leads nowhere after {points} changes"
        again.collect()
        assert again.files() | {"trash"} == end | {"trash"}, points
        if not killed:
            break
        points += step
    assert points > 50


STATES = st.sampled_from([*ENDED, *OPEN, RunState.SUCCEEDED, RunState.FAILED])
RUNS = st.lists(
    st.tuples(STATES, st.floats(0, 60), st.sampled_from(["", "shared"]), st.sampled_from([False, False, True])),
    max_size=8,
)
LIMITS = st.fixed_dictionaries({"keep_models": st.integers(0, 2), "keep_champions": st.integers(1, 2)})


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders without end, one a history."""
    folder = tmp_path_factory.mktemp("histories")
    return (folder / str(number) for number in itertools.count())


@settings(
    max_examples=200 if WHOLE else 15,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(runs=RUNS, limits=LIMITS, seen=st.integers(0, 100 * DAY))
def test_no_history_and_no_settings_let_a_collection_touch_what_is_protected(
    places: Iterator[Path], runs: list[tuple[RunState, float, str, bool]], limits: dict[str, Any], seen: int
) -> None:
    made = History(next(places), **limits)
    champions: list[str] = ["base"]
    for state, days, model, promoted in runs:
        number = made.run(state, days=days, model=model)
        if promoted and state in ENDED and state != RunState.CANCELLED:
            champions.append(made.promote(number))
    with transaction(made.engine) as session:
        rows = session.exec(select(Run)).all()
        drops = [f"drops/{drop.sha256}.jsonl" for drop in session.exec(select(Drop)).all()]
    still_open = [row.id for row in rows if row.state in OPEN]
    # The serving champion, the one before it, and `keep_champions` more, each model once.
    distinct = list(dict.fromkeys(reversed(champions)))
    protected = {path for path in distinct[: 2 + limits["keep_champions"]] if path != "base"}
    protected |= {durable.read_object(made.root / f"runs/{run}/merge.json").get("folder", "") for run in still_open}
    protected |= {path for path in made.files() if any(path.startswith(f"runs/{run}/") for run in still_open)}
    protected |= {*drops, "tracks/default/champion"}
    contents = {path: (made.root / path).stat() for path in protected}
    made.collect(now=NOW - seen)
    assert [path for path in sorted(protected) if not (made.root / path).exists()] == []
    assert {path: (made.root / path).stat().st_ino for path in protected} == {
        path: found.st_ino for path, found in contents.items()
    }
    assert (made.base / "model.safetensors").read_text() == "base"
    assert (made.root / "tracks/default/champion").resolve().is_dir()
    assert made.collect(now=NOW - seen).items == (), "a second collection finds nothing"
