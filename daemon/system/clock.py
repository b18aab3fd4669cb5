"""The only module that reads the wall clock for database rows; other code is given the time as an argument."""

import time
from datetime import UTC, datetime


def now_ms() -> int:
    """Return the current time in whole milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def utc(milliseconds: int) -> datetime:
    """Convert a time in milliseconds since the epoch to an aware datetime in UTC."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
