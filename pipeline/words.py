"""Format numbers, durations, sizes and untrusted texts for people."""

import math
import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

_MINUTE, _HOUR = 60, 3600
_KILO = 1000
#: Smaller p-values are shown as a bound.
_TINY_P = 0.0001
_OFTEN_P = 0.2
_MOST_DIGITS = 12
#: Control characters that HTML must not contain (newline and tab are allowed), and bidirectional controls.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(value: float, digits: int = 1) -> str:
    """Format a number with `digits` decimals, thousands separators, a true minus sign and no negative zero."""
    rounded = round(value, digits) + 0.0
    return f"{rounded:,.{digits}f}".replace("-", "\u2212")


def signed(value: float, digits: int = 1) -> str:
    """Format a change as `plain` does, with a plus or minus sign; without a sign if it rounds to zero."""
    rounded = round(value, digits)
    return f"+{plain(rounded, digits)}" if rounded > 0 else plain(rounded, digits)


def count(number: int, noun: str, plural: str = "") -> str:
    """Format a count with its noun, as `1 record` or `1,200 records`; `plural` is `noun` and an s by default."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def cut_start(text: str, most: int) -> str:
    """Return a text; of one with more than `most` characters, an ellipsis and the last `most`."""
    return text if len(text) <= most else f"…{text[-most:]}"


def listed(words: Sequence[str]) -> str:
    """Join words as `a`, `a and b` or `a, b and c`; empty for no words."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def first_of(words: Sequence[str], more: int = 0) -> str:
    """Join at most five words as `listed` does, and say how many more there are, `more` of them not in `words`."""
    more += len(words[5:])
    return listed([*words[:5], *([f"{more:,} more"] if more > 0 else [])])


def ignored_words(names: Sequence[str]) -> str:
    """Say which keys or columns are not used, as `ignored: id, url`; of more than 20 the first 20 and an ellipsis."""
    return f"ignored: {', '.join([*names[:20], *['…' for _ in names[20:21]]])}"


def span(interval: tuple[float, float]) -> str:
    """Format an interval, as `-1.2 to +3.4`."""
    return f"{signed(interval[0])} to {signed(interval[1])}"


def worth_words(points: float, half_width: float) -> str:
    """Format a drop's worth with half of its interval's width, as `+1.8 points ±1.2 of these two models`."""
    return f"{signed(points)} points ±{plain(half_width)} of these two models"


def size_words(octets: int) -> str:
    """Format a number of bytes in decimal units, as 276 MB or 1.2 GB."""
    value = float(octets)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < _KILO:
            return f"{value:.0f} {unit}" if value >= 10 or unit == "bytes" else f"{value:.1f} {unit}"  # noqa: PLR2004
        value /= _KILO
    return f"{value:.1f} TB"


def p_words(value: float, limit: float) -> str:
    """Format a p-value, as `p = 0.0120`, with enough digits to distinguish it from `limit`; or `p < 0.0001`."""
    if value < _TINY_P:
        return "p < 0.0001"
    return f"p = {distinct(value, limit, 4 if value < 0.1 else 2)}"  # noqa: PLR2004 - further digits say nothing


def distinct(value: float, limit: float, digits: int = 2) -> str:
    """Format a number with `digits` decimals, or as many as distinguish it from `limit`: 0.996, not 1.00, from 1."""
    while value != limit and round(value, digits) == round(limit, digits) and digits < _MOST_DIGITS:
        digits += 1
    return f"{value:.{digits}f}"


def luck(value: float) -> str:
    """Describe a one-sided p-value as a frequency: `about once in 100 times`, above 0.2 as `25 times in 100`."""
    if value < _TINY_P:
        return "less than once in 10,000 times"
    if value > _OFTEN_P:
        return f"{value * 100:.0f} times in 100"
    times = 1 / value
    step = 10 ** max(0, math.floor(math.log10(times)) - 1)
    return f"about once in {round(times / step) * step:,} times"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return at most `most` + 1 round, evenly spaced numbers in [`low`, `high`]; `low` must be below `high`."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 10) + 0.0 for index in range(first, last + 1)]


def tick(value: float) -> str:
    """Format an axis label with as few digits as possible, at most 10, thousands separators and a true minus sign."""
    return f"{value:,.10g}".replace("-", "\u2212")


def printable(text: str) -> str:
    """Escape unprintable characters in `text`, newlines and tabs included, as Python does: for a terminal or a log."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shell_path(path: str | Path) -> str:
    """Quote a path for a command in a message: one word to a shell, `printable`, and no option of the command."""
    text = printable(str(path))
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def show_controls(page: str) -> str:
    """Escape controls and surrogates that HTML forbids, and bidirectional controls, as Python does; CRLF becomes LF."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), page.replace("\r\n", "\n"))


def duration(seconds: float | None) -> str:
    """Format a duration in seconds: 48 s, 3 min 05 s, 2 h 10 min; empty for `None`."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE:02} s"
    return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE:02} min"


def local(time: datetime | None) -> str:
    """Format a time as YYYY-MM-DD HH:MM:SS in the machine's time zone; `None` as an empty string."""
    return "" if time is None else f"{time.astimezone():%Y-%m-%d %H:%M:%S}"


def until(time: datetime) -> str:
    """Format the duration until `time`, as `in 3 min 05 s`; empty if that is less than a second away or past."""
    seconds = (time - datetime.now(UTC)).total_seconds()
    return f"in {duration(seconds)}" if seconds >= 1 else ""


def short(model_id: str) -> str:
    """Return the first 12 characters of a model id, which are enough for people."""
    return model_id[:12]
