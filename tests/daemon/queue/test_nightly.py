"""Which nights are due, and each of them taken once, whatever clocks and daemons do."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import hypothesis
import pytest
from apscheduler.triggers.cron import CronTrigger
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError
from sqlmodel import select

from daemon.queue.nightly import Schedule, last_due, take_due_slots
from daemon.queue.run_queue import enqueue
from daemon.settings.model import Settings
from daemon.state.database import create, open_engine, transaction
from daemon.state.states import RunState
from daemon.state.tables import Drop, Event, Run, Slot, Track
from tests.run_owner import add_drop

BERLIN = "Europe/Berlin"
NIGHTLY = Settings(trigger="nightly", schedule="0 2 * * *", timezone="UTC")
FIRST_LOOK = 1_777_636_800_000  # 2026-05-01 12:00 UTC
HOUR = timedelta(hours=1)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def from_ms(value: int) -> datetime:
    return datetime.fromtimestamp(value / 1000, UTC)


def ms(text: str) -> int:
    return round(utc(text).timestamp() * 1000)


@pytest.fixture
def engine(engine: Engine) -> Engine:
    assert take_due_slots(engine, NIGHTLY, FIRST_LOOK) == []
    return engine


def drop(engine: Engine, role: str = "train") -> None:
    with transaction(engine) as session:
        add_drop(session, role=role)


def slots(engine: Engine) -> list[tuple[str, int, str, int | None]]:
    with transaction(engine) as session:
        return [(row.track, row.due_at, row.outcome, row.run_id) for row in session.exec(select(Slot))]


def runs(engine: Engine) -> list[Run]:
    with transaction(engine) as session:
        return list(session.exec(select(Run)))


# --- what is due


@pytest.mark.parametrize(
    ("schedule", "due"),
    [
        ("0 * * * *", "2026-05-09 13:00"),
        ("0 2 1 1 *", "2026-01-01 02:00"),
        ("0 2 29 2 *", None),
        ("0 2 30 2 *", None),
    ],
)
def test_a_long_gap_ends_with_the_right_slot_of_the_last_year(schedule: str, due: str | None) -> None:
    found = last_due(schedule, "UTC", utc("2019-01-01 00:00"), utc("2026-05-09 13:00"))
    assert found == (None if due is None else utc(due))


def test_of_a_long_gap_not_every_fire_time_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[datetime] = []
    real = CronTrigger.get_next_fire_time

    def count(trigger: CronTrigger, before: datetime, now: datetime) -> datetime | None:
        asked.append(now)
        found: datetime | None = real(trigger, before, now)
        return found

    monkeypatch.setattr(CronTrigger, "get_next_fire_time", count)
    assert last_due("*/5 * * * *", "UTC", utc("2026-04-09 13:02"), utc("2026-05-09 13:02")) == utc("2026-05-09 13:00")
    assert len(asked) < 400, "30 days have 8,640"


def fires(schedule: str, start: datetime, hours: int) -> list[datetime]:
    """Return what is taken by somebody who looks every ten minutes."""
    last, taken = start, []
    for minutes in range(0, hours * 60, 10):
        due = last_due(schedule, BERLIN, last, start + timedelta(minutes=minutes))
        if due is not None:
            taken.append(due)
            last = due
    return taken


@pytest.mark.parametrize(
    ("begin", "nights"),
    [
        ("2026-10-24 12:00", ["2026-10-25 00:30", "2026-10-26 01:30"]),  # the hour from 02:00 to 03:00 comes twice
        ("2026-03-28 12:00", ["2026-03-29 01:30", "2026-03-30 00:30"]),  # 02:30 does not come: it is 03:30
    ],
)
def test_a_night_with_an_hour_too_many_or_too_few_is_run_once(begin: str, nights: list[str]) -> None:
    assert fires("30 2 * * *", utc(begin), 48) == list(map(utc, nights))


@pytest.mark.parametrize(("night", "hours"), [("2026-03-28 22:30", 4), ("2026-10-24 22:30", 4)])
def test_an_hourly_schedule_goes_on_every_hour_when_the_clocks_change(night: str, hours: int) -> None:
    taken = fires("0 * * * *", utc(night), hours)
    assert taken == [utc(night) + HOUR / 2 + HOUR * number for number in range(hours)]


# --- taking slots


def test_a_night_with_new_data_queues_a_run_that_may_begin_at_once(engine: Engine) -> None:
    drop(engine)
    now = ms("2026-05-02 02:00:03")
    (slot,) = take_due_slots(engine, NIGHTLY, now)
    (run,) = runs(engine)
    assert (run.trigger, run.not_before, run.id) == ("nightly", now, slot.run_id)
    assert slots(engine) == [("default", ms("2026-05-02 02:00"), "queued", run.id)]


def test_a_night_without_new_data_says_so_and_does_nothing(engine: Engine) -> None:
    drop(engine, role="heldout")
    take_due_slots(engine, NIGHTLY, ms("2026-05-02 02:00:03"))
    assert slots(engine) == [("default", ms("2026-05-02 02:00"), "no_new_data", None)]
    assert runs(engine) == []
    with transaction(engine) as session:
        (event,) = session.exec(select(Event).where(Event.kind == "slot_taken")).all()
    assert event.detail == {"outcome": "no_new_data", "due_at": ms("2026-05-02 02:00")}


def test_a_night_with_pinned_records_that_the_last_run_lacked_queues_a_run(engine: Engine) -> None:
    pinned = NIGHTLY.model_validate({**NIGHTLY.model_dump(), "gate": {"on": "pinned"}})
    drop(engine)
    take_due_slots(engine, pinned, ms("2026-05-02 02:00:03"))
    with transaction(engine) as session:
        (run,) = session.exec(select(Run)).all()
        session.exec(select(Drop)).one().first_run = run.id
        run.state, run.outcome, run.ended_at = RunState.SUCCEEDED, "insufficient_evidence", 1
    take_due_slots(engine, pinned, ms("2026-05-03 02:00:03"))
    drop(engine, role="heldout")
    take_due_slots(engine, NIGHTLY, ms("2026-05-04 02:00:03"))
    take_due_slots(engine, pinned, ms("2026-05-05 02:00:03"))
    assert [outcome for _, _, outcome, _ in slots(engine)] == ["queued", "no_new_data", "no_new_data", "queued"]


def test_a_track_that_is_switched_to_nightly_at_midday_leaves_last_night_alone(engine: Engine) -> None:
    by_drop = NIGHTLY.model_copy(update={"trigger": "drop"})
    take_due_slots(engine, by_drop, ms("2026-05-02 01:00"))
    drop(engine)
    assert take_due_slots(engine, NIGHTLY, ms("2026-05-05 12:00")) == []
    assert len(take_due_slots(engine, NIGHTLY, ms("2026-05-06 02:00"))) == 1


def test_another_schedule_counts_from_when_it_was_first_seen(engine: Engine) -> None:
    earlier = NIGHTLY.model_copy(update={"schedule": "0 11 * * *"})
    assert take_due_slots(engine, earlier, ms("2026-05-02 12:00")) == []
    assert len(take_due_slots(engine, earlier, ms("2026-05-03 11:00"))) == 1


MINUTE_MS = 60_000
#: What a daemon lives through: how far its clock goes on, whether it starts anew, and where the clock is set to then.
TURNS = st.lists(
    st.tuples(st.integers(1, 2000), st.booleans(), st.sampled_from([0, 0, 0, 0, -2000, -90, -5, 5, 90, 2000])),
    min_size=1,
    max_size=40,
)


@given(turns=TURNS, zone=st.sampled_from(["UTC", BERLIN, "America/New_York", "Australia/Lord_Howe"]))
@hypothesis.settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_clock_does_a_night_is_run_at_most_once_and_none_that_passes_is_left_out(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[int, bool, int]], zone: str
) -> None:
    path = tmp_path_factory.mktemp("schedule") / "state.db"
    create(path)
    settings = NIGHTLY.model_copy(update={"schedule": "30 2 * * *", "timezone": zone})
    engine, now = open_engine(path), FIRST_LOOK
    take_due_slots(engine, settings, now)
    for minutes, restart, jump in turns:
        if restart:
            engine.dispose()
            engine = open_engine(path)
        if jump:
            now += jump * MINUTE_MS
            take_due_slots(engine, settings, now)
        before, now = now, now + minutes * MINUTE_MS
        take_due_slots(engine, settings, now)
        passed = last_due(settings.schedule, zone, from_ms(before), from_ms(now))
        taken = [due for _, due, _, _ in slots(engine)]
        assert passed is None or round(passed.timestamp() * 1000) in taken, "the latest night that passed is taken"
        assert len(set(taken)) == len(taken)
    engine.dispose()


def test_tracks_have_schedules_of_their_own_and_some_have_none(engine: Engine) -> None:
    settings = Settings(
        tracks={
            "both": {"trigger": "both", "schedule": "0 4 * * *"},
            "zone": {"trigger": "nightly", "timezone": BERLIN},
        }
    )
    take_due_slots(engine, settings, FIRST_LOOK)
    take_due_slots(engine, settings, ms("2026-05-02 06:00"))
    assert [(track, due) for track, due, _, _ in slots(engine)] == [
        ("both", ms("2026-05-02 04:00")),
        ("zone", ms("2026-05-02 00:00")),
    ]


def test_a_slot_joins_the_run_that_is_open_already(engine: Engine) -> None:
    drop(engine)
    with transaction(engine) as session:
        enqueue(session, "default", "drop", 1, ms("2026-05-02 02:30"))
    (slot,) = take_due_slots(engine, Settings(trigger="both", timezone="UTC"), ms("2026-05-02 02:00"))
    (run,) = runs(engine)
    assert (slot.run_id, run.trigger, run.not_before) == (run.id, "drop", ms("2026-05-02 02:30"))


# --- when to look


class Clocks:
    """A wall clock and a monotonic one, both in seconds from `start`, and a daemon's loop that asks twice a second."""

    def __init__(self, engine: Engine, settings: Settings, start: str) -> None:
        self.wall, self.monotonic = utc(start).timestamp(), 1000.0
        self.woken = 0
        self.schedule = Schedule(engine, settings, self._wake, lambda: self.monotonic)
        self.ask()

    def _wake(self) -> None:
        self.woken += 1

    def ask(self) -> None:
        self.schedule.tick(round(1000 * self.wall))

    def pass_by(self, seconds: float, step: float = 0.5) -> None:
        """Let time go by for both."""
        for _ in range(round(seconds / step)):
            self.wall += step
            self.monotonic += step
            self.ask()

    def set(self, **by: float) -> None:
        """Set the wall clock, or suspend the machine: the monotonic one knows of neither."""
        self.wall += timedelta(**by).total_seconds()


def due_times(engine: Engine) -> list[str]:
    return [f"{from_ms(due):%m-%d %H:%M}" for _, due, _, _ in slots(engine)]


def looks(engine: Engine, clocks: Clocks, seconds: float) -> list[int]:
    """Return when the schedule looks, in seconds from now, while time goes by."""
    found, seen = [], None
    for second in range(round(seconds)):
        with transaction(engine) as session:
            nightly = session.get_one(Track, "default").nightly or {}
        if nightly.get("looked_at") != seen:
            seen = nightly.get("looked_at")
            found.append(second)
        clocks.pass_by(1, 1)
    return found[1:]


def test_a_schedule_catches_up_at_its_start_and_wakes_the_dispatcher(engine: Engine) -> None:
    drop(engine)
    clocks = Clocks(engine, NIGHTLY, "2026-05-02 09:00")
    assert (clocks.woken, len(runs(engine))) == (1, 1)
    with transaction(engine) as session:
        session.exec(select(Drop)).one().first_run = 1
    clocks.pass_by(24 * 3600, 60)
    assert (clocks.woken, len(slots(engine))) == (1, 2), "a night without new data wakes nobody"


def test_a_schedule_looks_every_five_minutes_and_punctually_when_a_track_is_due(engine: Engine) -> None:
    # Each of them is a transaction.
    both, never = {"trigger": "both", "schedule": "2 2 * * sat"}, {"trigger": "drop", "schedule": "1 2 * * *"}
    settings = NIGHTLY.model_copy(update={"tracks": {"both": both, "never": never}})
    clocks = Clocks(engine, settings, "2026-05-02 01:50:30")
    assert looks(engine, clocks, 16 * 60) == [300, 570, 690]
    assert due_times(engine) == ["05-02 02:00", "05-02 02:02"]


@pytest.mark.parametrize("days", [2, -365])
def test_whichever_way_the_clock_is_set_the_next_night_is_taken_on_the_minute(engine: Engine, days: int) -> None:
    clocks = Clocks(engine, NIGHTLY, "2026-05-10 12:00")
    clocks.set(days=days)
    midday = utc("2026-05-10 12:00") + timedelta(days=days)
    clocks.pass_by(13 * 3600, 60)
    clocks.pass_by(3599, 1)
    before = due_times(engine)
    clocks.pass_by(2, 1)
    night = f"{midday + 14 * HOUR:%m-%d %H:%M}"
    assert night not in before
    assert night in due_times(engine)
    assert len(slots(engine)) == len({due for _, due, _, _ in slots(engine)})


@pytest.mark.parametrize(("slept", "taken"), [(9, ["05-11 02:00"]), (3 * 24, ["05-13 02:00"])])
def test_a_night_that_the_machine_slept_through_is_taken_within_five_minutes(
    engine: Engine, slept: int, taken: list[str]
) -> None:
    clocks = Clocks(engine, NIGHTLY, "2026-05-10 18:00")
    before = len(slots(engine))
    clocks.set(hours=slept)
    clocks.pass_by(300)
    assert due_times(engine)[before:] == taken
    clocks.pass_by(600)
    assert due_times(engine)[before:] == taken


def test_a_look_that_fails_is_made_again_at_the_next_call(tmp_path: Path) -> None:
    path = tmp_path / "later.db"
    moment = ms("2026-05-02 12:00")
    schedule = Schedule(open_engine(path), NIGHTLY, lambda: None, lambda: 1.0)
    with pytest.raises(OperationalError):
        schedule.tick(moment)
    create(path)
    schedule.tick(moment)
    with transaction(open_engine(path)) as session:
        assert session.get_one(Track, "default").nightly is not None
