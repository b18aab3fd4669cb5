"""How the loss of a run's training fell: whole once the step is done, as far as it is while it runs."""

from daemon.state.run_files import load_curve
from daemon.views.overview import Overview, RunView
from pipeline.artifacts import Frozen
from pipeline.contract import Curve


class LiveRun(Frozen):
    """The run that is worked on now."""

    run: RunView
    curves: Curve


def curves_of(overview: Overview, run_id: int) -> Curve:
    """Return the curves of a run's training; empty ones before it has begun."""
    return load_curve(overview.folder, run_id) or Curve()


def live_run(overview: Overview) -> LiveRun | None:
    """Return the run that is worked on now, with its curves as far as they are; `None` if there is none."""
    found = overview.runs(states=["running"], most=1)
    return LiveRun(run=found[0], curves=curves_of(overview, found[0].id)) if found else None
