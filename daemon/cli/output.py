"""How every command prints: plain lines, tables, JSON objects, and the words that several of them share."""

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions
from rich.table import Table
from rich.text import Text

from daemon.views.drops import DropView
from daemon.views.overview import RunView
from pipeline.artifacts import Frozen
from pipeline.words import duration, printable, signed

SCHEMA = 1
#: Columns where no terminal sets an end: more than any verdict has, as all cells of a wider line would be clipped.
_WIDE = 100_000
#: Outcomes that are shorter, or plainer, in a list.
_VERDICTS = {"not_shown_better": "not better", "awaiting_approval": "won"}
#: Columns between those of a table; what is never cut; the least that is left of a longer one, and of the last.
_GAP, _SHORT, _LEAST, _BEYOND = 2, 20, 10, 30


def make_console() -> Console:
    """Return a console that colours and clips on a terminal only."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _WIDE)


def print_line(text: str = "") -> None:
    """Print one line at once; whatever a terminal must not see in it is escaped."""
    print(printable(text), flush=True)


def print_lines(lines: Iterable[str]) -> None:
    """Print each of `lines`."""
    for line in lines:
        print_line(line)


def print_older(number: int) -> None:
    """Print how many older rows a list left out, if any."""
    if number:
        print_line(f"{number:,} older ones: add --all")


def print_json(**fields: Any) -> None:
    """Print one JSON object with the version of our schema; whatever a terminal must not see in it is escaped."""
    text = json.dumps({"schema": SCHEMA, **fields}, default=_as_json, ensure_ascii=False, indent=2)
    # Only texts hold such characters, bidi controls among them and halves of one (a byte of a name that is no UTF-8).
    print("".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text))


def print_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """
    Print rows under their heads; the last column takes what is left of the line.

    On a terminal that is too narrow for the others, long names are cut, and lines rather become longer than it than
    that a number were: the next command asks for it.
    """
    console = make_console()
    cells = [[printable("" if cell is None else str(cell)) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(heads, *cells, strict=True)][:-1]
    kept = [width for width in widths if width <= _SHORT]
    taken, sharing = sum(kept) + _GAP * len(widths), len(widths) - len(kept) + 1
    share = max(_LEAST, (console.width - taken) // sharing)
    if console.width < taken + _LEAST * sharing:
        # The last column may have more of what is beyond the edge anyway, or its lines would be a tall, thin block. (A
        # width that is set by itself is ignored on a terminal that is called dumb.)
        console.size = ConsoleDimensions(taken + _LEAST * sharing + _BEYOND, console.height)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, head in enumerate(heads):
        last = place == len(heads) - 1
        table.add_column(
            head,
            no_wrap=not last or not console.is_terminal,
            overflow="fold" if last else "ellipsis",
            max_width=None if last or widths[place] <= _SHORT else share,
        )
    for row in cells:
        table.add_row(*map(Text, row))
    with console.capture() as capture:
        console.print(table)
    # Cells are padded to their column's width; nobody needs that at a line's end.
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _as_json(value: Frozen) -> dict[str, Any]:
    return value.model_dump(mode="json")


def local(time: datetime | None) -> str:
    """Return a time as people read it, in the machine's time zone."""
    return "" if time is None else f"{time.astimezone():%Y-%m-%d %H:%M:%S}"


def clock(time: datetime | None) -> str:
    """Return a time to the minute, as lists have it."""
    return "" if time is None else f"{time.astimezone():%Y-%m-%d %H:%M}"


def verdict_words(run: RunView) -> str:
    """Return what an ended run has come to as a list has it: a word, and the gain in points where there is one."""
    if run.outcome is None:
        return f"{run.state}: {run.error}" if run.error else run.state
    word = _VERDICTS.get(run.outcome, run.outcome.replace("_", " "))
    number = "" if run.gain is None else f" {signed(run.gain)}"
    if run.outcome == "guard_failed" and number:
        number = f", task{number}"
    # What its sentence says of general questions.
    warning = "".join((run.sentence or "").partition("; answers ")[1:])
    if run.blocker is not None:
        return f"won{number}, but {run.blocker}{warning}"
    waits = f"; waits: dropforge promote {run.id}" if run.outcome == "awaiting_approval" else ""
    return f"{word}{number}{waits}{warning}"


def drop_words(drop: DropView) -> str:
    """Return a drop's state as a person reads it; one that is on trial is accepted, and in no run but its own."""
    return "on trial" if drop.on_trial else drop.state


def waiting_words(drop: DropView) -> str:
    """Return why a drop waits for approval and the command that gives it; empty for any other drop."""
    return f"waits for a person: dropforge drops accept {drop.id}; {drop.reason}" if drop.state == "proposed" else ""


def until(time: datetime) -> str:
    """Return how long it is until `time`, in words."""
    seconds = (time - datetime.now(UTC)).total_seconds()
    return f"in {duration(seconds)}" if seconds >= 1 else "now"
