"""`watch`: show what the daemon does, on a terminal as `status` does, elsewhere as a line per change."""

import time
from collections.abc import Iterator
from datetime import datetime

import typer

from daemon.cli.output import make_console, print_line
from daemon.cli.status import LATEST, describe_run, outcome_words, print_status
from daemon.cli.workspace import load_settings
from daemon.state.states import RunState, state_words
from daemon.views.overview import Overview, RunView, attempts_of
from pipeline.contract import Progress
from pipeline.words import duration

_LOOK_SECONDS = 1.0
#: A step's progress is printed this many times.
_PARTS = 20


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
    Print a line with the time for each state of daemon, tracks and runs that is not in `said`; then refill `said`.

    Progress of a running step is printed every 5 %. With an empty `said` everything is printed.
    """
    things = dict(_things(overview))
    for key, words in things.items():
        if key not in shown:
            print_line(f"{datetime.now().astimezone():%H:%M:%S} {words}")
    shown.clear()
    shown.update(things)


def _things(overview: Overview) -> Iterator[tuple[object, str]]:
    """Yield (key, line) for each thing that goes on; the key changes when the line is to be printed again."""
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
    for one in overview.ask_of_run(run.id, attempts_of):
        if one.state == "published":
            yield (run.id, one.step, one.number), f"run {run.id}: {one.step} took {duration(one.seconds)}"
    if run.step is not None:
        made = run.progress or Progress(step=run.step)
        part = made.done * _PARTS // made.total if made.total else 0
        words = run.progress.words if run.progress else run.step
        yield (run.id, made.step, made.phase, made.where, part), f"run {run.id}: {words}"
