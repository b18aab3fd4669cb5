"""Shows a run while it happens: a bar a step on a terminal, a line a change elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column

from daemon.cli.output import make_console, print_line
from daemon.state.states import state_words
from daemon.views.overview import Overview, RunDetail
from pipeline import contract
from pipeline.steps import STEPS
from pipeline.words import duration, printable

#: The demo sets no judge.
_STEPS = tuple(step for step in STEPS if not step.network)
_PARTS = 4
"""Lines for a step that counts, where there is no terminal."""


def show_run(overview: Overview, run_id: int, wait: Callable[[Callable[[], Any]], Any]) -> RunDetail:
    """Show run `run_id` until it is over, and return it; `wait` asks again and again and minds the daemon."""
    view = _bars() if make_console().is_terminal else _lines()
    with view as show:

        def over() -> RunDetail | None:
            run = overview.run(run_id)
            show(run)
            return run if run.ended_at else None

        found: RunDetail = wait(over)
    return found


def _seconds(run: RunDetail, step: str) -> float | None:
    """Return how long the published attempt at a step took."""
    return next((one.seconds for one in run.attempts if one.step == step and one.state == "published"), None)


def _current(run: RunDetail) -> contract.Progress | None:
    """Return the progress of the attempt that goes on; between two attempts there is none."""
    going = any(one.state == "submitted" for one in run.attempts)
    return run.progress if going else None


@contextmanager
def _lines() -> Iterator[Callable[[RunDetail], None]]:
    """Print a line whenever something has changed that matters."""
    said: set[object] = set()

    def say(key: object, words: str) -> None:
        if key not in said:
            said.add(key)
            print_line(f"  {words}")

    def show(run: RunDetail) -> None:
        say(run.state, f"run {run.id} {state_words(run.state)}" + (f": {run.error}" if run.error else ""))
        for step in _STEPS:
            seconds = _seconds(run, step.name)
            if seconds is not None:
                say((step.name, "done"), f"{step.name} took {duration(seconds)}")
        progress = _current(run)
        if progress is not None and (progress.phase or progress.total):
            part = progress.done * _PARTS // progress.total if progress.total else 0
            say((progress.step, progress.phase, part), progress.words)

    yield show


@contextmanager
def _bars() -> Iterator[Callable[[RunDetail], None]]:
    """Draw a bar a step, with loss, speed and the time that is left."""
    columns = (
        TextColumn("  {task.description:<9}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[words]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    with Bars(*columns, console=make_console(), refresh_per_second=4) as bars:
        tasks = {step.name: bars.add_task(step.name, total=1, words="") for step in _STEPS}

        def show(run: RunDetail) -> None:
            for name, task in tasks.items():
                seconds = _seconds(run, name)
                if seconds is not None:
                    bars.update(task, total=1, completed=1, words=duration(seconds))
            _draw(bars, tasks, run)

        yield show


def _draw(bars: Bars, tasks: dict[str, Any], run: RunDetail) -> None:
    """Draw the step that goes on."""
    progress = _current(run)
    if progress is not None and progress.step in tasks:
        words = progress.words.removeprefix(progress.step).strip()
        task = tasks[progress.step]
        bars.update(task, total=progress.total or None, completed=progress.done, words=printable(words))
    elif run.error and run.step in tasks:
        bars.update(tasks[run.step], words=printable(run.error))
