"""
A whole box without its threads: real intake, real dispatcher, real steps, one night after another.

A night can be tampered with between two steps, which is how candidates are made that no drop can make.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqlmodel import col, select

from daemon.dispatch.step_process import step_command
from daemon.inbox.watcher import make_inbox
from daemon.queue import drops
from daemon.state.database import transaction
from daemon.state.events import Word
from daemon.state.tables import Drop, Run
from pipeline import __main__ as step_process
from pipeline import durable
from pipeline.artifacts import Dataset, Model, Verdict
from pipeline.contract import RESULT_NAME, SPEC_NAME, StepResult, StepSpec
from pipeline.records.heldout import dataset_hash
from tests.chaos.house import DAY, START, Daemon
from tests.run_owner import spool_of

Rows = Sequence[Mapping[str, Any]]
#: Changes what a step left, and returns its artifact.
Tamper = Callable[[StepSpec, dict[str, Any]], dict[str, Any]]


class Night(NamedTuple):
    """One run that is over."""

    run: Run
    verdict: Verdict
    trials: int = 0
    """Trials and controls that came after it."""


class Box:
    """One workspace, whose steps run in processes of their own."""

    def __init__(self, folder: Path, settings: str) -> None:
        """Make the workspace in `folder`, or go on in the one that is there."""
        self.folder = folder
        if not (folder / "dropforge.toml").exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "dropforge.toml").write_text(settings, encoding="utf-8")
        self._now = START + DAY * (1 + len(list(folder.glob(".dropforge/runs/*"))))
        self.daemon = Daemon(folder, self._now)
        make_inbox(self.daemon.settings)

    def copy(self, folder: Path) -> "Box":
        """Return the same workspace as it is now, in `folder`."""
        self.daemon.engine.dispose()
        shutil.copytree(self.folder, folder, symlinks=True)
        return Box(folder, "")

    def drop(self, name: str, rows: Rows, *, heldout: bool = False) -> None:
        """Let the intake take a file."""
        inbox = self.daemon.settings.inbox_folder
        place = inbox / "heldout" if heldout else inbox
        place.mkdir(exist_ok=True)
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        outcomes = self.daemon.take_in(self._now)
        assert [outcome.kind for outcome in outcomes] == ["accepted"], outcomes

    def night(self, **tampers: Tamper) -> Night:
        """Let the box work until its run and its trials are over; `tampers` go by the step after which they act."""
        before = len(self.runs())
        for turn in range(400):
            nothing = self.daemon.dispatcher.idle
            self.daemon.dispatcher.tick(self._now + turn)
            if nothing and self.daemon.dispatcher.idle:
                break
            self._work(tampers)
        self._now += DAY
        run = [one for one in self.runs() if one.about_drop is None][-1]
        assert run.state == "succeeded", (before, run.state, run.error, run.hint)
        value = durable.read_json(self.daemon.root / f"runs/{run.id}/decide.json")
        return Night(run, Verdict.model_validate(value), len(self.runs()) - (run.id or 0))

    def accept_new_answers(self) -> list[str]:
        """Accept all new answers to old questions, as `dropforge drops accept` does; return the names of the files."""
        with transaction(self.daemon.engine) as session:
            asked = col(Drop.new_answers) > 0, ~col(Drop.answers_accepted)
            found = session.exec(select(Drop).where(*asked)).all()
        for drop in found:
            drops.accept_answers(self.daemon.engine, drop.id or 0, Word("", self._now, "a"), self.daemon.settings)
        return [drop.name for drop in found]

    def runs(self) -> list[Run]:
        """Return the runs in their order."""
        with transaction(self.daemon.engine) as session:
            return list(session.exec(select(Run).order_by(col(Run.id))).all())

    def drop_states(self) -> dict[str, str]:
        """Return the state of each file by its name."""
        with transaction(self.daemon.engine) as session:
            return {drop.name: drop.state for drop in session.exec(select(Drop))}

    def drops_of(self, run: Run) -> set[str]:
        """Return the names of the files that a run used."""
        with transaction(self.daemon.engine) as session:
            return set(session.exec(select(Drop.name).where(col(Drop.id).in_(run.snapshot or ()))).all())

    @property
    def champion(self) -> Path:
        """The folder that the champion's link leads to."""
        return (self.daemon.root / "tracks/default/champion").resolve()

    def _work(self, tampers: Mapping[str, Tamper]) -> None:
        root = self.daemon.root
        spool = spool_of(root)
        for spec in spool.orders():
            folder = root / spec.folder
            result = _process(spec, folder)
            if spec.step in tampers and result.artifact is not None:
                artifact = tampers[spec.step](spec, result.artifact)
                # A process of its own has left one already, which would be taken for one of the step's own files.
                (folder / RESULT_NAME).unlink(missing_ok=True)
                outputs = step_process._hash_outputs(folder)
                result = result.model_copy(update={"artifact": artifact, "outputs": outputs})
            durable.write_json(folder / RESULT_NAME, result.model_dump(mode="json"))
            spool.entry(spec.key).unlink()


def _process(spec: StepSpec, folder: Path) -> StepResult:
    """Do a step as the worker does, in a process of its own."""
    done = subprocess.run(
        step_command(spec, folder / SPEC_NAME),
        cwd=folder,
        env={**os.environ, **spec.env},
        capture_output=True,
        text=True,
        check=False,
    )
    result = durable.read_json(folder / RESULT_NAME)
    assert result is not None, done.stderr
    return StepResult.model_validate(result)


# --- tampering


def train_on(change: Callable[[list[dict[str, Any]], Path], list[dict[str, Any]]]) -> Tamper:
    """Replace the training rows, after `prepare`, by what `change` makes of them and of the data's folder."""

    def tamper(spec: StepSpec, artifact: dict[str, Any]) -> dict[str, Any]:
        folder = Path(spec.root) / Dataset.model_validate(artifact).folder
        rows = change(list(durable.read_jsonl(folder / "train.jsonl")), folder)
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return {**artifact, "train_rows": len(rows), "dataset_sha256": dataset_hash(folder)}

    return tamper


def challenge_with(champion: Path) -> Tamper:
    """Let the candidate be the champion itself, after `merge`."""

    def tamper(_spec: StepSpec, artifact: dict[str, Any]) -> dict[str, Any]:
        model = Model.model_validate(artifact)
        same = {"folder": f"models/{champion.name}", "model_id": champion.name}
        return model.model_copy(update=same).model_dump(mode="json")

    return tamper
