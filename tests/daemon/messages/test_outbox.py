"""Events become messages: each once, with the cursor, in order; the digest at its time."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest
from pydantic import ValidationError
from sqlmodel import col, select

from daemon.messages import digest, outbox
from daemon.settings.model import Settings
from daemon.settings.sections import MessageSettings
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.tables import Message
from tests.daemon.messages.conftest import with_messages

URL = "json://user:hunter2@example.invalid/"
OTHER = "slack://TokenA/TokenB/TokenC"
DAY = 86_400_000


def rows(lived_in: Any) -> list[Message]:
    with transaction(lived_in.engine) as session:
        return list(session.exec(select(Message).order_by(col(Message.id))).all())


def collect(lived_in: Any) -> list[Message]:
    while outbox.collect(lived_in.engine, lived_in.settings, lived_in.tick()):
        pass
    return rows(lived_in)


def fail_hook(lived_in: Any, times: int = 1) -> None:
    with transaction(lived_in.engine) as session:
        for number in range(times):
            record_event(
                session, "hook_failed", lived_in.tick(), track="default", run_id=1, error=f"exit code {number}"
            )


def at(lived_in: Any, time: str) -> int:
    """Set the workspace's clock."""
    lived_in.now = round(datetime.fromisoformat(time).astimezone(UTC).timestamp() * 1000) - 60_000
    return int(lived_in.now)


def test_each_event_since_there_is_an_address_is_told_once_however_often_it_is_looked_for(lived_in: Any) -> None:
    with_messages(lived_in, urls=[URL, OTHER])
    assert collect(lived_in) == []
    fail_hook(lived_in, 3)
    for _ in range(3):
        found = collect(lived_in)
    assert [(one.address, one.body.splitlines()[0][-11:]) for one in found] == [
        (address, f"exit code {number}") for number in range(3) for address in found_addresses(lived_in)
    ]
    assert len({one.event_id for one in found}) == 3


def test_an_address_that_is_there_twice_is_refused_and_so_are_two_with_the_same_digits(lived_in: Any) -> None:
    for other, words in (("166", "one of them is there twice"), ("209", "the same short hash")):
        with pytest.raises(ValidationError, match=words):
            with_messages(lived_in, urls=["json://host/166", f"json://host/{other}"])


def found_addresses(lived_in: Any) -> list[str]:
    return [url.address for url in lived_in.settings.messages.urls]


def test_the_cursor_and_the_rows_are_one_transaction(lived_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_messages(lived_in, urls=[URL])
    fail_hook(lived_in, 2)
    with monkeypatch.context() as death:
        death.setattr(outbox, "_put", Mock(wraps=outbox._put, side_effect=[DEFAULT, KeyboardInterrupt]))
        with pytest.raises(KeyboardInterrupt):
            collect(lived_in)
    assert rows(lived_in) == []
    assert len(collect(lived_in)) == 2


def test_an_event_that_cannot_be_worded_holds_up_no_other(lived_in: Any) -> None:
    with_messages(lived_in, urls=[URL])
    with transaction(lived_in.engine) as session:
        record_event(session, "drop_rejected", lived_in.tick(), track="default", drop_id=999)
    fail_hook(lived_in)
    assert [one.kind for one in collect(lived_in)] == ["hook_failed"]


def test_what_happens_again_and_again_does_not_drown_the_rest(lived_in: Any) -> None:
    with_messages(lived_in, urls=[URL])
    fail_hook(lived_in, outbox.MOST_AN_HOUR + 5)
    lived_in.take("bad.jsonl", '{"instruction": "x"}\n')
    found = collect(lived_in)
    assert [one.kind for one in found] == ["hook_failed"] * outbox.MOST_AN_HOUR + ["drop_rejected"]
    assert found[outbox.MOST_AN_HOUR - 1].body.endswith("\nfurther ones within the hour: dropforge status")
    lived_in.now += outbox.HOUR_MS
    fail_hook(lived_in)
    assert collect(lived_in)[-1].kind == "hook_failed"


def test_messages_of_an_address_that_was_taken_out_are_given_up_and_a_new_one_hears_of_what_comes(
    lived_in: Any,
) -> None:
    with_messages(lived_in, urls=[URL])
    fail_hook(lived_in)
    collect(lived_in)
    with_messages(lived_in, urls=[OTHER])
    (old,) = rows(lived_in)
    assert (old.state, old.error) == ("given_up", "its address is not in the settings any more")
    fail_hook(lived_in)
    assert [one.address for one in collect(lived_in)[1:]] == found_addresses(lived_in)
    with_messages(lived_in)
    fail_hook(lived_in)
    with_messages(lived_in, urls=[URL])
    assert len(collect(lived_in)) == 2, "nothing is remembered while nobody is to be told"


def test_the_first_of_an_address_is_tried_again_after_a_pause_that_grows_and_none_passes_it(lived_in: Any) -> None:
    with_messages(lived_in, urls=[URL])
    (address,) = found_addresses(lived_in)
    fail_hook(lived_in, 2)
    collect(lived_in)
    now, pauses = lived_in.now, []
    for _ in range(8):
        taken = outbox.take(lived_in.engine, address, now)
        assert taken is not None
        assert "exit code 0" in taken.body
        outbox.record_failure(lived_in.engine, taken.id or 0, "the answer was 500")
        assert outbox.take(lived_in.engine, address, now) is None
        due = rows(lived_in)[0].not_before
        pauses.append((due - now) // 1000)
        now = due
    assert pauses == [15, 30, 60, 120, 240, 480, 600, 600]
    assert outbox.trouble(lived_in.engine, address, now) == (
        "2 messages cannot be sent: the answer was 500; to try: dropforge messages --test"
    )
    outbox.record_sent(lived_in.engine, 1, now)
    following = outbox.take(lived_in.engine, address, now)
    assert following is not None
    assert "exit code 1" in following.body
    assert outbox.trouble(lived_in.engine, address, now) is None


def test_a_message_is_given_up_after_a_week_of_tries_with_a_trouble_that_lasts_a_week(lived_in: Any) -> None:
    with_messages(lived_in, urls=[URL])
    (address,) = found_addresses(lived_in)
    fail_hook(lived_in, 1)
    collect(lived_in)
    late = lived_in.now + outbox.WEEK_MS + 1
    first = outbox.take(lived_in.engine, address, late)
    assert first is not None, "no daemon has tried it yet"
    outbox.record_failure(lived_in.engine, first.id or 0, "the answer was 500")
    assert outbox.take(lived_in.engine, address, late + 900_000) is None
    assert rows(lived_in)[0].state == "given_up"
    words = "1 message could not be sent for a week: dropforge messages"
    assert outbox.trouble(lived_in.engine, address, late + 900_000) == words
    assert outbox.trouble(lived_in.engine, address, late + 900_000 + outbox.WEEK_MS) is None


# --- the digest


def test_the_digest_counts_what_happened_since_the_last_one_at_its_time_of_day(
    new_workspace: Callable[[], Any],
) -> None:
    made = new_workspace()
    at(made, "2026-11-25T09:00+01:00")
    with_messages(made, urls=[URL], digest="08:00")
    made.settings = made.settings.model_copy(update={"timezone": "Europe/Berlin"})
    assert collect(made) == []
    made.take("one.jsonl", '{"instruction": "a", "output": "b"}\n')
    made.take("same.jsonl", '{"instruction": "a", "output": "b"}\n')
    made.fail(made.claim())
    at(made, "2026-11-26T07:59+01:00")
    assert [one.kind for one in collect(made)] == ["run_failed"]
    at(made, "2026-11-26T08:00+01:00")
    message = collect(made)[-1]
    assert (message.kind, message.level, message.event_id) == ("digest", "info", None)
    assert message.title == "[dropforge] digest since 2026-11-25 08:59 Europe/Berlin"
    assert message.body.splitlines() == [
        "default: 1 failed run, 1 accepted drop, 1 duplicate drop",
        "more: dropforge status",
    ]
    for time in ("2026-11-26T08:05+01:00", "2026-11-27T08:05+01:00", "2026-11-30T12:00+01:00"):
        at(made, time)
        assert collect(made)[-1].id == message.id, "nothing happened, so nothing is said"
    made.take("two.jsonl", '{"instruction": "c", "output": "d"}\n')
    at(made, "2026-12-01T08:00+01:00")
    told = collect(made)
    assert told[-1].title == "[dropforge] digest since 2026-11-30 08:00 Europe/Berlin"
    made.take("three.jsonl", '{"instruction": "e", "output": "f"}\n')
    at(made, "2026-12-04T11:00+01:00")
    for _ in range(3):  # a daemon that was off for three days tells it once
        with_messages(made, urls=[URL], digest="08:00")
        made.settings = made.settings.model_copy(update={"timezone": "Europe/Berlin"})
        assert len(collect(made)) == len(told) + 1


def test_the_digest_tells_verdicts_and_what_waits_for_a_person(lived_in: Any) -> None:
    at(lived_in, "2026-11-25T09:00+00:00")
    with_messages(lived_in, urls=[URL], digest="08:00")
    with transaction(lived_in.engine) as session:
        for run in (1, 2, 3, 1, 2, 3):
            record_event(session, "run_succeeded", lived_in.tick(), track="default", run_id=run, outcome="worse")
        record_event(session, "disk_low", lived_in.tick(), free_bytes=1)
    at(lived_in, "2026-11-26T08:00+00:00")
    lines = collect(lived_in)[-1].body.splitlines()
    assert lines[:2] == ["default: 6 verdicts", "all tracks: 1 time of low disk"]
    assert "run 1: promoted: +40.0 points (+28.5 to +51.5)" in lines
    assert lines[-2:] == ["and 2 further verdicts: dropforge runs", "more: dropforge status"]
    assert len(lines) <= 12


def test_without_a_time_there_is_no_digest() -> None:
    now = round(datetime(2026, 11, 26, 9, tzinfo=UTC).timestamp() * 1000)
    assert digest.digest_due(Settings(messages=MessageSettings(digest="")), now - 9 * DAY, now) is None
    assert digest.digest_due(Settings(), now - DAY, now) == now - 3_600_000


def test_a_clock_that_was_ahead_does_not_put_a_message_off_for_longer(lived_in: Any) -> None:
    with_messages(lived_in, urls=[URL])
    (address,) = found_addresses(lived_in)
    fail_hook(lived_in)
    collect(lived_in)
    taken = outbox.take(lived_in.engine, address, lived_in.now + 30 * DAY)
    assert taken is not None
    again = outbox.take(lived_in.engine, address, lived_in.now)
    assert again is not None
    assert again.id == taken.id


def test_a_digest_that_a_clock_noted_which_was_ahead_keeps_no_later_one_back(new_workspace: Callable[[], Any]) -> None:
    made = new_workspace()
    at(made, "2027-11-25T09:00+00:00")
    with_messages(made, urls=[URL], digest="08:00")
    made.take("one.jsonl", '{"instruction": "a", "output": "b"}\n')
    at(made, "2026-11-25T07:00+00:00")
    assert collect(made) == []
    at(made, "2026-11-25T08:00+00:00")
    assert [one.kind for one in collect(made)] == ["digest"]
