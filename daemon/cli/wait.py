"""`wait`: until a run or a drop has its verdict, which is the exit code."""

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import PurePath
from typing import Annotated

import typer

from daemon.cli.output import print_json, print_line
from daemon.cli.status import describe_run, files_in_inbox, progress_mark
from daemon.cli.workspace import MOST, JsonOption, complete_run, load_settings, open_overview, small_enough
from daemon.settings.model import Settings
from daemon.views.awaited import Settled, drop_awaited, run_awaited
from daemon.views.drop_lineage import DropView
from daemon.views.overview import Overview, RunView
from pipeline.errors import EXIT_BAD_DATA, DropforgeError
from pipeline.words import printable

#: The exit code of each verdict; `--help` has them.
EXIT_CODES = {
    "promoted": 0,
    "refused": 10,
    "insufficient_evidence": 11,
    "failed": 13,
    "cancelled": 14,
    "rejected": EXIT_BAD_DATA,
}
EXIT_TIMED_OUT = 15
_LOOK_SECONDS = 1.0
#: A daemon that is gone for longer is not being restarted.
_GONE_SECONDS = 60.0


class TimedOut(DropforgeError):
    """There is no verdict yet."""

    exit_code = EXIT_TIMED_OUT


class NoDaemon(DropforgeError):
    """Nothing will happen, since no daemon runs."""

    exit_code = 69


def wait(  # noqa: PLR0913 - each goes by its name on the command line
    context: typer.Context,
    *,
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|FILE]", help="Number of a run, or name of a dropped file.", autocompletion=complete_run
        ),
    ] = None,
    drop: Annotated[
        int | None, typer.Option("--drop", metavar="DROP", help="Number of a drop.", callback=small_enough)
    ] = None,
    track: Annotated[
        str | None, typer.Option("--track", metavar="TRACK", help="The track that the file was dropped for.")
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="SECONDS", min=0, help="Give up after so long: code 15."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Wait until a run, or the run that trains on a drop, has its verdict.

    The exit code says which: 0 promoted, 10 refused by the gate, 11 insufficient evidence, 13 failed, 14 cancelled,
    15 timed out, 65 the drop was rejected, 69 no daemon runs. A win that waits for approval has no verdict yet.
    """
    if (what is None) == (drop is None):
        message = "name a run, a dropped file, or a drop: dropforge wait 7, wait data.jsonl, or wait --drop 4"
        raise typer.BadParameter(message)
    overview = open_overview(context)
    ask = _question(overview, load_settings(context), what, drop, track)
    found = _until_settled(overview, ask, timeout)
    code = EXIT_CODES[found.verdict]
    if as_json:
        print_json(exit_code=code, **found.model_dump(mode="json"))
    else:
        print_line(found.sentence)
    raise typer.Exit(code)


def _question(
    overview: Overview, settings: Settings, what: str | None, drop: int | None, track: str | None
) -> Callable[[], Settled | RunView | DropView | str]:
    """Return the question that is asked until the answer is a verdict."""
    if drop is not None:
        return partial(drop_awaited, overview, drop)
    if what is not None and what.isdecimal():
        return partial(run_awaited, overview, min(int(what[:20]), MOST))
    name = PurePath(what or "").name
    taken: list[int] = []  # once it is found it is this drop, whatever comes under the same name

    def by_name() -> Settled | RunView | DropView | str:
        if not taken:
            if any(PurePath(one).name == printable(name) for one in files_in_inbox(settings)):
                return f"{name} lies in the inbox and was not taken yet"
            found = overview.drop_named(printable(name), track)
            if found is None:
                message = f"there is no drop of a file {name}, and none in the inbox"
                raise DropforgeError(message, f"drop it first: dropforge submit {name}; what is there: dropforge drops")
            taken.append(found.id)
        return drop_awaited(overview, taken[0])

    return by_name


def _until_settled(
    overview: Overview, ask: Callable[[], Settled | RunView | DropView | str], timeout: float | None
) -> Settled:
    """Look once a second; say on standard error what is waited for, whenever that changes."""
    end = None if timeout is None else time.monotonic() + timeout
    said: object = None
    alive_at = -math.inf
    while not isinstance(found := ask(), Settled):
        key, words = _state(found)
        if overview.daemon().alive:
            alive_at = time.monotonic()
        elif time.monotonic() - alive_at > _GONE_SECONDS:
            raise NoDaemon(f"{words}; the daemon is not running, so no verdict will come", "start it: dropforge run")
        if key != said:
            print(printable(words), file=sys.stderr, flush=True)
            said = key
        left = _LOOK_SECONDS if end is None else end - time.monotonic()
        if left <= 0:
            raise TimedOut(f"no verdict after {timeout:g} s: {words}", "wait again, or look at it: dropforge watch")
        time.sleep(min(left, _LOOK_SECONDS))
    return found


def _state(found: RunView | DropView | str) -> tuple[object, str]:
    """Return what tells one state from the next, and the state in words."""
    if isinstance(found, str):
        return found, found
    if isinstance(found, RunView):
        if found.ended_at is not None:
            return (found.id, found.outcome), f"run {found.id} won and waits for approval: dropforge promote {found.id}"
        key = (found.id, found.state, progress_mark(found), found.paused, found.error)
        return key, f"run {found.id} is {found.state}: {describe_run(found)}"
    words = f"drop {found.id} ({found.name}) waits for a run of track {found.track}"
    if found.state == "proposed":
        words = f"drop {found.id} ({found.name}) waits for a person: dropforge drops accept {found.id}"
    return (found.id, found.state), words
