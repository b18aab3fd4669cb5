"""
The evidence card's pictures: inline SVG whose places are per cents and whose text is in pixels.

So a picture is as wide as the page lets it and its words stay readable. Each has a title and a description in words.
"""

from collections.abc import Callable, Iterable, Sequence

from pipeline.artifacts import CurvePoint, GuardResult, LengthBin, SliceResult, Verdict
from pipeline.report.facts import harm_share
from pipeline.report.markup import Child, Html, tag
from pipeline.wording import plain, signed, span, tick, ticks

#: Per cent of the width that the picture itself takes; the rest is room for what is written at its ends.
_LEFT, _RIGHT = 4.0, 96.0
_MOST_POINTS = 400
_GUARD_SCALE = (-1.0, 1.5)
Place = Callable[[float], float]


def scale(low: float, high: float, left: float = _LEFT, right: float = _RIGHT) -> Place:
    """Return the function from values to per cents of the width; values outside stay at the edge."""
    width = (high - low) or 1.0

    def place(value: float) -> float:
        return left + (right - left) * min(1.0, max(0.0, (value - low) / width))

    return place


def picture(title: str, description: str, height: int, *shapes: Child, class_: str = "") -> Html:
    """Return an SVG as wide as its surroundings."""
    return tag(
        "svg", tag("title", title), tag("desc", description), shapes,
        role="img", aria_label=f"{title}: {description}", width="100%", height=str(height), class_=class_ or None,
    )  # fmt: skip


def interval_picture(verdict: Verdict, min_gain: float) -> Html:
    """Return the gain with its interval beside no change, the least gain that promotes, and what the set can show."""
    if verdict.gain is None or verdict.interval is None:
        return Html("")
    low, high = verdict.interval
    seen = verdict.smallest_detectable_gain
    values = [0.0, min_gain, low, high, verdict.gain, *([] if seen is None else [seen])]
    least, most = _padded(min(values), max(values))
    at = scale(least, most)
    words = f"gain {signed(verdict.gain)} points, 98 % interval {span(verdict.interval)}; {signed(min_gain)} is needed"
    noise = None if verdict.noise is None else verdict.noise.points
    return picture(
        "Gain and its interval", words, 108,
        _band(at, -noise, noise, 22, 60) if noise else None,
        _axis(at, ticks(least, most), 84),
        _vertical(at(0), 18, 84, "zero"),
        _vertical(at(min_gain), 18, 84, "needed"),
        _vertical(at(seen), 18, 84, "seen") if seen is not None else None,
        _whisker(at, (low, high), verdict.gain, 52),
        _label(at(verdict.gain), 34, signed(verdict.gain), "strong"),
    )  # fmt: skip


def flips_picture(verdict: Verdict) -> Html:
    """Return a bar of the records that the candidate answered better, equally and worse."""
    total = verdict.wins + verdict.losses + verdict.ties
    if not total:
        return Html("")
    parts = (("good", verdict.wins), ("same", verdict.ties), ("bad", verdict.losses))
    shapes: list[Html] = []
    start = 0.0
    for kind, number in parts:
        width = 100 * number / total
        shapes.append(tag("rect", x=_percent(start), y="0", width=_percent(width), height="28", class_=kind))
        start += width
    words = f"{verdict.wins} better, {verdict.ties} equal, {verdict.losses} worse"
    return picture("Records by what became of them", words, 28, shapes, class_="bar")


def slice_scale(slices: Sequence[SliceResult]) -> tuple[float, float]:
    """Return the ends of one scale for all slices, in points, the same on both sides of no change."""
    values = [value for one in slices for value in (one.gain, *(one.interval or ()))]
    reach = max((abs(value) for value in values), default=1.0) or 1.0
    return -reach * 1.05, reach * 1.05


def slice_picture(one: SliceResult, ends: tuple[float, float]) -> Html:
    """Return one slice's gain and interval on the scale of all of them."""
    at = scale(*ends)
    words = f"gain {signed(one.gain)} points" + (f", interval {span(one.interval)}" if one.interval else "")
    shapes = [_vertical(at(0), 0, 24, "zero"), _whisker(at, one.interval, one.gain, 12)]
    return picture(one.label, words, 24, shapes, class_="row")


def axis_picture(ends: tuple[float, float], unit: str) -> Html:
    """Return the scale that rows of pictures share."""
    at = scale(*ends)
    words = f"from {signed(ends[0])} to {signed(ends[1])} {unit}"
    return picture("Scale", words, 30, _axis(at, ticks(*ends, most=4), 6), class_="row")


def guard_picture(guard: GuardResult) -> Html:
    """Return what a guard measured against its margin: no change in the middle, the margin to the right."""
    share = harm_share(guard)
    if share is None:
        return Html("")
    at = scale(*_GUARD_SCALE)
    start, end = sorted((at(0), at(share)))
    kind = "bad" if guard.state == "failed" else "good" if share <= 1 else "warn"
    words = f"{plain(100 * share, 0)} % of the harm that is let pass"
    return picture(
        guard.label, words, 24,
        tag("rect", x=_percent(start), y="7", width=_percent(max(end - start, 0.6)), height="10", class_=kind),
        _vertical(at(0), 2, 22, "zero"),
        _vertical(at(1), 2, 22, "limit"),
        class_="row",
    )  # fmt: skip


def curve_picture(train: Sequence[CurvePoint], dev: Sequence[CurvePoint]) -> Html:
    """Return the loss curves of training and, where there is one, of the dev set."""
    points = [*train, *dev]
    if len(train) < 2:  # noqa: PLR2004 - a line has two ends
        return Html("")
    steps = (min(point.step for point in points), max(point.step for point in points))
    low, high = _padded(min(point.loss for point in points), max(point.loss for point in points))
    words = f"training loss from {plain(train[0].loss, 2)} to {plain(train[-1].loss, 2)}"
    if dev:
        words += f", dev loss from {plain(dev[0].loss, 2)} to {plain(dev[-1].loss, 2)}"
    across = scale(*steps, left=0.0, right=100.0)
    down = _down(low, high)
    lines = [
        tag("polyline", points=_path(_thinned(curve), across, down), class_=kind, vector_effect="non-scaling-stroke")
        for kind, curve in (("trained", train), ("dev", dev))
        if len(curve) > 1
    ]
    dots = [_dot(11 + 0.86 * across(point.step), 12 + 1.56 * down(point.loss), "dev") for point in dev if len(dev) == 1]
    return picture(
        "Loss", words, 208,
        [_rung(12 + 1.56 * down(value), tick(value)) for value in ticks(low, high, most=4)],
        tag("svg", lines, x="11%", y="12", width="86%", height="156", viewBox="0 0 100 100",
            preserveAspectRatio="none", overflow="visible"),
        dots,
        [_label(11 + 0.86 * across(value), 188, tick(value), "quiet") for value in ticks(*steps, most=5)
         if value == int(value)] if steps[0] < steps[1] else None,
        _label(54, 202, "optimizer step", "quiet"),
    )  # fmt: skip


def lengths_picture(bins: Sequence[LengthBin]) -> Html:
    """Return the histogram of the training rows' lengths."""
    total = sum(one.rows for one in bins)
    if not total:
        return Html("")
    most = max(one.rows for one in bins)
    width = 86 / len(bins)
    bars = [
        tag("rect", x=_percent(11 + width * place + width * 0.06), width=_percent(width * 0.88),
            y=f"{150 - 138 * one.rows / most:.1f}", height=f"{138 * one.rows / most:.1f}", class_="plain")
        for place, one in enumerate(bins)
    ]  # fmt: skip
    every = max(1, -(-len(bins) // 5))
    named = [place for place in range(len(bins)) if (len(bins) - 1 - place) % every == 0]
    return picture(
        "Lengths of the training rows", f"{total} rows, none longer than {bins[-1].tokens} tokens", 190,
        [_rung(150 - 138 * value / most, tick(value)) for value in ticks(0, most, most=3) if value == int(value)],
        bars,
        [_label(11 + width * (place + 1), 168, f"{bins[place].tokens:,}", "quiet end") for place in named],
        _label(54, 184, "tokens, prompt and answer together", "quiet"),
    )  # fmt: skip


def swatch(kind: str) -> Html:
    """Return the sign of a line or a bar for a legend; the words beside it say what it is."""
    bar = kind in {"good", "same", "bad"}
    shape = (
        tag("rect", x="0", y="1", width="14", height="10", class_=kind)
        if bar
        else tag("line", x1="0", x2="20", y1="6", y2="6", class_=kind)
    )
    return tag("svg", shape, width="14" if bar else "20", height="12", class_="swatch", aria_hidden="true")


def _down(low: float, high: float) -> Place:
    up = scale(low, high, left=0.0, right=100.0)
    return lambda value: 100.0 - up(value)


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.08 * (high - low) or 1.0
    return low - room, high + room


def _percent(value: float) -> str:
    return f"{value:.2f}%"


def _vertical(place: float, top: int, bottom: int, kind: str) -> Html:
    return tag("line", x1=_percent(place), x2=_percent(place), y1=str(top), y2=str(bottom), class_=kind)


def _label(place: float, y: float, words: str, kind: str) -> Html:
    return tag("text", words, x=_percent(place), y=f"{y:.0f}", class_=kind)


def _axis(at: Place, values: Iterable[float], y: int) -> list[Html]:
    line = tag("line", x1=_percent(_LEFT), x2=_percent(_RIGHT), y1=str(y), y2=str(y), class_="axis")
    marks = [_vertical(at(value), y, y + 4, "axis") for value in values]
    names = [_label(at(value), y + 18, _signed_tick(value), "quiet") for value in values]
    return [line, *marks, *names]


def _signed_tick(value: float) -> str:
    return f"+{tick(value)}" if value > 0 else tick(value)


def _band(at: Place, low: float, high: float, top: int, height: int) -> Html:
    return tag("rect", x=_percent(at(low)), width=_percent(at(high) - at(low)), y=str(top), height=str(height),
               class_="noise")  # fmt: skip


def _whisker(at: Place, interval: tuple[float, float] | None, gain: float, y: int) -> list[Html]:
    ends = [] if interval is None else [at(value) for value in interval]
    shapes = [_vertical(end, y - 5, y + 5, "span") for end in ends]
    if ends:
        first, last = map(_percent, ends)
        shapes.append(tag("line", x1=first, x2=last, y1=str(y), y2=str(y), class_="span"))
    return [*shapes, _dot(at(gain), y, "gain")]


def _dot(place: float, y: float, kind: str) -> Html:
    return tag("circle", cx=_percent(place), cy=f"{y:.1f}", r="5", class_=kind)


def _rung(y: float, words: str) -> list[Html]:
    line = tag("line", x1="11%", x2="97%", y1=f"{y:.1f}", y2=f"{y:.1f}", class_="rung")
    return [line, tag("text", words, x="10%", y=f"{y + 4:.1f}", class_="quiet end")]


def _thinned(curve: Sequence[CurvePoint]) -> list[CurvePoint]:
    """Return at most about 400 points of a curve, its last one among them."""
    every = -(-len(curve) // _MOST_POINTS)
    kept = list(curve[::every])
    return kept if kept[-1] == curve[-1] else [*kept, curve[-1]]


def _path(curve: Iterable[CurvePoint], across: Place, down: Place) -> str:
    return " ".join(f"{across(point.step):.2f},{down(point.loss):.2f}" for point in curve)
