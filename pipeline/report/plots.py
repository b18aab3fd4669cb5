"""
Coordinates of the evidence card's plots, which `templates/plots.html.jinja` draws as inline SVG.

An x is in per cent of the width and a y in pixels, so that a plot fills the page and its text stays readable.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.artifacts import Adapter, CurvePoint, Verdict
from pipeline.words import plain, tick, ticks

#: The loss curve's own area: left edge and width in per cent, top and height in pixels.
_LEFT, _WIDTH, _TOP, _HEIGHT = 11, 86, 12, 156


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
    """Return the ends of an axis that covers the values with a margin."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 1.0
    return low - room, high + room
