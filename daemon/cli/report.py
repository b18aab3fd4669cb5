"""`report` and `compare`: the evidence behind a verdict, and two runs beside each other."""

import os
import sys
import webbrowser
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.output import print_json, print_line, print_table
from daemon.cli.status import short_id
from daemon.cli.workspace import MOST, JsonOption, RunArgument, complete_run, open_overview
from pipeline.wording import signed

if TYPE_CHECKING:
    from daemon.views.compare_runs import Comparison

_DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")
OtherRunArgument = Annotated[
    int, typer.Argument(metavar="RUN", help="The other one.", autocompletion=complete_run, max=MOST)
]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(report)
    app.command()(compare)


def report(
    context: typer.Context,
    *,
    run: RunArgument,
    path: Annotated[bool, typer.Option("--path", help="Print where the page lies, and open nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Open the evidence behind a run's verdict in a browser.

    It is one file, report.html, that can be copied or sent; without a display its path is printed. With --json the
    same as data, which schemas/report.schema.json describes.
    """
    from daemon.views.compare_runs import report_data, report_folder  # noqa: PLC0415 - a quick start
    from pipeline.artifacts import PAGE_NAME  # noqa: PLC0415 - a quick start

    overview = open_overview(context)
    if as_json:
        print_json(report=report_data(overview, run))
        return
    page = report_folder(overview, run).absolute() / PAGE_NAME
    if not path and _has_display():
        webbrowser.open(page.as_uri())
    print_line(str(page))


def compare(context: typer.Context, *, run: RunArgument, other: OtherRunArgument, as_json: JsonOption = False) -> None:
    """
    Show two runs beside each other.

    Their verdicts, the data and settings that differ, and the scores of both candidates on the records that both were
    scored on.
    """
    from daemon.views.compare_runs import compare as beside  # noqa: PLC0415 - a quick start

    found = beside(open_overview(context), run, other)
    if as_json:
        print_json(comparison=found.model_dump(mode="json"))
        return
    _print_sides(found)
    _print_differences(found)
    _print_scores(found)


def _has_display() -> bool:
    return sys.platform == "darwin" or any(os.environ.get(name) for name in _DISPLAYS)


def _heads(found: "Comparison") -> tuple[str, str]:
    return f"RUN {found.first.run}", f"RUN {found.second.run}"


def _print_sides(found: "Comparison") -> None:
    sides = (found.first, found.second)
    rows = [
        ("track", *(side.track for side in sides)),
        ("verdict", *(side.outcome or side.state for side in sides)),
        ("gain", *("" if side.gain is None else f"{signed(side.gain)} points" for side in sides)),
        ("candidate", *(short_id(side.model_id or "") for side in sides)),
        ("rows to train on", *(side.train_rows for side in sides)),
        ("held-out set", *(short_id(side.heldout_version or "") for side in sides)),
    ]
    print_table(("", *_heads(found)), rows)
    for side in sides:
        if side.sentence:
            print_line(f"run {side.run}: {side.sentence}")


def _print_differences(found: "Comparison") -> None:
    print_line()
    for side in (found.first, found.second):
        if side.drops:
            print_line(f"drops of run {side.run} alone: {', '.join(side.drops)}")
    if not found.first.drops and not found.second.drops:
        print_line("drops: the same")
    if not found.settings:
        print_line("settings: the same")
        return
    rows = [
        (one.name, _shown(one.first, chosen=one.first_chosen), _shown(one.second, chosen=one.second_chosen))
        for one in found.settings
    ]
    print_table(("SETTING", *_heads(found)), rows)


def _print_scores(found: "Comparison") -> None:
    print_line()
    if found.not_compared:
        print_line(f"scores are not compared: {found.not_compared}")
        return
    changed = found.references_changed
    left_out = f"; {changed} whose references changed are left out" if changed else ""
    print_line(f"both candidates on the {found.records} records that both were scored on{left_out}:")
    rows = [
        (one.metric, f"{one.first:.1f}", f"{one.second:.1f}", signed(one.second - one.first)) for one in found.scores
    ]
    print_table(("METRIC", *_heads(found), "CHANGE"), rows)
    if found.metric:
        print_line(
            f"by {found.metric}, run {found.second.run} is better on {found.wins} of them, worse on {found.losses}, "
            f"equal on {found.ties}"
        )


def _shown(value: object, *, chosen: bool) -> str:
    if not chosen:
        return "" if value is None else str(value)
    return "left to the run" if value is None else f"{value} (the run's choice)"
