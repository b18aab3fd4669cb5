from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlmodel import Session, select

from daemon.queue import order, run_queue
from daemon.settings.model import RetrySettings
from daemon.state.database import migrate, open_engine, transaction
from daemon.state.events import Word
from daemon.state.tables import Event, Track
from pipeline.config import RunConfig
from pipeline.errors import DropforgeError
from tests import run_owner
from tests.daemon.queue.test_order import queue_runs

WORD = Word("the card is lent out", 50, "ada")


def configure(_session: Session, track: Track) -> RunConfig:
    return RunConfig(track=track.name, base_model="/base", base_model_id="b" * 64, salt=track.salt)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    migrate(tmp_path / "state.db")
    return open_engine(tmp_path / "state.db")


def queue_run(engine: Engine, track: str) -> int:
    (run,) = queue_runs(engine, track)
    return run


def events(engine: Engine) -> list[tuple[str, dict[str, Any]]]:
    with transaction(engine) as session:
        return [(row.kind, row.detail) for row in session.exec(select(Event)).all() if row.kind.startswith("track_")]


def test_a_paused_track_begins_no_run_and_others_go_on(engine: Engine) -> None:
    queue_run(engine, "support")
    other = queue_run(engine, "legal")
    order.pause(engine, "support", WORD)
    claim = run_owner.claim(engine, 100, configure)
    assert claim is not None
    assert claim.run_id == other
    assert run_owner.claim(engine, 100, configure) is None
    assert order.next_due(engine) is None


def test_a_resumed_track_goes_on_where_it_was(engine: Engine) -> None:
    run = queue_run(engine, "support")
    order.pause(engine, "support", WORD)
    assert run_owner.claim(engine, 100, configure) is None
    order.resume(engine, "support", Word("", 200, "ada"))
    claim = run_owner.claim(engine, 300, configure)
    assert claim is not None
    assert claim.run_id == run
    assert events(engine)[-2:] == [
        ("track_paused", {"reason": "the card is lent out", "by": "ada"}),
        ("track_resumed", {"reason": "", "by": "ada"}),
    ]


def test_a_running_run_of_a_paused_track_ends_and_an_interrupted_one_waits(engine: Engine) -> None:
    queue_run(engine, "support")
    claim = run_owner.claim(engine, 100, configure)
    assert claim is not None
    order.pause(engine, "support", WORD)
    assert run_queue.interrupt(engine, claim, 120) == "waiting"
    assert run_owner.claim(engine, 130, configure) is None


def test_a_paused_track_takes_drops_in_and_queues_its_run(engine: Engine) -> None:
    order.pause(engine, "support", WORD)
    queue_run(engine, "support")
    claim = run_owner.claim(engine, 100, configure)
    assert claim is None
    with transaction(engine) as session:
        assert session.get_one(Track, "support").paused is not None
        assert session.get(Track, "default") is None, "no other track is touched"


def test_pausing_twice_and_resuming_what_is_not_paused_are_refused(engine: Engine) -> None:
    order.pause(engine, "support", WORD)
    with pytest.raises(DropforgeError, match="paused already: the card is lent out") as refused:
        order.pause(engine, "support", Word("another", 60, "bob"))
    assert refused.value.hint == "to resume: dropforge resume support"
    order.resume(engine, "support", WORD)
    for name in ("support", "unknown"):
        with pytest.raises(DropforgeError, match=f"track {name} is not paused"):
            order.resume(engine, name, WORD)


def test_a_failure_of_a_run_that_runs_on_in_a_paused_track_is_counted_as_ever(engine: Engine) -> None:
    queue_run(engine, "support")
    claim = run_owner.claim(engine, 100, configure)
    assert claim is not None
    order.pause(engine, "support", WORD)
    failure = run_queue.Failure("no memory", "lower it", retryable=True)
    assert run_queue.fail(engine, claim, failure, 200, RetrySettings()) == "waiting"
    assert run_owner.claim(engine, 10_000_000, configure) is None
