"""The running run with the loss curves of its training."""

from daemon.state.run_files import load_curve
from daemon.views.overview import Overview, RunView
from pipeline.artifacts import Frozen
from pipeline.contract import Curve


class LiveRun(Frozen):
    """The running run with its loss curves."""

    run: RunView
    curves: Curve


def curves_of(overview: Overview, run_id: int) -> Curve:
    """Return the loss curves of a run's training; empty ones if there are none yet or they cannot be read."""
    return load_curve(overview.folder, run_id) or Curve()


def live_run(overview: Overview) -> LiveRun | None:
    """Return the running run with its loss curves so far; `None` if no run is running."""
    found = overview.runs(states=["running"], most=1)
    return LiveRun(run=found[0], curves=curves_of(overview, found[0].id)) if found else None
