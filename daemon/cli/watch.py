"""`watch`: show what the daemon does, as a full screen on a terminal, elsewhere as a line per change."""

import math
import signal
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from datetime import datetime
from types import FrameType

import typer
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from daemon.cli.output import clock, make_console, print_line, verdict_words
from daemon.cli.status import describe_run, progress_mark
from daemon.cli.workspace import open_overview
from daemon.state.states import state_words
from daemon.views.now import Now, look
from daemon.views.overview import RunView
from pipeline.artifacts import CurvePoint
from pipeline.contract import Curve, Progress
from pipeline.words import duration, printable

_LOOK_SECONDS = 1.0
_MARKS = {"done": "✓", "running": "▶", "to do": "·"}
_BLOCKS = "▁▂▃▄▅▆▇█"
_LABEL, _NUMBERS = 9, 18
_MOST_NOTES = 3
_MOST_QUEUED = 8


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
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while True:
                    live.update(Screen(look(overview), datetime.now().astimezone()), refresh=True)
                    time.sleep(_LOOK_SECONDS)
        said: dict[object, str] = {}
        while True:
            print_changes(look(overview), said)
            time.sleep(_LOOK_SECONDS)
    except KeyboardInterrupt:
        return


def _end(number: int, _frame: FrameType | None) -> None:
    """Handle SIGTERM by raising `SystemExit`, so that the terminal's screen is restored."""
    sys.exit(128 + number)


# --- a line for each change


def print_changes(now: Now, said: dict[object, str]) -> None:
    """Print a line with the time for each entry of `now` that is not in `said`; then set `said` to all entries."""
    things = dict(_things(now))
    for key, words in things.items():
        if key not in said:
            print_line(f"{datetime.now().astimezone():%H:%M:%S} {words}")
    said.clear()
    said.update(things)


def _things(now: Now) -> Iterator[tuple[object, str]]:
    """Yield (key, line) for each entry of `now`; the key changes when the line is to be printed again."""
    daemon = f"the daemon is running, process {now.daemon.pid}" if now.daemon.alive else "the daemon is not running"
    yield daemon, daemon
    for whose, words in now.troubles.items():
        yield (whose, words), f"trouble: {whose}: {words}"
    for pause in now.paused:
        yield pause, pause.words
    for run in reversed(now.latest):
        yield (run.id, run.ended_at), f"run {run.id} of track {run.track}: {verdict_words(run)}"
    for run in now.awaiting:
        yield (run.id, "awaiting"), _awaits(run)
    if now.run is not None:
        yield from _progress_of(now, now.run)
    for run in now.queue:
        key = (run.id, run.state, run.paused, run.error, run.not_before)
        yield key, f"run {run.id} of track {run.track} {state_words(run.state)}: {describe_run(run)}"


def _awaits(run: RunView) -> str:
    return f"run {run.id} of track {run.track} won, waits: dropforge promote {run.id}"


def _progress_of(now: Now, run: RunView) -> Iterator[tuple[object, str]]:
    yield (run.id, run.state, run.started_at), f"run {run.id} of track {run.track} is running"
    for stage in now.stages:
        if stage.state == "done" and stage.seconds is not None:
            yield (run.id, stage.step, stage.seconds), f"run {run.id}: {stage.step} took {duration(stage.seconds)}"
        if stage.state == "running":
            yield (run.id, *progress_mark(run)), f"run {run.id}: {run.progress.words if run.progress else stage.step}"


# --- the screen


class Screen:
    """The full-screen view of one moment; Rich renders it to the terminal's current size."""

    def __init__(self, now: Now, at: datetime) -> None:
        """Show the state `now`, which was read at time `at`."""
        self._now = now
        self._at = at

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the screen's lines, cut to the terminal's width and height."""
        height = options.height or console.height
        for line in _draw(self._now, self._at, options.max_width, height)[:height]:
            text = line if isinstance(line, Text) else Text(printable(line))
            text.no_wrap = True
            text.truncate(options.max_width, overflow="ellipsis")
            yield text


def _draw(now: Now, at: datetime, width: int, height: int) -> list[Text | str]:
    """Return the screen's lines for this width and height; no information is given by colour alone."""
    daemon = "running" if now.daemon.alive else "not running; start it: dropforge run"
    lines: list[Text | str] = [Text.assemble(("dropforge", "bold"), f"  daemon {daemon}  {at:%H:%M:%S}")]
    notes = [f"{whose}: {words}" for whose, words in now.troubles.items()]
    notes += [*map(_awaits, now.awaiting), *(one.words for one in now.paused)]
    if len(notes) > _MOST_NOTES:
        notes[_MOST_NOTES:] = [f"and {len(notes) - _MOST_NOTES} more: dropforge status"]
    lines += [Text(printable(f"! {words}"), "yellow") for words in notes]
    lines += ["", *_run(now, now.run, width)] if now.run is not None else ["", "nothing runs"]
    room = max(0, height - len(lines) - 4)
    shown = min(len(now.queue), max(room // 2, room - len(now.latest)), _MOST_QUEUED)
    queue = [(run, f"{run.state:<7}  {describe_run(run)}") for run in now.queue[:shown]]
    more = len(now.queue) - shown
    lines += ["", Text("queue", "bold"), *(_list(queue) or ["  nothing waits"])]
    lines += [f"  and {more} more: dropforge status"] if more else []
    latest = [(run, f"{clock(run.ended_at)}  {verdict_words(run)}") for run in now.latest]
    return [*lines, "", Text("latest", "bold"), *(_list(latest) or ["  no run has ended"])]


def _list(runs: Sequence[tuple[RunView, str]]) -> list[str]:
    """Return a line per run: its id, its track padded to a common width, and its text."""
    width = max((cell_len(run.track) for run, _ in runs), default=0)
    return [f"  {run.id:>5}  {set_cell_size(run.track, width)}  {words}" for run, words in runs]


def _run(now: Now, run: RunView, width: int) -> Iterator[Text | str]:
    began = f"began {clock(run.started_at)}" if run.started_at else ""
    what = run.trial or ("to be cancelled" if run.cancel_requested else "")
    yield Text(printable("  ".join(filter(None, (f"run {run.id}  track {run.track}", began, what)))), "bold")
    styles = {"done": "green", "running": "bold cyan", "to do": "dim"}
    yield Text("  ").join(
        Text(" ".join(filter(None, (_MARKS[one.state], one.step, duration(one.seconds)))), styles[one.state])
        for one in now.stages
    )
    if run.progress is not None:
        measured = run.progress.model_copy(update={"step": "", "phase": "", "total": 0, "eta_seconds": None})
        numbers = measured.words.lstrip(", ").replace(", ", "   ")
        yield from ("", _bar(run.progress, width))
        if numbers:
            yield numbers
    if now.curve is not None and now.curve.loss:
        yield from ("", *_curves(now.curve, width))


def _bar(progress: Progress, width: int) -> Text:
    """Return a line with the step's name, a progress bar and numbers; the name alone if the total is unknown."""
    name = printable(progress.step if progress.phase == progress.step else f"{progress.step} {progress.phase}".strip())
    if not progress.total:
        return Text(name)
    share = min(1.0, progress.done / progress.total)
    left = f"  {duration(progress.eta_seconds)} left" if progress.eta_seconds is not None else ""
    numbers = f"{progress.done:,}/{progress.total:,}  {share:4.0%}{left}"
    room = max(4, width - cell_len(name) - len(numbers) - 4)
    full = round(share * room)
    return Text.assemble(name, "  ", ("━" * full, "cyan"), ("─" * (room - full), "dim"), "  ", numbers)


def _curves(curve: Curve, width: int) -> Iterator[str]:
    """Yield a sparkline of the training loss and one of the dev loss, both on the same axes."""
    points = [*curve.loss, *curve.dev]
    low, high = min(one.loss for one in points), max(one.loss for one in points)
    room, last = max(8, width - _LABEL - _NUMBERS), max(one.step for one in points)
    for name, losses in (("loss", curve.loss), ("dev loss", curve.dev)):
        if losses:
            drawn = "".join(_blocks(losses, low, high, [math.ceil((one + 1) * last / room) for one in range(room)]))
            yield f"{name:<{_LABEL}}{drawn}  {losses[0].loss:.3f} → {losses[-1].loss:.3f}"


def _blocks(losses: Sequence[CurvePoint], low: float, high: float, steps: Sequence[int]) -> Iterator[str]:
    """Yield a block character per step: the latest loss, scaled to `low`..`high`; a space before the first loss."""
    for step in steps:
        known = bisect_right(losses, step, key=lambda one: one.step)
        height = (losses[known - 1].loss - low) / ((high - low) or 1.0)
        yield _BLOCKS[round(height * (len(_BLOCKS) - 1))] if known else " "
