"""How every command prints: plain lines, tables, JSON objects, and the one form of an error."""

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline.words import count, duration, printable, signed, span

if TYPE_CHECKING:
    from rich.console import Console

    from daemon.views.drop_lineage import DropView
    from daemon.views.overview import RunView
    from pipeline.artifacts import Frozen, Verdict
    from pipeline.report.facts import Story

SCHEMA = 1
#: Columns where no terminal sets an end: more than any verdict has, as all cells of a wider line would be clipped.
_WIDE = 100_000
#: Outcomes that are shorter, or plainer, in a list.
_VERDICTS = {"not_shown_better": "not better", "awaiting_approval": "won"}
#: Columns between those of a table; what is never cut; the least that is left of a longer one, and of the last.
_GAP, _SHORT, _LEAST, _BEYOND = 2, 20, 10, 30


def make_console(*, stderr: bool = False) -> "Console":
    """Return a console that colours and clips on a terminal only."""
    from rich.console import Console  # noqa: PLC0415 - a quick start

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, markup=False, width=None if stream.isatty() else _WIDE)


def print_line(text: str = "") -> None:
    """Print one line at once; whatever a terminal must not see in it is escaped."""
    print(printable(text), flush=True)


def print_older(number: int) -> None:
    """Print how many older rows a list left out, if any."""
    if number:
        print_line(f"{number:,} older ones: add --all")


def print_json(**fields: Any) -> None:
    """Print one JSON object with the version of our schema; a terminal must not see everything in it, either."""
    text = json.dumps({"schema": SCHEMA, **fields}, ensure_ascii=False, indent=2)
    # Only texts hold such characters, bidi controls among them and halves of one (a byte of a name that is no UTF-8).
    print("".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text))


def print_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """
    Print rows under their heads; the last column takes what is left of the line.

    On a terminal that is too narrow for the others, long names are cut, and lines rather become longer than it than
    that a number were: the next command asks for it.
    """
    from rich.cells import cell_len  # noqa: PLC0415 - a quick start
    from rich.console import ConsoleDimensions  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

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


def dump(views: "Iterable[Frozen]") -> list[dict[str, Any]]:
    """Return values as JSON has them."""
    return [view.model_dump(mode="json") for view in views]


def show_error(message: str, hint: str, code: int, *, as_json: bool) -> None:
    """Say on standard error what went wrong and what to do; with `as_json` also as an object on standard output."""
    print(f"error: {printable(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {printable(hint)}", file=sys.stderr)
    if as_json:
        print_json(error={"code": code, "message": message, "hint": hint})


def local(time: datetime | None) -> str:
    """Return a time as people read it, in the machine's time zone."""
    return "" if time is None else f"{time.astimezone():%Y-%m-%d %H:%M:%S}"


def clock(time: datetime | None) -> str:
    """Return a time to the minute, as lists have it."""
    return "" if time is None else f"{time.astimezone():%Y-%m-%d %H:%M}"


def verdict_words(run: "RunView") -> str:
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


def drop_words(drop: "DropView") -> str:
    """Return a drop's state as a person reads it; one that is on trial is accepted, and in no run but its own."""
    return "on trial" if drop.on_trial else drop.state


def waiting_words(drop: "DropView") -> str:
    """Return why a drop waits for approval and the command that gives it; empty for any other drop."""
    return f"waits for a person: dropforge drops accept {drop.id}; {drop.reason}" if drop.state == "proposed" else ""


def until(time: datetime) -> str:
    """Return how long it is until `time`, in words."""
    seconds = (time - datetime.now(UTC)).total_seconds()
    return f"in {duration(seconds)}" if seconds >= 1 else "now"


def verdict_lines(verdict: "Verdict", story: "Story | None") -> list[str]:
    """Return a verdict, why it is so and what to do, and the numbers that its story leaves out, a line each."""
    from pipeline.report.story import p_value_words  # noqa: PLC0415 - a quick start

    lines = [verdict.sentence]
    if story is None and verdict.yardstick is not None:
        lines.append(verdict.yardstick)
    if story is not None:
        lines += ["why:", *(f"  {words}" for words in story.why)]
        steps = [f"{one.words.rstrip('.')}: {one.command}" if one.command else one.words for one in story.next_steps]
        lines += ["what to do next:", *(f"  {words}" for words in steps)] if steps else []
    elif verdict.candidate_score is not None and verdict.champion_score is not None:
        lines.append(
            f"{verdict.metric} on {count(verdict.records, 'held-out record')}: "
            f"candidate {verdict.candidate_score:.1f}, champion {verdict.champion_score:.1f}"
        )
        between = f", 98 % interval {span(verdict.interval)}" if verdict.interval else ""
        lines.append(f"gain {signed(verdict.gain or 0.0)} points{between}")
        losses = count(verdict.losses, "loss", "losses")
        lines.append(f"{count(verdict.wins, 'win')}, {losses}, {count(verdict.ties, 'tie')}")
    if words := p_value_words(verdict):
        lines.append(words)
    if verdict.smallest_detectable_gain is not None:
        smallest = f"{verdict.smallest_detectable_gain:.1f} points"
        lines.append(f"smallest gain that is promoted in 8 of 10 cases: {smallest}")
    return [*lines, *_guard_lines(verdict, told=story is not None), *_slice_lines(verdict), *_trust_lines(verdict)]


def _guard_lines(verdict: "Verdict", *, told: bool) -> list[str]:
    """Return how many guards there were, and each that failed, unless that is `told` before, or nearly did."""
    from pipeline.decide.explain import guard_words  # noqa: PLC0415
    from pipeline.report.facts import is_nearly_failed  # noqa: PLC0415 - a quick start

    if not verdict.guards:
        return []
    failed = [guard for guard in verdict.guards if guard.state == "failed"]
    nearly = [guard for guard in verdict.guards if is_nearly_failed(guard)]
    lines = [f"guards: {len(failed)} of {len(verdict.guards)} failed"]
    lines += [] if told else [f"  failed: {guard_words(guard)}" for guard in failed]
    return lines + [f"  nearly failed: {guard_words(guard)}" for guard in nearly]


def _slice_lines(verdict: "Verdict") -> list[str]:
    """Return the gain on records of drops that the champion knows, and on those of new ones."""
    lines = []
    for one in verdict.slices:
        if one.kind in {"seen", "unseen"}:
            between = f", interval {span(one.interval)}" if one.interval else ""
            lines.append(f"{one.label}: gain {signed(one.gain)} points on {count(one.records, 'record')}{between}")
    return lines


def _trust_lines(verdict: "Verdict") -> list[str]:
    """Return how often the set was used, and the noise that no gain can be seen below."""
    lines = []
    if verdict.uses:
        same = f", {verdict.same_set_uses} of them on exactly these records" if verdict.same_set_uses else ""
        lines.append(f"candidates judged before on this track: {verdict.uses}{same}")
    if verdict.noise is not None:
        changed = f"{verdict.noise.changed} of {count(verdict.noise.records, 'answer')} changed"
        lines.append(f"noise of asking one model twice: {verdict.noise.points:.2f} points ({changed})")
    return lines
