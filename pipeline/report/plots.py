"""
Where everything lies in the evidence card's pictures; `templates/plots.html.jinja` draws them as inline SVG.

Places are per cents of the width and pixels of the height: a picture is as wide as the page lets it, and its words stay
readable.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.artifacts import Adapter, CurvePoint, GuardResult, SliceResult, Verdict
from pipeline.report.facts import harm_share
from pipeline.words import plain, tick, ticks

_MOST_POINTS = 400
#: The loss curve's own area: left edge and width in per cent, top and height in pixels.
_LEFT, _WIDTH, _TOP, _HEIGHT = 11, 86, 12, 156


@dataclass(frozen=True)
class Axis:
    """The scale from values to per cents of the width; values outside stay at the edge."""

    low: float
    high: float
    left: float = 4.0
    right: float = 96.0

    def place(self, value: float) -> float:
        """Return where a value lies, in per cent."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.left + (self.right - self.left) * min(1.0, max(0.0, share))

    def __call__(self, value: float) -> str:
        """Return where a value lies, as SVG has it."""
        return f"{self.place(value):.2f}%"

    def width(self, start: float, end: float) -> str:
        """Return how wide the way between two values is, as SVG has it."""
        return f"{self.place(end) - self.place(start):.2f}%"

    def ticks(self, most: int = 6) -> list[float]:
        """Return the round values that are named beneath the axis."""
        return ticks(self.low, self.high, most)


@dataclass(frozen=True)
class Bar:
    """A bar from left to right."""

    kind: str
    x: str
    width: str
    words: str = ""


@dataclass(frozen=True)
class Chart:
    """A picture with lines across that are named on the left, and names beneath."""

    description: str
    caption: str
    rungs: tuple[tuple[str, str], ...]
    """Of each line across its height and its name."""
    names: tuple[tuple[str, str], ...]
    """What stands beneath: the place of each name, and the name."""
    lines: tuple[tuple[str, str], ...] = ()
    """The kind and the points of each curve."""
    dots: tuple[tuple[str, str, str], ...] = ()
    """The kind and the place of each curve of one point."""


def gain_axis(verdict: Verdict, min_gain: float) -> Axis | None:
    """Return the axis of the gain, its interval, what promotes and what this set can show; `None` without a gain."""
    if verdict.gain is None or verdict.interval is None:
        return None
    seen = verdict.smallest_detectable_gain
    values = [0.0, min_gain, *verdict.interval, verdict.gain, *([] if seen is None else [seen])]
    return Axis(*_padded(values))


def flip_bars(verdict: Verdict) -> list[Bar]:
    """Return a bar each for the records that the candidate answered better, equally and worse."""
    parts = (("good", verdict.wins, "better"), ("same", verdict.ties, "equal"), ("bad", verdict.losses, "worse"))
    total = sum(number for _, number, _ in parts)
    bars, start = [], 0
    for kind, number, word in parts if total else ():
        x, width = f"{100 * start / total:.2f}%", f"{100 * number / total:.2f}%"
        bars.append(Bar(kind, x, width, f"{number:,} {word}"))
        start += number
    return bars


def slice_axis(slices: Sequence[SliceResult]) -> Axis:
    """Return one axis for all slices, in points, as far on both sides of no change."""
    values = [value for one in slices for value in (one.gain, *(one.interval or ()))]
    reach = 1.05 * (max((abs(value) for value in values), default=1.0) or 1.0)
    return Axis(-reach, reach)


#: No change in the middle of the bar, the margin to the right of it.
GUARD_AXIS = Axis(-1.0, 1.5)


def guard_bar(guard: GuardResult) -> Bar | None:
    """Return what a guard measured, held against its margin."""
    share = harm_share(guard)
    if share is None:
        return None
    start, end = sorted((GUARD_AXIS.place(0), GUARD_AXIS.place(share)))
    kind = "bad" if guard.state == "failed" else "good" if share <= 1 else "warn"
    words = f"{plain(100 * share, 0)} % of the harm that is let pass"
    return Bar(kind, f"{start:.2f}%", f"{max(end - start, 0.6):.2f}%", words)


@dataclass(frozen=True)
class Curve:
    """One line of a picture of losses."""

    kind: str
    """Its class in the style sheet."""
    name: str
    points: Sequence[CurvePoint]


def loss_chart(adapter: Adapter) -> Chart | None:
    """Return the loss curves of training and, where there is one, of the dev set."""
    train, dev = adapter.loss_curve, adapter.dev_curve
    if len(train) < 2:  # noqa: PLR2004 - a line has two ends
        return None
    return curves_chart(
        [Curve("trained", "training loss", train), Curve("dev", "dev loss", dev)], _loss_caption(adapter)
    )


def curves_chart(curves: Sequence[Curve], caption: str) -> Chart | None:
    """Return curves over each other, on one scale; `None` without a point."""
    curves = [curve for curve in curves if curve.points]
    points = [point for curve in curves for point in curve.points]
    if not points:
        return None
    first, last = min(point.step for point in points), max(point.step for point in points)
    low, high = _padded([point.loss for point in points])
    across, down = Axis(first, last, 0.0, 100.0), Axis(-high, -low, 0.0, 100.0)

    def x(step: float) -> str:
        return f"{_LEFT + _WIDTH / 100 * across.place(step):.2f}%"

    def y(loss: float) -> str:
        return f"{_TOP + _HEIGHT / 100 * down.place(-loss):.1f}"

    steps = across.ticks(5) if first < last else []
    return Chart(
        description=", ".join(
            f"{curve.name} from {plain(curve.points[0].loss, 2)} to {plain(curve.points[-1].loss, 2)}"
            for curve in curves
        ),
        caption=caption,
        rungs=tuple((y(value), tick(value)) for value in ticks(low, high, most=4)),
        names=tuple((x(value), tick(value)) for value in steps if value == int(value)),
        lines=tuple(
            (
                curve.kind,
                " ".join(f"{across.place(p.step):.2f},{down.place(-p.loss):.2f}" for p in _thinned(curve.points)),
            )
            for curve in curves
            if len(curve.points) > 1
        ),
        dots=tuple(
            (curve.kind, x(curve.points[0].step), y(curve.points[0].loss)) for curve in curves if len(curve.points) == 1
        ),
    )


def _loss_caption(adapter: Adapter) -> str:
    first, last = adapter.loss_curve[0], adapter.loss_curve[-1]
    words = f"From {plain(first.loss, 2)} at step {first.step:,} to {plain(last.loss, 2)} at step {last.step:,}"
    if adapter.dev_curve:
        best = min(adapter.dev_curve, key=lambda point: point.loss)
        words += f"; dev loss {plain(adapter.dev_curve[-1].loss, 2)} at the end"
        lowest = f", {plain(best.loss, 2)} at its lowest, at step {best.step:,}: the model has the last step's weights"
        words += lowest if best.step < last.step else ""
    return words + ". Nats a token."


def _padded(values: Iterable[float]) -> tuple[float, float]:
    """Return the ends of an axis with some room beyond the values."""
    known = list(values)
    low, high = min(known), max(known)
    room = 0.08 * (high - low) or 1.0
    return low - room, high + room


def _thinned(curve: Sequence[CurvePoint]) -> list[CurvePoint]:
    """Return at most about 400 points of a curve, its last one among them."""
    every = -(-len(curve) // _MOST_POINTS)
    kept = list(curve[::every])
    return kept if kept[-1] == curve[-1] else [*kept, curve[-1]]
