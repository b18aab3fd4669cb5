"""
What `watch` shows: one full screen, drawn anew each second from `daemon.views.now`.

It says nothing by colour alone. What does not fit the terminal is cut at the right, or counted.
"""

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import chain

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from daemon.cli.output import clock, verdict_words
from daemon.cli.status import describe_run
from daemon.views.now import Now, Stage
from daemon.views.overview import RunView
from pipeline.artifacts import CurvePoint
from pipeline.contract import Curve, Progress
from pipeline.words import duration, printable

_MARKS = {"done": "✓", "running": "▶", "to do": "·"}
_BLOCKS = " ▁▂▃▄▅▆▇█"
_TALL = 36
"""Lines of a terminal from which on the curves have several lines each."""
_TALL_ROWS, _LABEL, _NUMBERS = 5, 9, 18
_MOST_NOTES = 3
_MOST_QUEUED = 8


class Screen:
    """One look at what goes on, as rich draws it into the size that the terminal has then."""

    def __init__(self, now: Now, at: datetime) -> None:
        """Show `now`, which was looked at at `at`."""
        self._now = now
        self._at = at

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines, none wider and not more than the terminal has."""
        height = options.height or console.height
        for line in draw(self._now, self._at, options.max_width, height)[:height]:
            line.no_wrap = True
            line.truncate(options.max_width, overflow="ellipsis")
            yield line


def draw(now: Now, at: datetime, width: int, height: int) -> list[Text]:
    """Return the screen's lines for a terminal of so many columns and lines."""
    daemon = "running" if now.daemon.alive else "not running; start it: dropforge run"
    lines: list[Text | str] = [
        _ends(Text.assemble(("dropforge", "bold"), f"  daemon {daemon}"), f"{at:%H:%M:%S}", width)
    ]
    lines += _notes(now)
    lines += ["", *_run(now, width, height)] if now.run is not None else ["", "nothing runs"]
    room = max(0, height - len(lines) - 4)
    shown = min(len(now.queue), max(room // 2, room - len(now.latest)), _MOST_QUEUED)
    lines += ["", Text("queue", "bold"), *_queue(now.queue, shown)]
    lines += ["", Text("latest", "bold"), *_latest(now.latest, height - len(lines) - 2)]
    return [line if isinstance(line, Text) else Text(line) for line in lines]


def _notes(now: Now) -> list[Text]:
    """Return what a person should look at, a few lines."""
    notes = [f"{whose}: {words}" for whose, words in now.troubles.items()]
    notes += [f"run {run.id} of track {run.track} won, waits: dropforge promote {run.id}" for run in now.awaiting]
    notes += [one.words for one in now.paused]
    more = [f"and {len(notes) - _MOST_NOTES} more: dropforge status"] if len(notes) > _MOST_NOTES else []
    return [Text(printable(f"! {words}"), "yellow") for words in (*notes[:_MOST_NOTES], *more)]


def _run(now: Now, width: int, height: int) -> list[Text | str]:
    run = now.run
    assert run is not None  # noqa: S101 - asked by the caller, for the type checker
    began = f"began {clock(run.started_at)}" if run.started_at else ""
    what = run.trial or ("to be cancelled" if run.cancel_requested else "")
    head = "  ".join(filter(None, (f"run {run.id}  track {run.track}", began, printable(what))))
    lines: list[Text | str] = [Text(head, "bold"), strip(now.stages, width)]
    if run.progress is not None:
        lines += ["", _bar(run.progress, width), *filter(None, [printable(_numbers(run.progress))])]
    if run.again:
        lines.append(printable(run.again))
    if now.curve is not None and now.curve.loss:
        lines += ["", *curves(now.curve, width, _TALL_ROWS if height >= _TALL else 1)]
    return lines


def strip(stages: Sequence[Stage], width: int) -> Text:
    """Return the run's steps in one line, each with a mark; how long each took is left out where there is no room."""
    named = [f"{_MARKS[one.state]} {one.step}" for one in stages]
    timed = [
        f"{name} {duration(one.seconds)}" if one.seconds is not None else name
        for name, one in zip(named, stages, strict=True)
    ]
    words = timed if sum(map(len, timed)) + 2 * len(timed) <= width else named
    styles = {"done": "green", "running": "bold cyan", "to do": "dim"}
    parts = [(word, styles[one.state]) for word, one in zip(words, stages, strict=True)]
    return Text("  ").join(Text(*part) for part in parts)


def _bar(progress: Progress, width: int) -> Text:
    """Return how far the step is, as a bar between its name and the numbers."""
    phase = "" if progress.phase == progress.step else f" {progress.phase}"
    name = printable(f"{progress.step}{phase}")
    if not progress.total:
        return Text(name)
    share = min(1.0, progress.done / progress.total)
    left = f"  {duration(progress.eta_seconds)} left" if progress.eta_seconds is not None else ""
    numbers = f"{progress.done:,}/{progress.total:,}  {share:4.0%}{left}"
    room = max(4, width - cell_len(name) - len(numbers) - 4)
    full = round(share * room)
    return Text.assemble(name, "  ", ("━" * full, "cyan"), ("─" * (room - full), "dim"), "  ", numbers)


def _numbers(progress: Progress) -> str:
    """Return loss, dev loss, speed and memory."""
    measured = progress.model_copy(update={"step": "", "phase": "", "total": 0, "eta_seconds": None})
    return measured.words.lstrip(", ").replace(", ", "   ")


def curves(curve: Curve, width: int, rows: int) -> list[Text]:
    """
    Return the two losses, each `rows` lines high, over the same steps and on the same scale, so that they compare.

    A loss of training is drawn at its steps, the dev loss from each measurement to the next. The scale begins at the
    lowest of both.
    """
    points = [*curve.loss, *curve.dev]
    low, high = min(one.loss for one in points), max(one.loss for one in points)
    last = max(one.step for one in points)
    room = max(8, width - _LABEL - _NUMBERS)
    lines = []
    for name, losses in (("loss", curve.loss), ("dev loss", curve.dev)):
        if not losses:
            continue
        drawn = spark(_columns(losses, room, last), low, high, rows)
        numbers = f"{losses[0].loss:.3f} → {losses[-1].loss:.3f}"
        for place, line in enumerate(drawn):
            first, end = (name, numbers) if place == rows - 1 else ("", "")
            lines.append(Text(f"{first:<{_LABEL}}{line}  {end}"))
    return lines


def _columns(losses: Sequence[CurvePoint], room: int, last: int) -> list[float | None]:
    """Return a loss for each of `room` columns: that of the latest point before the column's last step."""
    found: list[float | None] = []
    place = -1
    for column in range(room):
        reaches = math.ceil((column + 1) * last / room)
        while place + 1 < len(losses) and losses[place + 1].step <= reaches:
            place += 1
        found.append(losses[place].loss if place >= 0 else None)
    return found


def spark(values: Sequence[float | None], low: float, high: float, rows: int) -> list[str]:
    """Return values as columns of blocks, `rows` lines high, from `low` to `high`; one that is `None` is left empty."""
    steps = rows * (len(_BLOCKS) - 1)
    span = (high - low) or 1.0
    heights = [0 if value is None else 1 + round((value - low) / span * (steps - 1)) for value in values]
    return [
        "".join(_BLOCKS[max(0, min(len(_BLOCKS) - 1, height - row * (len(_BLOCKS) - 1)))] for height in heights)
        for row in reversed(range(rows))
    ]


def _queue(queue: Sequence[RunView], most: int) -> Iterable[str]:
    if not queue:
        return ["  nothing waits"]
    width = max(cell_len(run.track) for run in queue)
    shown = queue[:most]
    lines = [f"  {run.id:>5}  {_padded(run.track, width)}  {run.state:<7}  {describe_run(run)}" for run in shown]
    more = [f"  and {len(queue) - len(shown)} more: dropforge status"] if len(queue) > len(shown) else []
    return map(printable, chain(lines, more))


def _latest(latest: Sequence[RunView], most: int) -> Iterable[str]:
    if not latest:
        return ["  no run has ended"]
    width = max(cell_len(run.track) for run in latest)
    lines = [
        f"  {run.id:>5}  {_padded(run.track, width)}  {clock(run.ended_at)}  {verdict_words(run)}"
        for run in latest[: max(1, most)]
    ]
    return map(printable, lines)


def _padded(text: str, width: int) -> str:
    return set_cell_size(text, width)


def _ends(left: Text, right: str, width: int) -> Text:
    """Return two texts at both ends of a line."""
    gap = max(2, width - left.cell_len - len(right))
    return Text.assemble(left, " " * gap, right)
