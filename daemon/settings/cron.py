"""Cron expressions as cron reads them, and the time zones that they are read in."""

from datetime import datetime, timedelta
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

if TYPE_CHECKING:
    from apscheduler.triggers.cron import CronTrigger


def cron_trigger(schedule: str, timezone: str) -> "CronTrigger":
    """
    Return the trigger of a five-field cron expression, read in `timezone`.

    Raises `ValueError` if it is not a cron expression, or if the weekdays contain a digit.

    APScheduler would read 0 as Monday, which is Sunday in cron.
    """
    from apscheduler.triggers.cron import CronTrigger  # noqa: PLC0415 - where no schedule is set it is not needed

    weekdays = schedule.split()[-1:]
    if any(character.isdecimal() for part in weekdays for character in part):
        raise ValueError("write the days of the week by their names, as mon-fri or sat,sun")
    return CronTrigger.from_crontab(schedule, timezone=timezone)


def next_fire(schedule: str, timezone: str, now: datetime) -> datetime | None:
    """
    Return when a cron expression, read in `timezone`, fires first after `now`, an aware time.

    Returns `None` if it does not fire within 370 days. Raises `ValueError` as `cron_trigger`.
    """
    trigger = cron_trigger(schedule, timezone)
    # Without an end it would look for a 30th of February until the year 9999.
    trigger.end_date = now + timedelta(days=370)
    fire: datetime | None = trigger.get_next_fire_time(now, now + timedelta(seconds=1))
    return None if fire is None or fire > trigger.end_date else fire


def check_timezone(value: str) -> str:
    """Return `value` unchanged if it is the IANA name of a time zone, else raise `ValueError`."""
    try:
        ZoneInfo(value)
    except (KeyError, ValueError, OSError) as error:  # "Europe" is a folder
        raise ValueError(f"no such time zone: {value!r}; use an IANA name such as Europe/Berlin") from error
    return value
