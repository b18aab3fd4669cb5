from typing import Any

import pytest
from sqlalchemy import Engine
from sqlmodel import select

from daemon.queue import order, run_queue
from daemon.queue.attempt_ends import Then
from daemon.state.database import transaction
from daemon.state.events import Word
from daemon.state.states import Purpose
from daemon.state.tables import Event, Run
from pipeline.errors import DropforgeError
from tests import run_owner
from tests.daemon.queue.test_run_queue import queue_run, take
from tests.run_owner import add_drop, configure

WORD = Word("the card is lent out", 50, "ada")


def queue_runs(engine: Engine, *tracks: str) -> list[int]:
    """Queue a run a track."""
    return [queue_run(engine, track) for track in tracks]


def goes(engine: Engine) -> list[int]:
    """Return the numbers of the runs in the order in which they may be claimed now."""
    with transaction(engine) as session:
        return [run.id or 0 for run in order.due_runs(session, 100)]


def test_trials_stay_last_where_nobody_moved_them(engine: Engine) -> None:
    queue_runs(engine, "a", "b")
    with transaction(engine) as session:
        run = session.get_one(Run, 1)
        run.purpose, run.about_drop = Purpose.LEFT_OUT, add_drop(session)
        session.add(run)
    queue_runs(engine, "c")
    assert goes(engine) == [2, 3, 1]
    order.move_first(engine, 3, 50, "ada")
    assert goes(engine) == [3, 2, 1]
    order.move_first(engine, 1, 51, "ada")
    assert goes(engine) == [1, 3, 2]


def test_an_interrupted_run_goes_on_first_though_another_was_moved_to_the_front_meanwhile(engine: Engine) -> None:
    queue_runs(engine, "a", "b", "c")
    running = take(engine)
    assert order.move_first(engine, 3, 150, "ada") == [3, 2]
    run_owner.leave(engine, running, 90, Then.INTERRUPT)
    assert goes(engine) == [1, 3, 2]


def test_a_retried_run_has_lost_its_place(engine: Engine) -> None:
    queue_runs(engine, "a", "b")
    order.move_first(engine, 2, 50, "ada")
    run_queue.cancel(engine, 2, 60)
    run_owner.retry(engine, 2, 70)
    assert goes(engine) == [1, 2]


def test_what_cannot_be_moved_is_refused(engine: Engine) -> None:
    queue_runs(engine, "a", "b", "c")
    running = take(engine)
    run_queue.cancel(engine, 3, 60)
    for run, words in (
        (running.run_id, "run 1 is running: only a queued or waiting run can be moved"),
        (3, "run 3 was cancelled: only"),
        (9, "there is no run 9"),
    ):
        with pytest.raises(DropforgeError, match=words):
            order.move_first(engine, run, 70, "ada")
    assert goes(engine) == [2]


# --- a paused track


def events(engine: Engine) -> list[tuple[str, dict[str, Any]]]:
    with transaction(engine) as session:
        return [(row.kind, row.detail) for row in session.exec(select(Event)).all() if row.kind.startswith("track_")]


def test_a_paused_track_begins_no_run_until_it_is_resumed_and_others_go_on(engine: Engine) -> None:
    (run,) = queue_runs(engine, "support")
    (other,) = queue_runs(engine, "legal")
    order.pause(engine, "support", WORD)
    held = take(engine)
    assert held.run_id == other
    assert run_owner.claim(engine, 100, configure) is None
    assert order.next_due(engine) is None
    order.resume(engine, "support", Word("", 200, "ada"))
    held = take(engine, 300)
    assert held.run_id == run
    assert events(engine)[-2:] == [
        ("track_paused", {"reason": "the card is lent out", "by": "ada"}),
        ("track_resumed", {"reason": "", "by": "ada"}),
    ]
    order.pause(engine, "support", WORD)
    assert run_owner.leave(engine, held, 320, Then.INTERRUPT) == "waiting"
    assert run_owner.claim(engine, 330, configure) is None, "nor does one go on that was running"


def test_pausing_twice_and_resuming_what_is_not_paused_are_refused(engine: Engine) -> None:
    order.pause(engine, "support", WORD)
    with pytest.raises(DropforgeError, match="paused already: the card is lent out") as refused:
        order.pause(engine, "support", Word("another", 60, "bob"))
    assert refused.value.hint == "to resume: dropforge resume support"
    order.resume(engine, "support", WORD)
    for name in ("support", "unknown"):
        with pytest.raises(DropforgeError, match=f"track {name} is not paused"):
            order.resume(engine, name, WORD)
