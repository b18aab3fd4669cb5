"""The running runs with the loss curves of their trainings."""

from daemon.state.run_files import load_curve
from daemon.views.overview import Overview, RunView
from pipeline.artifacts import Frozen
from pipeline.contract import Curve


class LiveRun(Frozen):
    """A running run with its loss curves."""

    run: RunView
    curves: Curve


def curves_of(overview: Overview, run_id: int) -> Curve:
    """Return the loss curves of a run's training; empty ones if there are none yet or they cannot be read."""
    return load_curve(overview.folder, run_id) or Curve()


def live_runs(overview: Overview) -> tuple[LiveRun, ...]:
    """Return the running runs with their loss curves so far, the oldest run first."""
    found = overview.runs(states=["running"])
    return tuple(LiveRun(run=run, curves=curves_of(overview, run.id)) for run in reversed(found))
