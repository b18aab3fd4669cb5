"""`report`, `compare`, `review`: the evidence behind a verdict, two runs side by side, answers judged blind."""

import os
import sys
import webbrowser
from typing import Annotated

import typer

from daemon.champions import blind_review
from daemon.champions.blind_review import KEYS, UNDO, Pair, Review, put_on_card
from daemon.cli.output import print_json, print_line, print_table
from daemon.cli.status import judged_words, short_id
from daemon.cli.workspace import (
    JsonOption,
    RunArgument,
    complete_run,
    load_settings,
    open_overview,
    open_writer,
    small_enough,
)
from daemon.system.clock import now_ms
from daemon.system.programs import who
from daemon.views.compare_runs import Comparison, report_data, report_folder
from daemon.views.compare_runs import compare as beside
from pipeline.artifacts import PAGE_NAME
from pipeline.errors import DropforgeError
from pipeline.words import count, signed

_DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")
OtherRunArgument = Annotated[
    int, typer.Argument(metavar="RUN", help="The other one.", autocompletion=complete_run, callback=small_enough)
]


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
    overview = open_overview(context)
    if as_json:
        print_json(report=report_data(overview, run))
        return
    page = report_folder(overview, run).absolute() / PAGE_NAME
    if not path and (sys.platform == "darwin" or any(map(os.environ.get, _DISPLAYS))):
        webbrowser.open(page.as_uri())
    print_line(str(page))


def compare(context: typer.Context, *, run: RunArgument, other: OtherRunArgument, as_json: JsonOption = False) -> None:
    """
    Show two runs beside each other.

    Their verdicts, the data and settings that differ, and the scores of both candidates on the records that both were
    scored on.
    """
    found = beside(open_overview(context), run, other)
    if as_json:
        print_json(comparison=found)
        return
    _print_sides(found)
    _print_differences(found)
    _print_scores(found)


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
    card. For programs --json prints the pairs that are left.
    """
    overview = open_overview(context)
    for given in choose or ():
        pair, sign, key = given.partition("=")
        if not sign:
            raise typer.BadParameter(f"--choose {given}: write PAIR=KEY, as 4f1c09a2b7e35d68=1")
        _choose(context, run, pair, key)
    found = overview.review(run)
    if not as_json and not choose:
        found = _ask_all(context, found)
    if as_json:
        print_json(review=found)
        return
    print_line(judged_words(found))


def _choose(context: typer.Context, run: int, pair: str, key: str) -> Review:
    choice = blind_review.Choice(pair, key, now_ms(), who())
    return blind_review.choose(open_writer(context), load_settings(context).state_folder, run, choice)


def _ask_all(context: typer.Context, found: Review) -> Review:
    """Show the pairs one by one and read a key for each; return the review once none is left or q was pressed."""
    if found.result is not None:
        put_on_card(load_settings(context).state_folder, found.run, found.result)
    elif not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise DropforgeError(
            "the keys of a review are read from a terminal, and this is none",
            f"dropforge review {found.run} --json prints the pairs, --choose PAIR=1 judges one",
        )
    while found.left:
        _show_pair(found, found.left[0])
        while (key := _read_key()) not in KEYS and not (key == UNDO and found.last):
            if key == "q":
                return found
        pair = found.last if key == UNDO and found.last else found.left[0].id
        found = _choose(context, found.run, pair, key)
    return found


def _show_pair(found: Review, pair: Pair) -> None:
    print_line(f"--- {found.judged + 1} of {found.asked}")
    for head, text in (
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


def _heads(found: Comparison) -> tuple[str, str]:
    return f"RUN {found.first.run}", f"RUN {found.second.run}"


def _print_sides(found: Comparison) -> None:
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


def _print_differences(found: Comparison) -> None:
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


def _print_scores(found: Comparison) -> None:
    print_line()
    if found.not_compared:
        print_line(f"scores are not compared: {found.not_compared}")
        return
    changed = found.references_changed
    left_out = f"; {changed} whose references changed are left out" if changed else ""
    print_line(f"both candidates on the {count(found.records, 'record')} that both were scored on{left_out}:")
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
