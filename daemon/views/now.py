"""The present state of the daemon: the running run with its steps and losses, the queue, the latest outcomes."""

from datetime import UTC, datetime
from sqlite3 import Connection
from typing import Literal

from daemon.state.run_files import load_curve, published
from daemon.state.states import RunState
from daemon.views.overview import AttemptView, DaemonView, Overview, PauseView, RunView, attempts_of
from daemon.views.reader import Row
from pipeline.artifacts import Frozen
from pipeline.config import RunConfig
from pipeline.contract import Curve
from pipeline.steps import STEPS

#: Most ended runs in a view.
LATEST = 12


class Stage(Frozen):
    """One step of a run and its state."""

    step: str
    state: Literal["done", "running", "to do"]
    seconds: float | None = None
    """How long it took, or has taken."""


class Now(Frozen):
    """The state of daemon, running run and queue at one moment."""

    daemon: DaemonView
    run: RunView | None
    """The run that is running; `None` when none is."""
    stages: tuple[Stage, ...] = ()
    curve: Curve | None = None
    """The losses of its training: from the folder of the attempt while it trains, then from the train artifact."""
    queue: tuple[RunView, ...]
    """What waits and what is queued, in the order in which it goes."""
    paused: tuple[PauseView, ...]
    awaiting: tuple[RunView, ...]
    """Wins that wait for a person."""
    latest: tuple[RunView, ...]
    """The runs that have ended, the newest first."""
    troubles: dict[str, str]
    """Whose, and what."""


def look(overview: Overview) -> Now:
    """Return the present state of daemon, running run and queue."""
    runs = overview.open_runs()
    running = next((run for run in runs if run.state == RunState.RUNNING), None)
    daemon = overview.daemon()
    return Now(
        daemon=daemon,
        run=running,
        stages=stages(overview, running.id) if running is not None else (),
        curve=load_curve(overview.folder, running.id) if running is not None else None,
        queue=tuple(run for run in runs if run.state != RunState.RUNNING),
        paused=tuple(overview.paused()),
        awaiting=tuple(overview.awaiting()),
        latest=tuple(overview.ended_runs(LATEST)),
        troubles=overview.troubles() if daemon.alive else {},
    )


def stages(overview: Overview, run_id: int) -> tuple[Stage, ...]:
    """Return the steps that a run's settings require, in order, each with its state. Raises `NotThere`."""

    def found(base: Connection, row: Row) -> tuple[Stage, ...]:
        config = RunConfig.model_validate(row.config) if row.config else None
        made = {one.step: one for one in attempts_of(base, row) if one.state in {"published", "submitted"}}
        done = published(overview.folder, run_id)
        return tuple(
            _stage(step.name, made.get(step.name), is_done=step.name in done)
            for step in STEPS
            if config is None or step.wanted(config)
        )

    return overview.ask_of_run(run_id, found)


def _stage(step: str, latest: AttemptView | None, *, is_done: bool) -> Stage:
    if latest is not None and latest.state == "submitted":
        taken = (datetime.now(UTC) - latest.started_at).total_seconds()
        return Stage(step=step, state="running", seconds=max(0.0, taken))
    if not is_done:
        return Stage(step=step, state="to do")
    return Stage(step=step, state="done", seconds=None if latest is None else latest.seconds)


class LiveRun(Frozen):
    """The running run with its loss curves."""

    run: RunView
    curves: Curve


def curves_of(overview: Overview, run_id: int) -> Curve:
    """Return the loss curves of a run's training; empty ones before training has begun."""
    return load_curve(overview.folder, run_id) or Curve()


def live_run(overview: Overview) -> LiveRun | None:
    """Return the running run with its loss curves so far; `None` if no run is running."""
    found = overview.runs(states=["running"], most=1)
    return LiveRun(run=found[0], curves=curves_of(overview, found[0].id)) if found else None
