from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlmodel import Session, select

from daemon.queue import order, run_queue, states
from daemon.queue.states import Claim
from daemon.state.database import migrate, open_engine, transaction
from daemon.state.states import TRIAL
from daemon.state.tables import Drop, Event, Run, Track
from pipeline.config import RunConfig
from pipeline.errors import DropforgeError
from tests import run_owner


def configure(_session: Session, track: Track) -> RunConfig:
    return RunConfig(track=track.name, base_model="/base", base_model_id="b" * 64, salt=track.salt)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    migrate(tmp_path / "state.db")
    return open_engine(tmp_path / "state.db")


def queue_runs(engine: Engine, *names: str) -> list[int]:
    """Queue a run a track."""
    numbers = []
    for name in names:
        with transaction(engine) as session:
            states.ensure_track(session, name, 0)
            session.add(
                Drop(
                    track=name,
                    role="train",
                    state="accepted",
                    name_bytes=b"a.jsonl",
                    name="a.jsonl",
                    sha256=name * 8,
                    size_bytes=10,
                    rows=5,
                    received_at=1,
                )
            )
            session.flush()
            numbers.append(run_queue.enqueue(session, name, "drop", 0, 0).id or 0)
    return numbers


def claim(engine: Engine, now: int = 100) -> Claim:
    found = run_owner.claim(engine, now, configure)
    assert found is not None
    return found


def goes(engine: Engine) -> list[int]:
    """Return the numbers of the runs in the order in which they may be claimed now."""
    with transaction(engine) as session:
        return [run.id or 0 for run in order.due_runs(session, 100)]


def test_a_run_goes_to_the_front(engine: Engine) -> None:
    queue_runs(engine, "a", "b", "c")
    assert order.move_first(engine, 3, 50, "ada") == [3, 1, 2]
    assert goes(engine) == [3, 1, 2]
    assert claim(engine).run_id == 3


def test_a_later_move_to_the_front_goes_before_an_earlier_one(engine: Engine) -> None:
    queue_runs(engine, "a", "b", "c")
    order.move_first(engine, 2, 50, "ada")
    order.move_first(engine, 3, 51, "ada")
    assert goes(engine) == [3, 2, 1]


def test_what_comes_later_goes_behind_what_was_moved(engine: Engine) -> None:
    queue_runs(engine, "a", "b")
    order.move_first(engine, 2, 50, "ada")
    queue_runs(engine, "c")
    assert goes(engine) == [2, 1, 3]


def test_trials_stay_last_where_nobody_moved_them(engine: Engine) -> None:
    queue_runs(engine, "a", "b")
    with transaction(engine) as session:
        run = session.get_one(Run, 1)
        run.trigger = TRIAL
        session.add(run)
    queue_runs(engine, "c")
    assert goes(engine) == [2, 3, 1]
    order.move_first(engine, 3, 50, "ada")
    assert goes(engine) == [3, 2, 1]
    order.move_first(engine, 1, 51, "ada")
    assert goes(engine) == [1, 3, 2]


def test_an_interrupted_run_goes_on_first_though_another_was_moved_to_the_front_meanwhile(engine: Engine) -> None:
    queue_runs(engine, "a", "b", "c")
    running = claim(engine)
    assert order.move_first(engine, 3, 150, "ada") == [3, 2]
    run_queue.interrupt(engine, running, 90)
    assert goes(engine) == [1, 3, 2]


def test_a_person_may_put_a_run_before_one_that_waits(engine: Engine) -> None:
    queue_runs(engine, "a", "b")
    run_queue.interrupt(engine, claim(engine), 90)
    assert goes(engine) == [1, 2]
    order.move_first(engine, 2, 95, "ada")
    assert goes(engine) == [2, 1]


def test_a_moved_run_still_waits_for_its_own_time(engine: Engine) -> None:
    queue_runs(engine, "a", "b")
    with transaction(engine) as session:
        run_queue.enqueue(session, "b", "drop", 0, 500)
    order.move_first(engine, 2, 50, "ada")
    assert goes(engine) == [1]


def test_a_retried_run_has_lost_its_place(engine: Engine) -> None:
    queue_runs(engine, "a", "b")
    order.move_first(engine, 2, 50, "ada")
    run_queue.cancel(engine, 2, 60)
    run_queue.retry(engine, 2, 70)
    assert goes(engine) == [1, 2]


def test_what_cannot_be_moved_is_refused(engine: Engine) -> None:
    queue_runs(engine, "a", "b", "c")
    running = claim(engine)
    run_queue.cancel(engine, 3, 60)
    for run, words in (
        (running.run_id, "run 1 is running: only a queued or waiting run can be moved"),
        (3, "run 3 was cancelled: only"),
        (9, "there is no run 9"),
    ):
        with pytest.raises(DropforgeError, match=words):
            order.move_first(engine, run, 70, "ada")
    assert goes(engine) == [2]


def test_a_move_leaves_an_event_with_its_person(engine: Engine) -> None:
    queue_runs(engine, "a", "b")
    order.move_first(engine, 2, 50, "ada")
    with transaction(engine) as session:
        found = session.exec(select(Event).where(Event.kind == "run_moved")).all()
    assert [(one.run_id, one.track, one.detail) for one in found] == [(2, "b", {"by": "ada"})]
