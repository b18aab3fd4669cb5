"""The one place that reads the wall clock for rows; everything else is told the time."""

import time
from datetime import UTC, datetime


def now_ms() -> int:
    """Return the present in whole milliseconds since the epoch, UTC."""
    return time.time_ns() // 1_000_000


def utc(milliseconds: int) -> datetime:
    """Return a time of a row, in milliseconds since the epoch, as a datetime."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
