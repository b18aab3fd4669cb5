"""`wait`: wait until a run or a drop has a verdict, and return the verdict's exit code."""

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import PurePath
from typing import Annotated, Literal

import typer

from daemon.cli.output import print_json, print_line, waiting_words
from daemon.cli.status import EXIT_UNAVAILABLE, describe_run, files_in_inbox
from daemon.cli.workspace import JsonOption, TrackOption, load_settings
from daemon.settings.model import Settings
from daemon.state.questions import GAVE_BACK
from daemon.state.states import AWAITING, DropState, RunState
from daemon.views.drops import DropView
from daemon.views.overview import Overview, RunView
from pipeline.artifacts import Frozen
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
_BY_STATE: dict[str, Literal["failed", "cancelled"]] = {
    RunState.FAILED: "failed",
    RunState.CRASHED: "failed",
    RunState.CANCELLED: "cancelled",
}
_BY_DROP: dict[str, Literal["rejected", "cancelled", "refused"]] = {
    DropState.REJECTED: "rejected",
    DropState.WITHDRAWN: "cancelled",
    DropState.SUSPENDED: "refused",
}
_LOOK_SECONDS = 1.0
#: A daemon that is gone for longer is not being restarted.
_GONE_SECONDS = 60.0


class Settled(Frozen):
    """The final result of a run or drop that `wait` waited for."""

    verdict: Literal["promoted", "refused", "insufficient_evidence", "failed", "cancelled", "rejected"]
    """`refused`: by the gate, or a win that another champion came before or whose model is blocked."""
    sentence: str
    gain: float | None = None
    """In points of the primary metric; `None` if nothing was compared."""
    run: int | None = None
    drop: int | None = None


Ask = Callable[[], Settled | RunView | DropView | str]


def wait(
    context: typer.Context,
    *,
    what: Annotated[str, typer.Argument(metavar="RUN|FILE", help="Number of a run, or name of a dropped file.")],
    track: TrackOption = None,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="SECONDS", min=0, help="Give up after so long: code 15."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Wait until a run, or the run that trains on a dropped file, has its verdict.

    The exit code says which: 0 promoted, 10 refused by the gate, 11 insufficient evidence, 13 failed, 14 cancelled,
    15 timed out, 65 the drop was rejected, 69 no daemon runs. A win that waits for approval has no verdict yet. Until
    then each new state is printed to stderr. It is an error if there is no such run, drop or file in the inbox.
    """
    settings = load_settings(context)
    overview = Overview.of(settings)
    if what.isdecimal():
        ask: Ask = partial(run_awaited, overview, int(what[:20]))
    else:
        ask = file_awaited(overview, settings, printable(PurePath(what).name), track)
    found = _until_settled(overview, ask, timeout)
    code = EXIT_CODES[found.verdict]
    if as_json:
        print_json(exit_code=code, **found.model_dump(mode="json"))
    else:
        print_line(found.sentence)
    raise typer.Exit(code)


def _until_settled(overview: Overview, ask: Ask, timeout: float | None) -> Settled:
    """Poll `ask` every second until a verdict, printing each new state to stderr. Raises an error without one."""
    end = math.inf if timeout is None else time.monotonic() + timeout
    shown: object = None
    alive_at = -math.inf
    while not isinstance(found := ask(), Settled):
        key = found if isinstance(found, str) else (found.id, found.state, getattr(found, "step", None))
        if overview.daemon().alive:
            alive_at = time.monotonic()
        elif time.monotonic() - alive_at > _GONE_SECONDS:
            words = f"{_words(found)}; the daemon is not running, so no verdict will come"
            raise DropforgeError(words, "start it: dropforge run", EXIT_UNAVAILABLE)
        if key != shown:
            print(printable(_words(found)), file=sys.stderr, flush=True)
            shown = key
        left = end - time.monotonic()
        if left <= 0:
            words = f"no verdict after {timeout:g} s: {_words(found)}"
            raise DropforgeError(words, "wait again, or look at it: dropforge watch", EXIT_TIMED_OUT)
        time.sleep(min(left, _LOOK_SECONDS))
    return found


def _words(found: RunView | DropView | str) -> str:
    if isinstance(found, str):
        return found
    if isinstance(found, RunView):
        if found.ended_at is not None:
            return f"run {found.id} won and waits for approval: dropforge promote {found.id}"
        return f"run {found.id} is {found.state}: {describe_run(found)}"
    waits = waiting_words(found) or f"waits for a run of track {found.track}"
    return f"drop {found.id} ({found.name}) {waits}"


def file_awaited(overview: Overview, settings: Settings, name: str, track: str | None) -> Ask:
    """
    Return a function that polls the newest drop of the file `name`: once found, no later file of that name counts.

    It returns the result as `drop_awaited` does, or a sentence as long as a file of that name lies in the inbox. It
    raises `DropforgeError` if there is neither such a file nor such a drop (of `track`, if that is given).
    """
    taken: list[int] = []

    def ask() -> Settled | RunView | DropView | str:
        if not taken:
            if any(PurePath(one).name == name for one in files_in_inbox(settings)):
                return f"{name} lies in the inbox and was not taken yet"
            found = overview.drop_named(name, track)
            if found is None:
                raise DropforgeError(
                    f"there is no drop of a file {name}, and none in the inbox",
                    f"drop it first: dropforge submit {name}; list the drops: dropforge drops",
                )
            taken.append(found.id)
        return drop_awaited(overview, overview.drop(taken[0]))

    return ask


def run_awaited(overview: Overview, run_id: int) -> Settled | RunView:
    """Return the run's result, or the run itself if open or waiting for approval. Raises `NotThere` if unknown."""
    run = overview.run(run_id)
    if run.state in _BY_STATE:
        words = f"run {run.id} {run.state}" if run.state != RunState.CANCELLED else f"run {run.id} was cancelled"
        return Settled(verdict=_BY_STATE[run.state], sentence=": ".join(filter(None, (words, run.error))), run=run.id)
    if run.state != RunState.SUCCEEDED or run.outcome == AWAITING:
        return run
    verdict = run.outcome if run.outcome in {"promoted", "insufficient_evidence"} else "refused"
    return Settled.model_validate({"verdict": verdict, "sentence": run.sentence or "", "gain": run.gain, "run": run.id})


def drop_awaited(overview: Overview, drop: DropView) -> Settled | RunView | DropView:
    """
    Return the result of the first run that uses a drop; until there is one, that run or the drop itself.

    For a duplicate the original drop counts. A rejected, withdrawn or suspended drop that no run uses has a result
    of its own. If a failed or cancelled run gave the drop back and no run is queued, that run's result counts.
    """
    if drop.duplicate_of is not None:
        return drop_awaited(overview, overview.drop(drop.duplicate_of))
    if drop.first_run is not None:
        return run_awaited(overview, drop.first_run)
    if drop.state in _BY_DROP:
        words = ": ".join(filter(None, (f"drop {drop.id} ({drop.name}) is {drop.state}", drop.reason)))
        return Settled(verdict=_BY_DROP[drop.state], sentence=words, drop=drop.id)
    gave_back = overview.rows(GAVE_BACK, track=drop.track, drop=drop.id) if drop.state == DropState.ACCEPTED else []
    return run_awaited(overview, gave_back[0].id) if gave_back else drop
