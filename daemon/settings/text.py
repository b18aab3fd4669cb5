"""Parse and check the text of settings files, variables, schedules, time zones, paths and commands."""

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

_DEEP = "is nested too deeply"
_SHOWN = 80


class BadText(ValueError):
    """A text cannot be parsed; its message is to follow the name of the file or variable: "is not TOML: ..."."""


def read_toml(path: Path) -> dict[str, Any]:
    """Return the values in a TOML file. Raises `BadText` if it is no TOML or too deep, `OSError` if unreadable."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise BadText(_DEEP) from error
    except ValueError as error:  # of TOML, of UTF-8, of a number with more digits than Python reads
        raise BadText(f"is not TOML: {error}") from error


def read_variable(text: str) -> Any:
    """Return the value of `text` if it is JSON, else `text` itself. Raises `BadText` if it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise BadText(_DEEP) from error
    except ValueError:
        return text


def shown(value: Any) -> str:
    """Return the first 80 characters of a value as JSON, for a message; a phrase if it is too deep or too long."""
    try:
        return json.dumps(value, default=str)[:_SHOWN]
    except RecursionError:
        return f"a value that {_DEEP}"
    except ValueError:
        return "a number of too many digits"


def nearest(word: str, known: Any) -> str | None:
    """Return the string in `known` that is most similar to `word`; `None` if none is similar enough for a hint."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `below` with the values of `above` over it; tables in both are merged, key by key."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = overlay(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def flat(values: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path, value) of each value in nested tables, and of each empty table; each path begins with `place`."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, (*place, name))
        else:
            yield (*place, name), value


def cron_trigger(schedule: str, timezone: str) -> Any:
    """
    Return APScheduler's `CronTrigger` of a five-field cron expression, read in `timezone`, which must be known.

    Raises `ValueError` if it is not a cron expression, or if the weekdays contain a digit: APScheduler would read 0 as
    Monday, which is Sunday in cron.
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


def check_schedule(value: str) -> str:
    """Return `value` unchanged if `cron_trigger` can read it, else raise `ValueError` with an example."""
    try:
        cron_trigger(value, "UTC")
    except ValueError as error:
        msg = f"not a cron expression: {value!r} ({error}); five fields, such as '0 2 * * *' for 02:00 each night"
        raise ValueError(msg) from error
    return value


def check_path(value: str) -> str:
    """Return a path unchanged. Raises `ValueError` if it has a NUL, or begins at a home folder that is not there."""
    if "\0" in value:
        raise ValueError("must not hold a NUL character")
    try:
        Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no home folder {value.partition('/')[0]}: write the whole path") from error
    return value


def check_folder(value: str) -> str:
    """Return a path unchanged. Raises `ValueError` as `check_path`, and if it is blank."""
    if not value.strip():
        raise ValueError("must name a folder of its own; left out, it is inbox or .dropforge beside the settings file")
    return check_path(value)


def check_command(value: tuple[str, ...]) -> tuple[str, ...]:
    """Return the arguments of a command unchanged. Raises `ValueError` if the first is blank or any has a NUL."""
    if (value and not value[0].strip()) or any("\0" in word for word in value):
        msg = 'must begin with the name or path of a program, such as ["systemctl", "reload", "vllm"], or be []'
        raise ValueError(msg)
    return value
