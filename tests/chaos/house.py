"""
A daemon without its threads, and a worker that does each step at once by a script: what the chaos tests kill.

Everything else is real: settings, inbox, state folder, SQLite file, spool. Every call takes the time as a parameter.
"""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daemon.dispatch import publication
from daemon.dispatch.dispatcher import Dispatcher
from daemon.dispatch.spool import Executor, LocalExecutor, Spool
from daemon.inbox.intake import Intake, Outcome
from daemon.inbox.watcher import Watcher, make_inbox
from daemon.queue import states
from daemon.queue.nightly import take_due_slots
from daemon.settings.load import load
from daemon.settings.model import Settings
from daemon.state.database import create, open_engine, transaction
from daemon.state.database_file import verify
from daemon.state.layout import DATABASE_NAME
from daemon.system.folders import StateFolder, WorkFolder
from pipeline import durable
from pipeline.artifacts import Artifact, Preview
from pipeline.contract import RESULT_NAME, REVOKED_NAME, StepResult, StepSpec
from pipeline.errors import EXIT_INTERRUPTED
from pipeline.models.manifest import MANIFEST_NAME
from tests.made_artifacts import good_result, made_adapter, made_dataset, made_model, made_report, made_verdict
from tests.model_folder import write_model

#: 2026-01-01T00:00:00Z.
START = 1_767_225_600_000
DAY = 86_400_000
#: Where a workspace costs the disk nothing: no power is cut here, a killed process loses what it did not write.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - folders of random names are made in it
# What a tick does here does not depend on how fast the machine is.
publication._AT_ONCE_SECONDS = 3600.0
_COMPILED: dict[Any, Any] = {}
_SETTINGS = """
base_model = "base"
trigger = "both"
run_after_quiet_seconds = 0
[intake]
settle_seconds = {settle}
[retry]
backoff_seconds = 0
"""


def build(folder: Path, settle: float = 0) -> None:
    """Make a workspace with a base model."""
    (folder / "dropforge.toml").write_text(_SETTINGS.format(settle=settle))
    write_model(folder / "base", b"base weights")
    # The base model is the user's own folder: nobody wrote a manifest into it.
    (folder / "base" / MANIFEST_NAME).unlink()
    make_inbox(load(folder / "dropforge.toml", {}))


def records(*words: str) -> bytes:
    """Return a good drop with a record a word."""
    return "".join(json.dumps({"instruction": f"say {word}", "output": word}) + "\n" for word in words).encode()


def _none(_settings: Settings) -> dict[str, Executor]:
    return {}


class Daemon:
    """What `dropforge run` does: its start in the constructor, the bodies of its loops as methods."""

    def __init__(self, folder: Path, now: int, on_nodes: Callable[[Settings], dict[str, Executor]] = _none) -> None:
        """Start on the workspace `folder` and recover, as `Service` does."""
        self.folder = folder
        self.settings = load(folder / "dropforge.toml", {})
        self.root = root = self.settings.work_folder
        state = self.settings.state_folder
        for place in (state, root, root / "drops", root / "runs", root / "models", root / "tracks"):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
        create(state / DATABASE_NAME)
        self.engine = open_engine(state / DATABASE_NAME)
        # Compiling statements is most of a start's work, and the same for all daemons of this process.
        self.engine.update_execution_options(compiled_cache=_COMPILED)
        verify(state / DATABASE_NAME, at_start=True)
        local, nodes = LocalExecutor(Spool(state, root)), on_nodes(self.settings)
        self.dispatcher = Dispatcher(self.engine, self.settings, local, on_nodes=nodes)
        self.intake = Intake(self.engine, self.settings)
        self.watcher = Watcher(self.settings, threading.Event())
        with transaction(self.engine) as session:
            for name in self.settings.track_names:
                states.ensure_track(session, name, now)
        self.dispatcher.recover(now)

    def take_in(self, now: int, monotonic: float = 0.0) -> list[Outcome]:
        """Do what the intake's thread does at one waking."""
        return [self.intake.take(settled, now) for settled in self.watcher.scan(monotonic)]

    def night(self, now: int) -> None:
        """Do what the schedule's thread does at one look."""
        take_due_slots(self.engine, self.settings, now)

    def finish_runs(self, now: int, outcome: str = "not_shown_better") -> None:
        """Let dispatcher and worker work until no run is in hand and none is due."""
        for turn in range(60):
            nothing = self.dispatcher.idle
            self.dispatcher.tick(now + turn)
            if nothing and self.dispatcher.idle:
                return
            work(self.root, outcome)
        message = "a run did not end"
        raise AssertionError(message)

    def until(self, step: str, now: int, outcome: str = "not_shown_better") -> None:
        """Let them work until a result of `step` lies there for the dispatcher."""
        for turn in range(60):
            self.dispatcher.tick(now + turn)
            if any(spec.step == step for spec in work(self.root, outcome)):
                return
        message = f"step {step} was not reached"
        raise AssertionError(message)


def work(root: Path, outcome: str, state: Path | None = None) -> list[StepSpec]:
    """Do what the worker does with everything that is in the spool; verdicts say `outcome`."""
    done, spool = [], Spool(StateFolder(state or root), WorkFolder(root))
    for spec in spool.orders():
        folder = root / spec.folder
        # Left by one that a full disk broke off.
        shutil.rmtree(folder / "model", ignore_errors=True)
        result = interrupted(spec) if (folder / REVOKED_NAME).exists() else result_of(spec, outcome)
        durable.write_json(folder / RESULT_NAME, result.model_dump(mode="json"))
        spool.entry(spec.key).unlink()
        done.append(spec)
    return done


def interrupted(spec: StepSpec) -> StepResult:
    """Return the result of a step that was told to stop before it did anything."""
    return StepResult(key=spec.key, fence=spec.fence, status="interrupted", exit_code=EXIT_INTERRUPTED)


def result_of(spec: StepSpec, outcome: str) -> StepResult:
    """Do one step; return its result, which is a good one."""
    return good_result(spec, _artifact(spec, outcome))


def _artifact(spec: StepSpec, outcome: str) -> Artifact:
    match spec.step:
        case "prepare":
            asked = spec.config.gate.on == "pinned"
            return made_dataset(spec, heldout_pinned=asked and any(drop.role == "heldout" for drop in spec.drops))
        case "train":
            return made_adapter(spec)
        case "merge":
            return made_model(spec)
        case "evaluate":
            watch = dict.fromkeys(spec.fresh_drops, -5.0) if spec.watched else {}
            return made_report(spec, watched=spec.watched and spec.watched.generation, watch=watch)
        case "preview":
            return Preview(records=40, points=31.0, metric="exact_match")
        case _:
            return made_verdict(spec, outcome)
