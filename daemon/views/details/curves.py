"""How the loss of a run's training fell: whole once the step is done, as far as it is while it runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from daemon.state.run_files import ArtifactDamaged, attempt_folder, load_adapter
from daemon.views.overview import Overview, RunDetail, RunView
from pipeline.artifacts import CurvePoint, Frozen
from pipeline.contract import CURVE_NAME

#: Points that a screen can show; of more, the mean of equal spans.
MOST_POINTS = 300
#: A point is a short line; of a file beyond this the end is read.
_MOST_BYTES = 4_000_000


class Curves(Frozen):
    """Loss curves in nats a token, by optimizer step."""

    loss: tuple[CurvePoint, ...] = ()
    dev: tuple[CurvePoint, ...] = ()
    best_step: int | None = None
    """Of the lowest dev loss, once the training is done."""


class LiveRun(Frozen):
    """The run that is worked on now."""

    run: RunView
    curves: Curves


def curves_of(overview: Overview, run: RunDetail | RunView) -> Curves:
    """Return the curves of a run's training; empty ones before it has begun."""
    try:
        adapter = load_adapter(overview.folder, run.id)
    except (OSError, ArtifactDamaged):
        adapter = None
    if adapter is not None:
        return Curves(loss=adapter.loss_curve, dev=adapter.dev_curve, best_step=adapter.best_step)
    loss: dict[int, float] = {}
    dev: dict[int, float] = {}
    for point in _points(overview, run.id):
        loss[point["step"]] = point["loss"]
        if point.get("dev_loss") is not None and point["dev_loss"] not in dev.values():
            dev[point["step"]] = point["dev_loss"]
    return Curves(loss=_thinned(loss), dev=_thinned(dev))


def live_run(overview: Overview) -> LiveRun | None:
    """Return the run that is worked on now, with its curves as far as they are; `None` if there is none."""
    found = overview.runs(states=["running"], most=1)
    return LiveRun(run=found[0], curves=curves_of(overview, found[0])) if found else None


def _points(overview: Overview, run_id: int) -> Iterator[dict[str, Any]]:
    """Yield what the attempts at the training have noted, the oldest first; a resumed one repeats some steps."""
    folders = (overview.folder / attempt_folder(run_id, "train", 1)).parent.glob("train-*")
    for folder in sorted(folders, key=lambda folder: int(folder.name.removeprefix("train-"))):
        yield from _lines(folder / CURVE_NAME)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _MOST_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return
    for line in lines:
        try:
            point = json.loads(line)
        except ValueError:
            continue  # cut off by a crash, or by where reading began
        if isinstance(point, dict) and isinstance(point.get("step"), int) and isinstance(point.get("loss"), float):
            yield point


def _thinned(values: dict[int, float]) -> tuple[CurvePoint, ...]:
    points = sorted(values.items())
    span = -(-len(points) // MOST_POINTS) or 1
    groups = [points[start : start + span] for start in range(0, len(points), span)]
    return tuple(CurvePoint(step=group[-1][0], loss=sum(loss for _, loss in group) / len(group)) for group in groups)
