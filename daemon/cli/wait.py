"""`wait` and `watch`: wait for a verdict, and return its exit code; show what the daemon does until Ctrl-C."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import PurePath
from typing import Annotated, NamedTuple

import typer

from daemon.cli.output import make_console, print_json, print_line, waiting_words
from daemon.cli.status import EXIT_UNAVAILABLE, LATEST, describe_run, files_in_inbox, outcome_words, print_status
from daemon.cli.workspace import JsonOption, TrackOption, load_settings
from daemon.settings.model import Settings
from daemon.state.questions import GAVE_BACK
from daemon.state.states import AWAITING, DropState, RunState, state_words
from daemon.views.drops import DropView
from daemon.views.overview import Overview
from daemon.views.runs import RunView, attempts_of
from pipeline.artifacts import Frozen
from pipeline.contract import Progress
from pipeline.errors import EXIT_BAD_DATA, DropforgeError
from pipeline.words import duration, printable, shell_path

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
#: The verdict on a run or drop by its state.
_BY_STATE: dict[str, str] = {
    RunState.FAILED: "failed",
    RunState.CRASHED: "failed",
    RunState.CANCELLED: "cancelled",
    DropState.REJECTED: "rejected",
    DropState.WITHDRAWN: "cancelled",
    DropState.SUSPENDED: "refused",
}
_LOOK_SECONDS = 1.0
#: A step's progress is printed this many times.
_PARTS = 20
#: A daemon that is gone for longer is not being restarted.
GONE_SECONDS = 60.0


class Settled(Frozen):
    """The final result of a run or drop that `wait` waited for."""

    verdict: str
    """A key of `EXIT_CODES`; `refused` by the gate, as overtaken by another champion, or as the model is blocked."""
    sentence: str
    gain: float | None = None
    """In points of the primary metric; `None` if nothing was compared."""
    run: int | None = None
    drop: int | None = None


class Pending(NamedTuple):
    """What `wait` waits for while there is no verdict."""

    words: str
    state: object = ""
    """The words are printed again when this changes."""


Ask = Callable[[], Settled | Pending]


def wait(
    context: typer.Context,
    *,
    what: Annotated[str, typer.Argument(metavar="RUN|FILE", help="Number of a run, or name of a dropped file.")],
    track: TrackOption = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="SECONDS", min=0, help="Give up after so long: code 15.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Wait until a run, or the run that trains on a dropped file, has its verdict.

    The exit code says which: 0 promoted; 10 refused by the gate, overtaken by another champion, blocked, or the drop
    suspended; 11 insufficient evidence; 13 failed or crashed; 14 cancelled, or the drop withdrawn; 15 timed out; 65 the
    drop rejected; 69 no daemon runs. A win that waits for approval has no verdict yet. Until then each new state is
    printed to stderr. It is an error if there is no such run, drop or file in the inbox.
    """
    settings = load_settings(context)
    overview = Overview.of(settings)
    if what.isdecimal():
        ask: Ask = partial(run_awaited, overview, int(what[:20]))
    else:
        ask = file_awaited(overview, settings, printable(PurePath(what).name), track)
    settled = _until_settled(overview, ask, timeout)
    code = EXIT_CODES[settled.verdict]
    if as_json:
        print_json(exit_code=code, **settled.model_dump(mode="json"))
    else:
        print_line(settled.sentence)
    raise typer.Exit(code)


def _until_settled(overview: Overview, ask: Ask, timeout: float | None) -> Settled:
    """
    Call `ask` every second until it returns a result, printing each new state to stderr; return the result.

    Raises as `ask`, `DropforgeError` of code 15 after `timeout` seconds (`None`: never), and of code 69 if no daemon
    runs at the first call, or later none for 60 s.
    """
    end = math.inf if timeout is None else time.monotonic() + timeout
    shown: object = None
    alive_at = -math.inf
    while isinstance(seen := ask(), Pending):
        if overview.daemon().alive:
            alive_at = time.monotonic()
        elif time.monotonic() - alive_at > GONE_SECONDS:
            words = f"{seen.words}; the daemon is not running, so no verdict will come"
            raise DropforgeError(words, "start it: dropforge run", EXIT_UNAVAILABLE)
        if seen.state != shown:
            print(printable(seen.words), file=sys.stderr, flush=True)
            shown = seen.state
        left = end - time.monotonic()
        if left <= 0:
            words = f"no verdict after {timeout:g} s: {seen.words}"
            raise DropforgeError(words, "wait again, or look at it: dropforge watch", EXIT_TIMED_OUT)
        time.sleep(min(left, _LOOK_SECONDS))
    return seen


def file_awaited(overview: Overview, settings: Settings, name: str, track: str | None) -> Ask:
    """
    Return a function that returns `drop_awaited` of the newest drop of the file `name`, in each call of the same drop.

    It returns a `Pending` while a file of that name lies in the inbox, of any track. It raises `DropforgeError` if
    there is neither such a file nor such a drop (of `track`, if that is given).
    """
    number: int | None = None

    def ask() -> Settled | Pending:
        nonlocal number
        if number is None:
            if any(PurePath(file).name == name for file in files_in_inbox(settings)):
                return Pending(f"{name} lies in the inbox and was not taken yet")
            drop = next(iter(overview.drops(track, most=1, name=name)), None)
            if drop is None:
                raise DropforgeError(
                    f"there is no drop of a file {name}, and none in the inbox",
                    f"drop it first: dropforge submit {shell_path(name)}; list the drops: dropforge drops",
                )
            number = drop.id
        return drop_awaited(overview, overview.drop(number))

    return ask


def run_awaited(overview: Overview, run_id: int) -> Settled | Pending:
    """Return a run's result, or a `Pending` if it is open or waits for approval. Raises `NotThere` if it is unknown."""
    run = overview.run(run_id)
    if run.state in _BY_STATE:
        words = ": ".join(filter(None, (f"run {run.id} {state_words(run.state)}", run.error)))
        return Settled(verdict=_BY_STATE[run.state], sentence=words, run=run.id)
    state = (run.id, run.state, run.step)
    if run.state != RunState.SUCCEEDED:
        return Pending(f"run {run.id} is {run.state}: {describe_run(run)}", state)
    if run.outcome == AWAITING:
        return Pending(f"run {run.id} won and waits for approval: dropforge promote {run.id}", state)
    verdict = run.outcome if run.outcome in {"promoted", "insufficient_evidence"} else "refused"
    return Settled(verdict=verdict, sentence=run.sentence or "", gain=run.gain, run=run.id)


def drop_awaited(overview: Overview, drop: DropView) -> Settled | Pending:
    """
    Return the result of the first run that uses a drop; a `Pending` until there is one.

    For a duplicate the original drop counts. A rejected, withdrawn or suspended drop that no run uses is a result, too.
    If a failed or cancelled run gave the drop back and no run is queued, that run's result counts.
    """
    if drop.duplicate_of is not None:
        return drop_awaited(overview, overview.drop(drop.duplicate_of))
    if drop.first_run is not None:
        return run_awaited(overview, drop.first_run)
    if drop.state in _BY_STATE:
        why = "; ".join(filter(None, (drop.reason, *drop.evidence)))
        words = ": ".join(filter(None, (f"drop {drop.id} ({drop.name}) is {drop.state}", why)))
        return Settled(verdict=_BY_STATE[drop.state], sentence=words, drop=drop.id)
    gave_back = overview.rows(GAVE_BACK, track=drop.track, drop=drop.id) if drop.state == DropState.ACCEPTED else []
    if gave_back:
        return run_awaited(overview, gave_back[0].id)
    waits = waiting_words(drop) or f"waits for a run of track {drop.track}"
    return Pending(f"drop {drop.id} ({drop.name}) {waits}", (drop.id, drop.state))


def watch(context: typer.Context) -> None:
    """
    Show what goes on until Ctrl-C.

    On a terminal the text of `dropforge status`, redrawn every second. Elsewhere a line for the daemon and each of the
    latest runs, then a line whenever something changes.
    """
    settings = load_settings(context)
    overview, console, shown = Overview.of(settings), make_console(), dict[object, str]()
    try:
        while True:
            if console.is_terminal and not console.is_dumb_terminal:
                console.clear()
                print_status(settings, overview)
            else:
                print_changes(overview, shown)
            time.sleep(_LOOK_SECONDS)
    except KeyboardInterrupt:
        return


def print_changes(overview: Overview, shown: dict[object, str]) -> None:
    """
    Print a line with the time for each state of daemon, tracks and runs that is not in `shown`; then refill `shown`.

    Progress of a running step is printed every 5 %. With an empty `shown` everything is printed.
    """
    things = dict(_things(overview))
    for key, words in things.items():
        if key not in shown:
            print_line(f"{datetime.now().astimezone():%H:%M:%S} {words}")
    shown.clear()
    shown.update(things)


def _things(overview: Overview) -> Iterator[tuple[object, str]]:
    """Yield (key, line) for daemon, troubles, pauses, latest ended and open runs; a new key means a line to print."""
    daemon = overview.daemon()
    words = f"the daemon is running, process {daemon.pid}" if daemon.alive else "the daemon is not running"
    yield daemon, words
    for whose, trouble in (overview.troubles() if daemon.alive else {}).items():
        yield (whose, trouble), f"trouble: {whose}: {trouble}"
    for pause in overview.paused():
        yield pause, pause.words
    for run in reversed(overview.ended_runs(LATEST)):
        yield (run.id, run.ended_at), f"run {run.id} of track {run.track}: {outcome_words(run)}"
    for run in overview.open_runs():
        if run.state == RunState.RUNNING:
            yield from _progress_of(overview, run)
        else:
            key = (run.id, run.state, run.paused, run.error, run.not_before)
            yield key, f"run {run.id} of track {run.track} {state_words(run.state)}: {describe_run(run)}"


def _progress_of(overview: Overview, run: RunView) -> Iterator[tuple[object, str]]:
    yield (run.id, run.state, run.started_at), f"run {run.id} of track {run.track} is running"
    if run.error:
        yield (run.id, run.error), f"run {run.id}: {run.error}"
    for attempt in overview.ask_of_run(run.id, attempts_of):
        if attempt.state == "published":
            took = duration(attempt.seconds)
            yield (run.id, attempt.step, attempt.number), f"run {run.id}: {attempt.step} took {took}"
    if run.step is not None:
        made = run.progress or Progress(step=run.step)
        part = made.done * _PARTS // made.total if made.total else 0
        words = run.progress.words if run.progress else run.step
        yield (run.id, made.step, made.phase, made.where, part), f"run {run.id}: {words}"
