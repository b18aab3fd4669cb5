"""
The evidence card's tables as data, which `templates/parts.html.jinja` draws, and coordinates of its plots.

`templates/plots.html.jinja` draws the plots as inline SVG. An x is in per cent of the width and a y in pixels, so that
a plot fills the page and its text stays readable.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.artifacts import Adapter, AnswerPair, CurvePoint, Evaluation, GuardResult, Overlap, SliceResult, Verdict
from pipeline.decide.explain import change_words, digits, margin_words
from pipeline.decide.policy import GUARDS, label
from pipeline.report.facts import Report
from pipeline.search_settings import settings_words
from pipeline.words import duration, plain, signed, span, tick, ticks

#: In the order in which they are listed.
_GUARD_STATES = {"failed": "✗ failed", "passed": "✓ passed", "shown": "shown only"}
_RULES = {
    "unit": "the same document or group",
    "answer": "the same long answer",
    "ngram": "13 words in a row in common",
    "shingles": "most 3-word sequences in common",
}
#: The loss curve's own area: left edge and width in per cent, top and height in pixels.
_LEFT, _WIDTH, _TOP, _HEIGHT = 11, 86, 12, 156


@dataclass(frozen=True)
class Cell:
    """One cell: a text, with a smaller text below it."""

    text: str = ""
    kind: str = ""
    """CSS class of the text."""
    small: str = ""


#: A cell that is a text alone is written as such; `None` is an empty one.
Row = Sequence[Cell | str | None]


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows."""

    caption: str
    heads: tuple[str, ...]
    """The head of each column; one with a # in front is of numbers, aligned to the right."""
    rows: tuple[tuple[Cell, ...], ...]


def _table(caption: str, heads: Sequence[str], rows: Sequence[Row]) -> Table:
    """Return a table without the columns that are empty in every row; without rows it has no columns."""
    cells = [[cell if isinstance(cell, Cell) else Cell(cell or "") for cell in row] for row in rows]
    kept = [index for index in range(len(heads)) if any(row[index] != Cell() for row in cells)]
    rows_kept = tuple(tuple(row[index] for index in kept) for row in cells)
    return Table(caption, tuple(heads[index] for index in kept), rows_kept)


def _plain(value: float | None, places: int = 1) -> str | None:
    return None if value is None else plain(value, places)


def guards_table(verdict: Verdict, settled: Sequence[GuardResult] = ()) -> Table:
    """Return the table of guards, or of those by which a control `settled` its trial: failed, passed, then shown."""
    groups = "#Records" if verdict.groups == verdict.records else "#Groups"
    models = ("#Champion, control", "#Trial, run") if settled else ("#Champion", "#New model")
    heads = ("Guard", *models, "#Change", "#Limit", groups, "State")
    note = "A guard fails on harm that is shown beyond chance; most must be beyond their limit, too."
    guards = sorted(settled or verdict.guards, key=lambda guard: [*_GUARD_STATES].index(guard.state))
    return _table(note, heads, [_guard_row(guard) for guard in guards])


def _guard_row(guard: GuardResult) -> Row:
    places = digits(guard)
    bound = f"at best {signed(guard.bound, places)}" if guard.bound is not None and guard.state == "failed" else ""
    base = GUARDS[guard.guard].compared_with if guard.champion is not None else ""
    return (
        label(guard),
        Cell(_plain(guard.champion, places) or "", small=base),
        _plain(guard.candidate, places),
        Cell(change_words(guard), small=bound),
        margin_words(guard),
        None if guard.records is None else f"{guard.records:,}",
        Cell(_GUARD_STATES[guard.state], f"state {guard.state}"),
    )


def slices_table(slices: Sequence[SliceResult]) -> Table:
    """Return the table of slices in their order, with scores, gain and its interval in points."""
    heads = ("Records of", "#Records", "#Champion", "#New model", "#Gain", "#Interval")
    rows = [
        (
            part.label,
            f"{part.records:,}",
            plain(part.champion),
            plain(part.candidate),
            signed(part.gain),
            span(part.interval) if part.interval else None,
        )
        for part in slices
    ]
    return _table("Points of the primary metric", heads, rows)


def drops_table(report: Report) -> Table:
    """Return the table of the drops in the run's snapshot."""
    roles = {"train": "training and held-out", "heldout": "held-out"}
    rows = [
        (drop.name, str(drop.id), roles[drop.role], f"{drop.rows:,}", f"{drop.records:,}", Cell(drop.sha256, "code"))
        for drop in report.drops
    ]
    return _table("What was dropped", ("File", "#Drop", "Used for", "#Rows", "#Records", "sha256"), rows)


def overlaps_table(overlaps: Sequence[Overlap]) -> Table:
    """Return the table of example training rows that were left out because of a held-out record."""
    rows = [(overlap.train_text, overlap.heldout_text, _RULES[overlap.rule]) for overlap in overlaps]
    return _table("Beginnings of both texts", ("Training record", "Held-out record", "In common"), rows)


def pairs_table(pairs: Sequence[AnswerPair], used: str = "") -> Table:
    """Return the table of older answers, marked by `used`, and newer ones to the same prompts, or to similar ones."""
    heads = ("Prompt", "#Drop", f"Old answer{used}", "Similar prompt", "#Drop", "New answer")
    rows = [
        (
            pair.old_prompt,
            str(pair.old_drop),
            Cell(pair.old_answer, "wide"),
            Cell(pair.new_prompt, "wide" if pair.new_prompt else ""),
            str(pair.new_drop),
            Cell(pair.new_answer, "wide"),
        )
        for pair in pairs
    ]
    return _table("Beginnings of the texts", heads, rows)


def trials_table(adapter: Adapter) -> Table:
    """Return the table of a search's trials, in the order in which they ran; without rows if there was no search."""
    heads = ("#Trial", "Tried", "#Dev loss", "#Time", "What became of it")
    rows = [
        (
            str(trial.number),
            settings_words(trial.settings),
            _plain(trial.dev_loss, 3),
            duration(trial.seconds),
            ": ".join(filter(None, ("✓ chosen" if trial.chosen else trial.outcome, trial.why))),
        )
        for trial in adapter.candidates
    ]
    return _table("Chosen by the lowest dev loss, and never by a held-out record", heads, rows)


def scores_table(evaluation: Evaluation) -> Table:
    """Return the table of all measures that either model has, with their changes, the primary metric first."""
    rows: list[Row] = []
    for name, old, new, places in _measured(evaluation):
        change = None if old is None or new is None else signed(new - old, places)
        if (old, new) != (None, None):
            rows.append((name, _plain(old, places), _plain(new, places), change))
    return _table("Means", ("Measured", "#Champion", "#New model", "#Change"), rows)


def _measured(evaluation: Evaluation) -> Iterator[tuple[str, float | None, float | None, int]]:
    """Yield each measure's name, the champion's value, the candidate's (`None` if not measured), and their decimals."""
    old, new = evaluation.champion, evaluation.candidate
    for name in sorted({*new.metrics, *old.metrics}, key=lambda name: (name != evaluation.metric, name)):
        yield name, old.metrics.get(name), new.metrics.get(name), 1
    yield "likelihood (nats per token, less is better)", old.nll, new.nll, 3
    for name in sorted({*new.rates, *old.rates}):
        yield f"{name} answers (per cent)", old.rates.get(name), new.rates.get(name), 1
    yield "tokens an answer", old.answer_tokens or None, new.answer_tokens or None, 1
    for suite in evaluation.suites:
        yield f"suite {suite.name} ({suite.records:,})", suite.champion, suite.candidate, 1


@dataclass(frozen=True)
class Axis:
    """The scale from values to per cents of the width; values outside are clamped to the edge."""

    low: float
    high: float
    left: float = 4.0
    right: float = 96.0

    def percent(self, value: float) -> float:
        """Return the x of a value in per cent of the width; values outside the axis are at `left` or `right`."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.left + (self.right - self.left) * min(1.0, max(0.0, share))

    def __call__(self, value: float) -> str:
        """Return the x of a value, see `percent`, as an SVG attribute: `12.50%`."""
        return f"{self.percent(value):.2f}%"

    def ticks(self) -> list[float]:
        """Return the round values, at most 7, to label below the axis; `low` must be below `high`."""
        return ticks(self.low, self.high, 6)


@dataclass(frozen=True)
class Chart:
    """A line chart: horizontal grid lines with labels on the left, labels below, and curves."""

    description: str
    rungs: tuple[tuple[str, str], ...]
    """The y in pixels and the label of each horizontal line."""
    names: tuple[tuple[str, str], ...]
    """The x in per cent and the label of each tick below."""
    lines: tuple[tuple[str, str], ...]
    """CSS class and SVG points of each curve."""


def gain_axis(verdict: Verdict, min_gain: float) -> Axis | None:
    """Return an axis over 0, gain, interval, `min_gain` and smallest detectable gain; `None` if gain or interval is."""
    if verdict.gain is None or verdict.interval is None:
        return None
    seen = verdict.smallest_detectable_gain
    values = [0.0, min_gain, *verdict.interval, verdict.gain, *([] if seen is None else [seen])]
    return Axis(*_padded(values))


def curves_chart(curves: Sequence[tuple[str, str, Sequence[CurvePoint]]]) -> Chart | None:
    """Return a chart of the curves (CSS class, name, points) on the same scale; `None` if no curve has a point."""
    curves = [curve for curve in curves if curve[2]]
    points = [point for _, _, some in curves for point in some]
    if not points:
        return None
    first, last = min(point.step for point in points), max(point.step for point in points)
    low, high = _padded([point.loss for point in points])
    across, down = Axis(first, last, 0.0, 100.0), Axis(-high, -low, 0.0, 100.0)
    steps = ticks(first, last, 5) if first < last else []
    return Chart(
        description=", ".join(
            f"{name} from {plain(some[0].loss, 2)} to {plain(some[-1].loss, 2)}" for _, name, some in curves
        ),
        rungs=tuple(
            (f"{_TOP + _HEIGHT / 100 * down.percent(-value):.1f}", tick(value)) for value in ticks(low, high, most=4)
        ),
        names=tuple(
            (f"{_LEFT + _WIDTH / 100 * across.percent(value):.2f}%", tick(value))
            for value in steps
            if value == int(value)
        ),
        # A curve of one point is drawn as a line to itself with round ends.
        lines=tuple(
            (
                kind if len(some) > 1 else f"{kind} dot",
                " ".join(f"{across.percent(p.step):.2f},{down.percent(-p.loss):.2f}" for p in (*some, some[-1])),
            )
            for kind, _, some in curves
        ),
    )


def loss_caption(adapter: Adapter) -> str:
    """Describe a training's first and last loss (there must be some), and the last and lowest dev loss if measured."""
    first, last = adapter.loss_curve[0], adapter.loss_curve[-1]
    words = f"From {plain(first.loss, 2)} at step {first.step:,} to {plain(last.loss, 2)} at step {last.step:,}"
    if adapter.dev_curve:
        best = min(adapter.dev_curve, key=lambda point: point.loss)
        words += f"; dev loss {plain(adapter.dev_curve[-1].loss, 2)} at the end"
        lowest = f", {plain(best.loss, 2)} at its lowest, at step {best.step:,}: the model has the last step's weights"
        words += lowest if best.step < last.step else ""
    return words + ". Nats per token."


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 1.0
    return low - room, high + room
