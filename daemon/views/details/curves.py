"""How the loss of a run's training fell: whole once the step is done, as far as it is while it runs."""

from daemon.state.run_files import ArtifactDamaged, load_adapter, load_curve
from daemon.views.overview import Overview, RunView
from pipeline.artifacts import Frozen
from pipeline.contract import Curve


class Curves(Curve):
    """Loss curves in nats a token, by optimizer step."""

    best_step: int | None = None
    """Of the lowest dev loss, once the training is done."""


class LiveRun(Frozen):
    """The run that is worked on now."""

    run: RunView
    curves: Curves


def curves_of(overview: Overview, run_id: int) -> Curves:
    """Return the curves of a run's training; empty ones before it has begun."""
    found = load_curve(overview.folder, run_id) or Curve()
    try:
        adapter = load_adapter(overview.folder, run_id)
    except (OSError, ArtifactDamaged):
        adapter = None
    return Curves(loss=found.loss, dev=found.dev, best_step=None if adapter is None else adapter.best_step)


def live_run(overview: Overview) -> LiveRun | None:
    """Return the run that is worked on now, with its curves as far as they are; `None` if there is none."""
    found = overview.runs(states=["running"], most=1)
    return LiveRun(run=found[0], curves=curves_of(overview, found[0].id)) if found else None
