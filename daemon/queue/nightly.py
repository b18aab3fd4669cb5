"""
Nightly runs: which slots of the schedule are due, and taking each of them once.

APScheduler only says when a schedule fires. What is due follows from the last slot in the database, and a unique row
takes it, so that neither a restart nor a second daemon runs one night twice, and a night slept through is made up for
once. Its own thread is not used: it waits by the wall clock, and one that is set back two days stopped it for as long.

Nights count from when the track was first seen with this schedule (`Track.nightly`): a track that is switched to
nightly at midday does not make up for last night. A clock that was set back is noticed, since each look notes its time:
nights then count from the new time on; slots taken in what is the future now stay taken and hold up no other night.
"""

import math
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import structlog
from apscheduler.triggers.cron import CronTrigger
from sqlalchemy import Engine, func
from sqlmodel import Session, select

from daemon.queue.evaluation_set import records_came
from daemon.queue.run_queue import enqueue
from daemon.queue.snapshots import waiting_drops
from daemon.queue.states import ensure_track
from daemon.settings.cron import cron_trigger, next_fire
from daemon.settings.model import Settings, TrackSettings
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.tables import Slot, Track
from daemon.system.clock import utc

#: Looked back over one after the other, so that a long gap costs no step for each of its fire times.
_WINDOWS = tuple(timedelta(hours=hours) for hours in (1, 24, 8 * 24, 32 * 24, 370 * 24))
_LOOK_SECONDS = 300.0
#: How far the clocks may drift apart between two looks; steering a clock right is slower.
_SET_MS = 2000
log = structlog.get_logger()


def last_due(schedule: str, timezone: str, after: datetime, now: datetime) -> datetime | None:
    """
    Return the latest fire time of a cron expression in (`after`, `now`], in UTC; `None` if there is none.

    `timezone` is an IANA name; the two times are aware. A time of day that the clocks skip fires as much later as they
    jump, one that they repeat fires at the first pass only, unless the expression is for every hour.
    """
    trigger = cron_trigger(schedule, timezone)
    # Without an end it would look for a 30th of February until the year 9999.
    trigger.end_date = now
    every_hour = schedule.split()[1].startswith("*")
    starts = [now - window for window in _WINDOWS if now - window > after]
    for start in (*starts, after):
        latest = None
        fire = _next(trigger, start)
        while fire is not None:
            if every_hour or not _second_pass(fire, trigger):
                latest = fire
            fire = _next(trigger, fire)
        if latest is not None:
            return latest
    return None


def take_due_slots(engine: Engine, settings: Settings, now: int) -> list[Slot]:
    """
    Take the latest due slot of every track with a nightly trigger, in one transaction.

    With drops for training that no run has seen, or pinned records that the last one lacked, the track's run is queued
    to begin at once; without, the slot says `no_new_data`. Earlier slots that were missed are covered by the one that
    is taken. `now` in ms since the epoch.
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
                # Should it be switched on again, nights count from then.
                row.nightly = None
                session.add(row)
    return taken


class Schedule:
    """
    Looks for due slots: at the start, at the fire times of each track's schedule, and every few minutes.

    It is asked all the time, by a loop that no clock can stop, and looks at once where the wall clock has gone another
    way than the monotonic one: it was set, or the machine was suspended.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        on_taken: Callable[[], object],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take slots for the tracks of `settings`; call `on_taken` when one has queued a run."""
        self._engine = engine
        self._settings = settings
        self._on_taken = on_taken
        self._monotonic = monotonic
        tracks = [settings.track(name) for name in settings.track_names]
        self._nightly = [track for track in tracks if track.trigger in {"nightly", "both"}]
        #: By how much the clocks differed at the last look, in ms; nothing before the first.
        self._apart: float | None = None
        #: The next looks: by the wall clock in ms, by the monotonic one in seconds.
        self._at, self._after = math.inf, math.inf

    def tick(self, now: int) -> None:
        """Look if it is time to; what that raises (a locked database, say) lets the next call look again."""
        monotonic = self._monotonic()
        apart = now - 1000 * monotonic
        set_anew = self._apart is None or abs(apart - self._apart) > _SET_MS
        if not set_anew and now < self._at and monotonic < self._after:
            return
        self._look(now)
        self._apart = apart
        if self._nightly:
            self._at, self._after = self._next_fire(now), monotonic + _LOOK_SECONDS

    def _look(self, now: int) -> None:
        """Take what is due now."""
        taken = take_due_slots(self._engine, self._settings, now)
        for slot in taken:
            log.info("slot_taken", track=slot.track, outcome=slot.outcome, run=slot.run_id)
        if any(slot.run_id is not None for slot in taken):
            self._on_taken()

    def _next_fire(self, now: int) -> float:
        """Return when a schedule fires next, in ms since the epoch."""
        fires = [next_fire(track.schedule, track.timezone, utc(now)) for track in self._nightly]
        return min((_ms(fire) for fire in fires if fire is not None), default=math.inf)


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
    slot = Slot(track=row.name, due_at=_ms(due), taken_at=now, outcome="no_new_data")
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
    """Return the time from which the track's nights count."""
    seen = row.nightly or {}
    since, looked_at = seen.get("since"), seen.get("looked_at")
    if not isinstance(since, int) or not isinstance(looked_at, int):
        return now
    other_schedule = seen.get("schedule") not in {None, _words(track)}
    return now if other_schedule or now < looked_at else since


def _words(track: TrackSettings) -> str:
    return f"{track.schedule} {track.timezone}"


def _next(trigger: CronTrigger, after: datetime) -> datetime | None:
    """Return the trigger's first fire time after `after` and not after its end, in UTC."""
    after = after.astimezone(UTC)
    fire: datetime | None = trigger.get_next_fire_time(after, after + timedelta(seconds=1))
    return None if fire is None or fire > trigger.end_date else fire.astimezone(UTC)


def _second_pass(fire: datetime, trigger: CronTrigger) -> bool:
    """Say whether the clock shows `fire` for the second time: an hour that is repeated when summer time ends."""
    return fire.astimezone(trigger.timezone).fold == 1


def _ms(time: datetime) -> int:
    return round(time.timestamp() * 1000)
