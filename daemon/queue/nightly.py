"""
Nightly runs: find the due slots of each track's schedule, and take each slot once.

APScheduler only computes fire times. Which slot is due follows from the last slot in the database, and a unique row
takes it: neither a restart nor a second daemon runs one night twice, and nights that were missed, since the machine was
off, are made up for by one run. APScheduler's own thread is not used: it waits by the wall clock, and stopped for two
days when that clock was set back two days.

Nights count from when the track was first seen with this schedule (`Track.nightly`): a track that is switched to
nightly at midday does not make up for last night. A clock that was set back is noticed, since each check stores its
time: nights then count from the new time on; slots taken at times that are now in the future stay taken and delay no
other night.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog
from apscheduler.triggers.cron import CronTrigger
from sqlalchemy import Engine, func
from sqlmodel import Session, select

from daemon.queue.run_queue import enqueue
from daemon.queue.snapshots import records_came, waiting_drops
from daemon.queue.states import ensure_track
from daemon.settings.model import Settings, TrackSettings
from daemon.settings.text import cron_trigger, next_fire
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.tables import Slot, Track
from daemon.system.clock import utc

#: A night that was missed longer ago is not made up for.
_LONGEST_GAP = timedelta(days=370)
_LOOK_SECONDS = 300.0
log = structlog.get_logger()


def last_due(schedule: str, timezone: str, after: datetime, now: datetime) -> datetime | None:
    """
    Return the latest fire time of a cron expression in (`after`, `now`], in UTC; `None` if there is none.

    `timezone` is an IANA name; the two times are aware. Times more than 370 days before `now` are left out. A local
    time that the clocks skip fires later, by the length of the gap; a repeated local time fires the first time only,
    unless the hour field begins with `*`.
    """
    trigger = cron_trigger(schedule, timezone)
    # Without an end it would look for a 30th of February until the year 9999.
    trigger.end_date = now
    every_hour = schedule.split()[1].startswith("*")
    latest: datetime | None = None
    # A long gap may have a hundred thousand fire times, and the latest is mostly in the last day.
    for gap in (timedelta(days=1), timedelta(days=32), _LONGEST_GAP):
        fire = _next(trigger, max(after, now - gap)) if latest is None else None
        while fire is not None:
            # `fold` is 1 in the second pass of an hour that is repeated when summer time ends.
            if every_hour or fire.astimezone(trigger.timezone).fold == 0:
                latest = fire
            fire = _next(trigger, fire)
    return latest


def take_due_slots(engine: Engine, settings: Settings, now: int) -> list[Slot]:
    """
    Take the latest due slot of every track with a nightly trigger, in one transaction; return the new slots.

    If training drops wait for a run, or pinned records that the last run lacked, the track's run is queued, due at once
    unless it was queued before; otherwise the slot's outcome is `no_new_data`. The slot also covers earlier slots that
    were missed, but none before the first call with this schedule. Each declared track gets its row, with the time
    `now`, in ms since the epoch, as its last check if it is nightly.
    """
    taken = []
    with transaction(engine) as session:
        for name in settings.track_names:
            track = settings.track(name)
            row = ensure_track(session, name, now)
            if track.trigger in {"nightly", "both"}:
                slot = _take(session, row, settings, now)
                taken += [slot] if slot is not None else []
            elif row.nightly is not None:
                # If nightly runs are switched on again, nights count from then.
                row.nightly = None
                session.add(row)
    return taken


class Schedule:
    """
    Takes due slots: at the first `tick`, at the fire times of each track's schedule, and every five minutes.

    `tick` is called several times a second by the main loop. A clock that is set, or a machine that wakes up, is
    noticed within five minutes. Without a nightly track only the first `tick` does anything.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        on_taken: Callable[[], object],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take slots for the tracks of `settings`; call `on_taken` after a slot has queued a run."""
        self._engine = engine
        self._settings = settings
        self._on_taken = on_taken
        self._monotonic = monotonic
        tracks = [settings.track(name) for name in settings.track_names]
        self._nightly = [track for track in tracks if track.trigger in {"nightly", "both"}]
        #: Time of the next check, by the monotonic clock in seconds.
        self._next_look = -math.inf

    def tick(self, now: int) -> None:
        """Take due slots if a check is due, and call `on_taken` if a run was queued; check again after an exception."""
        monotonic = self._monotonic()
        if monotonic < self._next_look:
            return
        taken = take_due_slots(self._engine, self._settings, now)
        for slot in taken:
            log.info("slot_taken", track=slot.track, outcome=slot.outcome, run=slot.run_id)
        if any(slot.run_id is not None for slot in taken):
            self._on_taken()
        fires = [next_fire(track.schedule, track.timezone, utc(now)) for track in self._nightly]
        waits = [(_ms(fire) - now) / 1000 for fire in fires if fire is not None]
        self._next_look = monotonic + (min(_LOOK_SECONDS, *waits) if waits else math.inf)


def _take(session: Session, row: Track, settings: Settings, now: int) -> Slot | None:
    track = settings.track(row.name)
    since = _since(row, track, now)
    row.nightly = {"schedule": _words(track), "since": since, "looked_at": now}
    session.add(row)
    ours = select(func.max(Slot.due_at)).where(Slot.track == row.name, Slot.due_at <= now)
    last: int | None = session.exec(ours).one()
    due = last_due(track.schedule, track.timezone, utc(max(since, last or since)), utc(now))
    if due is None:
        return None
    slot = Slot(track=row.name, due_at=_ms(due), outcome="no_new_data")
    if waiting_drops(session, row.name) or records_came(session, settings, row.name):
        slot.run_id = enqueue(session, row.name, "nightly", now, now).id
        slot.outcome = "queued"
    session.add(slot)
    session.flush()
    record_event(
        session, "slot_taken", now, track=row.name, run_id=slot.run_id, outcome=slot.outcome, due_at=slot.due_at
    )
    return slot


def _since(row: Track, track: TrackSettings, now: int) -> int:
    """Return the time (ms) from which the track's nights count: `now` for a new schedule or a clock set back."""
    seen: Any = row.nightly
    with suppress(KeyError, TypeError, ValueError):  # there is none, or it is damaged
        if seen["schedule"] == _words(track) and now >= seen["looked_at"]:
            return int(seen["since"])
    return now


def _words(track: TrackSettings) -> str:
    return f"{track.schedule} {track.timezone}"


def _next(trigger: CronTrigger, after: datetime) -> datetime | None:
    """Return the trigger's first fire time after `after`, in UTC; `None` if that is after the trigger's end."""
    after = after.astimezone(UTC)
    fire: datetime | None = trigger.get_next_fire_time(after, after + timedelta(seconds=1))
    return None if fire is None or fire > trigger.end_date else fire.astimezone(UTC)


def _ms(time: datetime) -> int:
    return round(time.timestamp() * 1000)
