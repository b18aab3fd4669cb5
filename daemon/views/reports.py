"""The report of a run: its folder, its data and its story."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from daemon.state.states import state_words
from daemon.views.overview import Overview
from daemon.views.reader import NotThere
from daemon.views.runs import RunDetail
from pipeline import durable
from pipeline.artifacts import JSON_NAME, PAGE_NAME
from pipeline.errors import DropforgeError
from pipeline.report.facts import Story


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
    """Return a run's report.json. Raises `NotThere` if there is no report, `DropforgeError` if its data is unusable."""
    path = report_folder(overview, run_id) / JSON_NAME
    value = durable.read_object(path)
    if not value:
        raise DropforgeError(
            f"the data of the report of run {run_id} is damaged or gone: {path}",
            f"bring it back from a backup; the page is in the same folder: dropforge report {run_id}",
        )
    return value


def story_of(overview: Overview, run: RunDetail) -> Story | None:
    """Return headline, reasons and next steps for a run's verdict, from its report; `None` without a valid report."""
    if run.verdict is None or run.verdict.report is None:
        return None
    story = durable.read_object(overview.folder / run.verdict.report / JSON_NAME).get("story")
    try:
        return Story.model_validate(story)
    except ValidationError:
        return None
