"""Cron expressions as cron reads them, and the time zones that they are read in."""

from datetime import datetime, timedelta
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

if TYPE_CHECKING:
    from apscheduler.triggers.cron import CronTrigger

_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


def cron_trigger(schedule: str, timezone: str) -> "CronTrigger":
    """
    Return the trigger of a five-field cron expression. Raises `ValueError` if it is none.

    Weekday numbers are cron's, 0 and 7 for Sunday; APScheduler by itself would read 0 as Monday.
    """
    from apscheduler.triggers.cron import CronTrigger  # noqa: PLC0415 - where no schedule is set it is not needed

    *fields, weekdays = schedule.split()
    return CronTrigger.from_crontab(" ".join((*fields, _named(weekdays))), timezone=timezone)


def next_fire(schedule: str, timezone: str, now: datetime) -> datetime | None:
    """Return when a cron expression fires first after `now`, an aware time; `None` if not within a year."""
    trigger = cron_trigger(schedule, timezone)
    # Without an end it would look for a 30th of February until the year 9999.
    trigger.end_date = now + timedelta(days=370)
    fire: datetime | None = trigger.get_next_fire_time(now, now + timedelta(seconds=1))
    return None if fire is None or fire > trigger.end_date else fire


def check_timezone(value: str) -> str:
    """Return the name of a time zone. Raises `ValueError` if there is none of it."""
    try:
        ZoneInfo(value)
    except (KeyError, ValueError) as error:
        raise ValueError(f"no such time zone: {value!r}; use an IANA name such as Europe/Berlin") from error
    return value


def _named(weekdays: str) -> str:
    """Return cron's weekday field with its numbers as names; anything else stays as it is."""
    return ",".join(_named_part(part) for part in weekdays.split(","))


def _named_part(part: str) -> str:
    span, slash, step = part.partition("/")
    first, dash, last = span.partition("-")
    if not first.isdecimal() and not (span == "*" and slash):
        return part
    low = 0 if span == "*" else int(first)
    high = 6 if span == "*" or (slash and not dash) else int(last or first)
    numbers = range(low, high + 1, int(step or 1))
    if not numbers or numbers[-1] > len(_DAYS):
        return part
    return ",".join(_DAYS[number % 7] for number in numbers)
