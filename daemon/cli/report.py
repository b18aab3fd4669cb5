"""`report` and `review`: the evidence behind a verdict, and answers judged blind."""

import os
import sys
import webbrowser
from typing import Annotated

import typer

from daemon.champions import blind_review
from daemon.champions.blind_review import KEYS, UNDO, Pair, Review, put_on_card
from daemon.cli.output import print_json, print_line
from daemon.cli.status import judged_words
from daemon.cli.workspace import JsonOption, RunArgument, load_settings, open_overview, open_writer
from daemon.system.clock import now_ms
from daemon.system.programs import who
from daemon.views.reports import report_data, report_folder
from pipeline.artifacts import PAGE_NAME
from pipeline.errors import DropforgeError

_DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")


def report(
    context: typer.Context,
    *,
    run: RunArgument,
    path: Annotated[bool, typer.Option("--path", help="Print where the page lies, and open nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Open the evidence behind a run's verdict in a browser.

    It is one file, report.html, that can be copied or sent. Its path is printed, and without a display nothing is
    opened. With --json the same as data, which schemas/report.schema.json describes. It is an error if there is none.
    """
    overview = open_overview(context)
    if as_json:
        print_json(report=report_data(overview, run))
        return
    page = report_folder(overview, run).absolute() / PAGE_NAME
    if not path and (sys.platform == "darwin" or any(map(os.environ.get, _DISPLAYS))):
        webbrowser.open(page.as_uri())
    print_line(str(page))


def review(
    context: typer.Context,
    *,
    run: RunArgument,
    choose: Annotated[
        list[str] | None,
        typer.Option("--choose", metavar="PAIR=KEY", help="Judge a pair of those that --json prints; may be repeated."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Judge a run's answers beside the champion's without knowing whose is whose.

    Keys: 1 the first is better, 2 the second, 0 neither, u takes the last answer back, q goes on another time. At the
    end, when nothing can be taken back any more, the counts and an exact sign test are shown, and written on the run's
    card. Each choice is stored at once. For programs --json prints the pairs that are left and --choose judges them.
    """
    overview = open_overview(context)
    for given in choose or ():
        pair, sign, key = given.partition("=")
        if not sign:
            raise typer.BadParameter(f"--choose {given}: write PAIR=KEY, as 4f1c09a2b7e35d68=1")
        _choose(context, run, pair, key)
    progress = overview.review(run)
    if not as_json and not choose:
        progress = _ask_all(context, progress)
    if as_json:
        print_json(review=progress)
        return
    print_line(judged_words(progress))


def _choose(context: typer.Context, run: int, pair: str, key: str) -> Review:
    choice = blind_review.Choice(pair, key, now_ms(), who())
    return blind_review.choose(open_writer(context), load_settings(context).work_folder, run, choice)


def _ask_all(context: typer.Context, progress: Review) -> Review:
    """Show the pairs one by one and read a key for each; return the review once none is left or q was pressed."""
    if progress.result is not None:
        put_on_card(load_settings(context).work_folder, progress.run, progress.result)
    elif not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise DropforgeError(
            "the keys of a review are read from a terminal, and this is none",
            f"dropforge review {progress.run} --json prints the pairs, --choose PAIR=1 judges one",
        )
    while progress.left:
        _show_pair(progress, progress.left[0])
        while (key := _read_key()) not in KEYS and not (key == UNDO and progress.last):
            if key == "q":
                return progress
        pair = progress.last if key == UNDO and progress.last else progress.left[0].id
        progress = _choose(context, progress.run, pair, key)
    return progress


def _show_pair(progress: Review, pair: Pair) -> None:
    print_line(f"--- {progress.judged + 1} of {progress.asked}")
    for head, text in (
        ("earlier turns", pair.earlier),
        ("instruction", pair.instruction),
        ("input", pair.input),
        ("answer 1", pair.first),
        ("answer 2", pair.second),
    ):
        if text or head.startswith("answer"):
            print_line(f"{head}:" if text else f"{head}: (empty)")
            for line in text.expandtabs().splitlines():
                print_line(f"  | {line}")


def _read_key() -> str:
    print("better: 1, 2, or 0 for neither (u: take the last back, q: go on another time) ", end="", flush=True)
    key = typer.getchar()
    print_line(key)
    return key.lower()
