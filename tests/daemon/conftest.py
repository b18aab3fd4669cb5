"""A state folder that has been lived in, made by the daemon's own functions; and the commands to ask it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Engine, text
from sqlmodel import select

from daemon.champions import base_models, promotion
from daemon.cli import main, workspace
from daemon.inbox.intake import Intake
from daemon.inbox.watcher import Settled, make_inbox
from daemon.queue import states
from daemon.queue.attempt_ends import Then
from daemon.settings.load import load
from daemon.settings.model import Settings
from daemon.state.database import create, open_engine, transaction
from daemon.state.events import Word
from daemon.state.states import AttemptState
from daemon.state.tables import Attempt, Run
from pipeline import durable
from pipeline.config import RunConfig
from pipeline.contract import LOG_NAME, PROGRESS_NAME, Progress
from tests import run_owner

SCRIPT = Path(os.environ.get("TESTED_BIN", Path(sys.executable).parent)) / "dropforge"  # see tests/test_installation.py
START = 1_764_000_000_000
BASE_ID, MODEL_ID = "ba" * 32, "c0" * 32


@dataclass
class LivedIn:
    """A workspace and the means to write its history; every call is one minute after the one before."""

    folder: Path
    settings: Settings
    engine: Engine
    now: int = START

    def tick(self) -> int:
        self.now += 60_000
        return self.now

    def take(self, name: str, text: str, role: str = "train", track: str = "default") -> None:
        """Let a file be taken in."""
        place = self.settings.inbox_folder / ("" if track == "default" else track)
        (place / ("heldout" if role == "heldout" else "") / name).write_text(text)
        settled = Settled(track, "heldout" if role == "heldout" else "train", name.encode())
        Intake(self.engine, self.settings).take(settled, self.tick())

    def claim(self) -> states.Claim:
        """Let the next run begin."""
        config = RunConfig(track="default", base_model="/base", base_model_id=BASE_ID, salt="s")
        claim = run_owner.claim(self.engine, self.tick(), lambda _session, _track: config)
        assert claim is not None
        return claim

    def attempt(self, claim: states.Claim, step: str, state: AttemptState | None = AttemptState.PUBLISHED) -> Path:
        """Let one step be tried, with a log; leave the attempt open for `None`."""
        begun = states.begin_attempt(self.engine, claim, step, self.tick())
        folder = self.settings.state_folder / "runs" / str(claim.run_id) / "attempts" / f"{step}-{begun.number}"
        folder.mkdir(parents=True)
        (folder / LOG_NAME).write_text(f"{step} says hello\nsecond line\n")
        self.progress(folder, 12)
        if state is not None:
            error = "out of memory" if state == AttemptState.FAILED else None
            states.end_attempt(self.engine, claim, begun.id or 0, states.Ending(state, error), self.tick())
        return folder

    def progress(self, attempt: Path, done: int) -> None:
        """Let an attempt's step say how far it is."""
        told = Progress(
            step=attempt.name.partition("-")[0],
            done=done,
            total=30,
            loss=0.5,
            dev_loss=0.6,
            tokens_per_second=250.0,
            eta_seconds=75.0,
            memory=2_300_000_000,
        )
        durable.write_hint(attempt / PROGRESS_NAME, told.model_dump())

    def attempt_ended(self) -> None:
        """Let the step that `lived_in` left open be published: run 3 has trained."""
        with transaction(self.engine) as session:
            run = session.get_one(Run, 3)
            opened = session.exec(select(Attempt).where(Attempt.run_id == 3, Attempt.state == "submitted")).one()
        durable.write_json(self.settings.state_folder / "runs/3/train.json", {})
        ending = states.Ending(AttemptState.PUBLISHED)
        claim = states.Claim(3, run.token or "")
        states.end_attempt(self.engine, claim, opened.id or 0, ending, self.tick())

    def promote(self, claim: states.Claim) -> None:
        """Let the run end with a promotion."""
        verdict = run_owner.judged(
            "promoted",
            40.0,
            candidate_score=90.0,
            champion_score=50.0,
            interval=(28.5, 51.5),
            p_value=0.0001,
            test="mcnemar",
            wins=50,
            losses=2,
            ties=68,
            smallest_detectable_gain=7.5,
            champion_generation=0,
            candidate_model_id=MODEL_ID,
            champion_model_id=BASE_ID,
        )
        root = self.settings.work_folder
        (root / "models" / MODEL_ID).mkdir(parents=True)
        durable.write_json(root / "runs" / str(claim.run_id) / "decide.json", verdict.model_dump(mode="json"))
        promotion.promote(self.engine, root, claim.run_id, verdict, Word("", self.tick()))
        ending = (verdict.outcome, verdict)
        run_owner.finish(self.engine, claim, ending, self.tick())

    def win(self, *names: str) -> None:
        """Take files in, each with its name as its record, and let the run on them train and end with a promotion."""
        for name in names:
            self.take(f"{name}.jsonl", lines(name))
        claim = self.claim()
        self.attempt(claim, "train")
        self.promote(claim)

    def fail(self, claim: states.Claim) -> None:
        """Let the run end without a verdict."""
        why = {"error": "out of memory", "hint": "lower train.batch_size"}
        run_owner.leave(self.engine, claim, self.tick(), Then.FAIL, **why)


def lines(*words: str) -> str:
    """Return a drop with a record a word."""
    return "".join(json.dumps({"instruction": f"say {word}", "output": word}) + "\n" for word in words)


def make_workspace(folder: Path, base: base_models.Base | None = None) -> LivedIn:
    """Make a workspace whose daemon ran once and saw its base model: `base`, or an empty folder."""
    path = folder / "dropforge.toml"
    path.write_text('run_after_quiet_seconds = 0\n[gate]\non = "pinned"\n[tracks.support]\n')
    settings = load(path, {})
    make_inbox(settings)
    create(settings.state_folder / "dropforge.db")
    engine = open_engine(settings.state_folder / "dropforge.db")
    if base is None:
        (folder / "base").mkdir()
        base = base_models.Base(folder / "base", BASE_ID)
    with transaction(engine) as session:
        for name in settings.track_names:
            states.ensure_track(session, name, START)
    base_models.ensure_base(engine, settings.work_folder, "default", base, START)
    return LivedIn(folder, settings, engine)


@pytest.fixture
def new_workspace(tmp_path: Path) -> Callable[[], LivedIn]:
    """Make a workspace whose daemon ran once and saw its base model."""
    return lambda: make_workspace(tmp_path)


@pytest.fixture(scope="session")
def lived_in_once(tmp_path_factory: pytest.TempPathFactory) -> LivedIn:
    """Make the workspace that each `lived_in` is a copy of: making it takes six times as long as copying it."""
    made = live_in(make_workspace(tmp_path_factory.mktemp("history")))
    made.engine.dispose()
    return made


@pytest.fixture
def lived_in(lived_in_once: LivedIn, tmp_path: Path) -> LivedIn:
    """
    Give a workspace with a history.

    Drop 1 (held-out) and 2 gave run 1, promoted; 3 is a duplicate, 4 rejected; 5 gave run 2, which failed in training;
    6 gave run 3, which is training.
    """
    shutil.copytree(lived_in_once.folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    settings = load(tmp_path / "dropforge.toml", {})
    engine = open_engine(settings.state_folder / "dropforge.db")
    # The base model's folder is the one thing whose whole path is stored.
    old, new = str(lived_in_once.folder), str(tmp_path)
    with transaction(engine) as session:
        for column in ("track.base_path", "promotion.model_path", "promotion.previous_path", "event.detail"):
            table, _, name = column.partition(".")
            session.execute(text(f"UPDATE {table} SET {name} = replace({name}, :old, :new)"), {"old": old, "new": new})
    previous = settings.state_folder / "tracks/default/previous"
    previous.unlink()
    previous.symlink_to(tmp_path / "base")
    return LivedIn(tmp_path, settings, engine, lived_in_once.now)


def live_in(made: LivedIn) -> LivedIn:
    """Write the history of `lived_in` into a workspace."""
    made.take("exam.jsonl", lines("q"), "heldout")
    made.take("first.jsonl", lines("a", "b"))
    first = made.claim()
    for step in ("prepare", "train", "merge", "evaluate", "decide"):
        made.attempt(first, step)
    made.promote(first)
    made.take("again.jsonl", lines("a", "b"))
    made.take("bad.jsonl", '{"instruction": "x"}\n')
    made.take("second.jsonl", lines("c"))
    second = made.claim()
    made.attempt(second, "prepare")
    made.attempt(second, "train", AttemptState.FAILED)
    made.fail(second)
    made.take("third.jsonl", lines("d"))
    third = made.claim()
    made.attempt(third, "prepare")
    made.attempt(third, "train", None)
    return made


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.out)
        assert value["schema"] == 1
        return value


@pytest.fixture
def dropforge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Call the console script's function in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workspace, "SERVICE_FILE", tmp_path / "etc" / "dropforge.toml")
    for name in [name for name in os.environ if name.startswith("DROPFORGE_")]:
        monkeypatch.delenv(name)

    def call(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["dropforge", *map(str, arguments)])
        capsys.readouterr()
        code = main()
        return Ended(code, *capsys.readouterr())

    return call


@pytest.fixture
def script() -> Callable[..., Ended]:
    """Start the console script as a shell does; it must end with `code`."""

    def call(*arguments: str, folder: Path, code: int = 0, environment: dict[str, str] | None = None) -> Ended:
        done = subprocess.run(
            [SCRIPT, *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **(environment or {})},
        )
        assert done.returncode == code, done.stdout + done.stderr
        return Ended(done.returncode, done.stdout, done.stderr)

    return call
