"""Output of all commands: plain lines, tables, JSON objects, and the phrases that several commands share."""

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from operator import methodcaller
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions
from rich.table import Table
from rich.text import Text

from daemon.views.drops import DropView
from pipeline.data_words import proposed_words
from pipeline.words import printable

SCHEMA = 1
#: Width in columns if stdout is no terminal: more than any verdict needs, since wider lines would be clipped.
_WIDE = 100_000
#: In characters: gap between columns; widest column that is never cut; least width of a wider one; extra for the last.
_GAP, _SHORT, _LEAST, _BEYOND = 2, 20, 10, 30


def make_console() -> Console:
    """Return a Rich console for stdout without markup or highlighting, 100,000 columns wide if that is no terminal."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _WIDE)


def print_line(text: str = "") -> None:
    """Print one line and flush it; unprintable characters, such as newlines, are escaped."""
    print(printable(text), flush=True)


def print_lines(lines: Iterable[str]) -> None:
    """Print each line as `print_line` does."""
    for line in lines:
        print_line(line)


def print_json(**fields: Any) -> None:
    """Print `fields`, values or models, and their version `schema` as one JSON object; unprintable text is escaped."""
    text = json.dumps(
        {"schema": SCHEMA, **fields}, default=methodcaller("model_dump", mode="json"), ensure_ascii=False, indent=2
    )
    # Only strings hold unprintable characters, such as bidi controls and lone surrogates (bytes that are not UTF-8).
    print("".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text))


def print_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """
    Print rows as a table under `heads`, which are printed without rows, too; `None` is an empty cell.

    The last column takes the remaining width, and wraps on a terminal. There other columns of more than 20 characters
    are cut to fit; narrower ones, such as numbers, never are, since the next command needs them: lines then become
    longer than the terminal is wide.
    """
    console = make_console()
    cells = [[printable("" if cell is None else str(cell)) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(heads, *cells, strict=True)][:-1]
    kept = [width for width in widths if width <= _SHORT]
    taken, sharing = sum(kept) + _GAP * len(widths), len(widths) - len(kept) + 1
    share = max(_LEAST, (console.width - taken) // sharing)
    if console.width < taken + _LEAST * sharing:
        # Lines exceed the terminal anyway: a wider last column avoids a tall, thin block. (Rich ignores a width that is
        # set without a height on a dumb terminal.)
        console.size = ConsoleDimensions(taken + _LEAST * sharing + _BEYOND, console.height)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head, width in zip(heads, widths, strict=False):
        table.add_column(head, no_wrap=True, overflow="ellipsis", max_width=None if width <= _SHORT else share)
    table.add_column(heads[-1], no_wrap=not console.is_terminal, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    with console.capture() as capture:
        console.print(table)
    # Cells are padded to their column's width; nobody needs that at a line's end.
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def clock(time: datetime | None) -> str:
    """Format a time as YYYY-MM-DD HH:MM in the machine's time zone; `None` as an empty string."""
    return "" if time is None else f"{time.astimezone():%Y-%m-%d %H:%M}"


def drop_words(drop: DropView) -> str:
    """Return "on trial" for a drop on trial, for any other drop its state."""
    return "on trial" if drop.on_trial else drop.state


def answers_words(drop: DropView) -> str:
    """Return how many new answers a drop brings, and the command that accepts them; empty if it brings none."""
    if not drop.new_answers:
        return ""
    return f"{proposed_words(drop.new_answers)}, not used until: dropforge drops accept {drop.id} --answers"


def waiting_words(drop: DropView) -> str:
    """Return that a proposed drop waits, the command that accepts it, and why it waits; empty for any other drop."""
    return f"waits for a person: dropforge drops accept {drop.id}; {drop.reason}" if drop.state == "proposed" else ""
