"""`watch`: what the daemon does, as a screen on a terminal, as a line a change elsewhere."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from types import FrameType

import typer
from rich.live import Live

from daemon.cli.output import make_console, print_line, verdict_words
from daemon.cli.screen import Screen
from daemon.cli.status import describe_run, progress_mark
from daemon.cli.workspace import open_overview
from daemon.state.states import state_words
from daemon.views.now import Now, look
from daemon.views.overview import RunView
from pipeline.words import duration

_LOOK_SECONDS = 1.0


def watch(context: typer.Context) -> None:
    """
    Show what goes on until Ctrl-C.

    On a terminal a full screen: the run and its steps, how far it is, loss and dev loss, tokens a second, the time that
    is left, memory, what waits and why, the latest verdicts. Elsewhere a line whenever something changes.
    """
    overview = open_overview(context)
    console = make_console()
    signal.signal(signal.SIGTERM, _end)
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            _show(lambda: look(overview))
        else:
            said: dict[object, str] = {}
            while True:
                print_changes(look(overview), said)
                time.sleep(_LOOK_SECONDS)
    except KeyboardInterrupt:
        return


def _end(number: int, _frame: FrameType | None) -> None:
    """Leave by an exception, which gives the terminal its screen back."""
    sys.exit(128 + number)


def _show(look: Callable[[], Now]) -> None:
    with Live(console=make_console(), screen=True, auto_refresh=False) as live:
        while True:
            live.update(Screen(look(), datetime.now().astimezone()), refresh=True)
            time.sleep(_LOOK_SECONDS)


def print_changes(now: Now, said: dict[object, str]) -> None:
    """Print a line, with the time, for each thing that was not there at the last look, which `said` keeps."""
    things = dict(_things(now))
    for key, words in things.items():
        if key not in said:
            print_line(f"{datetime.now().astimezone():%H:%M:%S} {words}")
    said.clear()
    said.update(things)


def _things(now: Now) -> Iterator[tuple[object, str]]:
    """Yield what is worth a line, each with what tells it from what was said before."""
    daemon = f"the daemon is running, process {now.daemon.pid}" if now.daemon.alive else "the daemon is not running"
    yield daemon, daemon
    for whose, words in now.troubles.items():
        yield (whose, words), f"trouble: {whose}: {words}"
    for pause in now.paused:
        yield pause, pause.words
    for run in reversed(now.latest):
        yield (run.id, run.ended_at), f"run {run.id} of track {run.track}: {verdict_words(run)}"
    for run in now.awaiting:
        yield (run.id, "awaiting"), f"run {run.id} of track {run.track} won, waits: dropforge promote {run.id}"
    if now.run is not None:
        yield from _progress_of(now, now.run)
    for run in now.queue:
        key = (run.id, run.state, run.paused, run.error, run.not_before)
        yield key, f"run {run.id} of track {run.track} {state_words(run.state)}: {describe_run(run)}"


def _progress_of(now: Now, run: RunView) -> Iterator[tuple[object, str]]:
    yield (run.id, run.state, run.started_at), f"run {run.id} of track {run.track} is running"
    for stage in now.stages:
        if stage.state == "done" and stage.seconds is not None:
            yield (run.id, stage.step, stage.seconds), f"run {run.id}: {stage.step} took {duration(stage.seconds)}"
        if stage.state == "running":
            yield (run.id, *progress_mark(run)), f"run {run.id}: {run.progress.words if run.progress else stage.step}"
