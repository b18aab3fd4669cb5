"""The report of a run, and the settings in which the run differs from the run that made its champion."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from daemon.state.questions import MAKER
from daemon.state.states import state_words
from daemon.views.overview import NotThere, Overview, RunDetail
from pipeline import durable
from pipeline.artifacts import JSON_NAME, PAGE_NAME, Frozen
from pipeline.errors import DropforgeError
from pipeline.report.facts import Story

#: Settings that are not compared: the salt is the track's.
_UNTOLD = frozenset({"salt"})
#: Values that leave a choice to a track's first run; later runs are given its choice, so neither is compared.
_LEFT_TO_RUN: Mapping[str, object] = {
    "evaluate.metric": "auto",
    "evaluate.max_new_tokens": 0,
    "evaluate.batch_size": 0,
}


class ReportDamaged(DropforgeError):
    """A run's report.json is missing or damaged."""


class Setting(Frozen):
    """A setting with different values in two runs."""

    name: str
    first: Any
    """The value in the champion's run; `None` if that has no such setting."""
    second: Any


class Changes(Frozen):
    """Settings in which a run differs from the run that made its champion."""

    against: int
    """That run."""
    settings: tuple[Setting, ...]


def report_folder(overview: Overview, run_id: int) -> Path:
    """Return the folder of a run's report.html and report.json. Raises `NotThere` without verdict or report.html."""
    run = overview.run(run_id)
    if run.verdict is None:
        why = f": it {state_words(run.state)}{f': {run.error}' if run.error else ''}" if run.ended_at else ""
        raise NotThere(
            f"run {run_id} has no verdict, so there is no report{why}",
            (why and run.hint) or f"see how far it is: dropforge show {run_id}",
        )
    folder = overview.folder / run.verdict.report if run.verdict.report else None
    if folder is None or not (folder / PAGE_NAME).is_file():
        raise NotThere(
            f"the report of run {run_id} is not there{f': {folder} is gone' if folder else ''}",
            f"the verdict and its numbers: dropforge show {run_id}",
        )
    return folder


def report_data(overview: Overview, run_id: int) -> dict[str, Any]:
    """Return a run's report.json. Raises `NotThere` if there is no report, `ReportDamaged` if its data is unusable."""
    path = report_folder(overview, run_id) / JSON_NAME
    try:
        value = durable.read_json(path)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ReportDamaged(
            f"the data of the report of run {run_id} is damaged or gone: {path}",
            f"bring it back from a backup; the page is in the same folder: dropforge report {run_id}",
        )
    return value


def story_of(overview: Overview, run: RunDetail) -> Story | None:
    """Return headline, reasons and next steps for a run's verdict, from its report; `None` without a valid report."""
    if run.verdict is None or run.verdict.report is None:
        return None
    told = durable.read_object(overview.folder / run.verdict.report / JSON_NAME).get("story")
    try:
        return Story.model_validate(told)
    except ValidationError:
        return None


def changes_since_champion(overview: Overview, run: RunDetail) -> Changes | None:
    """
    Return the settings in which a run differs from the run that made the champion it was compared with.

    Before a verdict that is the serving champion. `None` if the run has no settings yet, or the champion is a base
    model or its own. The salt is not compared, nor are values that one of the runs left open, as the metric "auto".
    """
    made = _champions_run(overview, run)
    if run.config is None or made is None or made == run.id:
        return None
    try:
        champion = overview.run(made)
    except NotThere:
        return None
    return Changes(against=made, settings=tuple(_differing(champion.config or {}, run.config)))


def _differing(champion: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Setting]:
    """Yield the settings whose values differ and were not left to the run, sorted by name."""
    ours, theirs = dict(_flat(champion)), dict(_flat(config))
    for name in sorted({*ours, *theirs}):
        first, second = ours.get(name), theirs.get(name)
        is_left = name in _LEFT_TO_RUN and _LEFT_TO_RUN[name] in {first, second}
        if first != second and not is_left and name.partition(".")[0] not in _UNTOLD:
            yield Setting(name=name, first=first, second=second)


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, value


def _champions_run(overview: Overview, run: RunDetail) -> int | None:
    """Return the id of the run that made `run`'s champion (before a verdict, today's); `None` for a base model."""
    if run.verdict is not None and run.verdict.champion_model_id is not None:
        found: int | None = overview.rows(MAKER, track=run.track, model=run.verdict.champion_model_id)[0].run
        return found
    serving = overview.champion(run.track)
    return None if serving is None else serving.run
