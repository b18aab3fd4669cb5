"""A drop is withdrawn, and whatever was made from it and has not served yet ends, in each state of a run."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from sqlmodel import col, select

from daemon.champions import decisions, promotion
from daemon.queue.snapshots import waiting_drops
from daemon.queue.states import Cancelled
from daemon.state.database import transaction
from daemon.state.tables import Drop, Run
from tests.chaos.house import records
from tests.daemon.champions.test_approval import MANUAL, House

PINNED = '[gate]\non = "pinned"\n'
WHY = "drop {} ({}) was withdrawn"


@pytest.fixture
def house(tmp_path: Path) -> House:
    """Give a house in which nobody is asked."""
    return House(tmp_path, PINNED)


@pytest.fixture
def asking(tmp_path: Path) -> House:
    """Give a house in which a person is asked."""
    return House(tmp_path, MANUAL)


def with_good(house: House, step: str, outcome: str = "promoted") -> int:
    """Bring a run of `good.jsonl` and another drop to the result of `step`; return the other one's number."""
    (house.daemon.settings.inbox_folder / "good.jsonl").write_bytes(records("good"))
    run = house.at(step, outcome)
    with transaction(house.daemon.engine) as session:
        return session.exec(select(Drop.id).where(Drop.name == f"{run}.jsonl")).one() or 0


def runs(house: House) -> list[tuple[str, list[str]]]:
    """Return the outcome of each run, or its state, and the names of the drops that it was made from."""
    with transaction(house.daemon.engine) as session:
        rows = session.exec(select(Run).order_by(col(Run.id))).all()
        names = dict(session.exec(select(Drop.id, Drop.name)).all())
    return [(row.outcome or row.state, [names[drop] for drop in row.snapshot or ()]) for row in rows]


def unseen(house: House) -> int:
    with transaction(house.daemon.engine) as session:
        return waiting_drops(session, "default")


# --- in each state of a run


@pytest.mark.parametrize(("step", "outcome"), [("train", "promoted"), ("decide", "promoted"), ("decide", "worse")])
def test_a_running_run_ends_at_each_step_and_nothing_follows_from_its_verdict(
    house: House, step: str, outcome: str
) -> None:
    bad = with_good(house, step, outcome)
    house.withdraw(bad)
    assert (house.row(1).state, house.row(1).cancel_requested) == ("running", True)
    assert (house.row(1).error, unseen(house)) == (WHY.format(bad, "1.jsonl"), 1)
    house.daemon.finish_runs(house.now, "promoted")
    assert runs(house) == [("cancelled", ["good.jsonl", "1.jsonl"]), ("promoted", ["good.jsonl"])]
    assert house.serves == (1, b"weights of run 2")
    assert (house.drop_state(bad), house.drop_state(3 - bad)) == ("withdrawn", "accepted")


def test_a_waiting_run_ends_at_once(house: House) -> None:
    bad = with_good(house, "train")
    house.daemon.dispatcher.abandon(house.now)
    assert house.row(1).state == "waiting"
    house.withdraw(bad)
    assert house.row(1).state == "cancelled"
    house.daemon.finish_runs(house.now, "promoted")
    assert runs(house)[1:] == [("promoted", ["good.jsonl"])]


def test_a_promoted_run_is_left_as_it_is(house: House) -> None:
    house.run()
    serves = house.serves
    house.withdraw(1)
    house.daemon.finish_runs(house.now, "promoted")
    assert (runs(house), house.serves) == ([("promoted", ["1.jsonl"])], serves)


def test_a_promotion_that_a_full_disk_stopped_is_not_tried_again_for_a_withdrawn_drop(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_good(house, "decide")
    with monkeypatch.context() as broken:
        broken.setattr(promotion, "fsync_folder", Mock(side_effect=OSError(errno.ENOSPC, "no space left on device")))
        with pytest.raises(OSError, match="no space"):
            house.daemon.dispatcher.tick(house.now)
    house.withdraw(1)
    house.restart(PINNED)
    assert house.serves == (0, b"base weights")
    house.daemon.finish_runs(house.now, "promoted")
    assert [outcome for outcome, _ in runs(house)] == ["cancelled", "promoted"]
    assert house.serves == (1, b"weights of run 2")


def test_a_win_is_not_approved_that_ends_while_its_files_are_checked(
    asking: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = asking.run()
    monkeypatch.setattr(decisions, "check_files", lambda *_: asking.withdraw(1))
    with pytest.raises(Cancelled, match=r"run 1 was cancelled: drop 1 \(1.jsonl\) was withdrawn"):
        asking.approve(run)
    assert asking.serves[0] == 0


def test_a_run_by_a_withdrawn_held_out_drop_ends_too(house: House) -> None:
    (house.daemon.settings.inbox_folder / "heldout" / "exam.jsonl").write_bytes(records("exam"))
    run = house.at("decide", "worse")
    with transaction(house.daemon.engine) as session:
        exam = session.exec(select(Drop.id).where(Drop.role == "heldout")).one() or 0
    assert exam in (house.row(run).snapshot or ())
    house.withdraw(exam)
    house.daemon.finish_runs(house.now, "promoted")
    assert runs(house) == [("cancelled", ["exam.jsonl", "1.jsonl"]), ("promoted", ["1.jsonl"])]


# --- what follows


def test_where_nothing_new_is_left_no_run_is_queued(house: House) -> None:
    house.run()
    house.at("decide")
    house.withdraw(2)
    house.daemon.finish_runs(house.now, "promoted")
    assert [outcome for outcome, _ in runs(house)] == ["promoted", "cancelled"]


# --- what is said of it


def test_withdrawing_names_what_ends_what_begins_and_what_serves(asking: House, dropforge: Callable[..., Any]) -> None:
    asking.force(asking.run("not_shown_better"))
    asking.run()
    asking.at("prepare")
    said = dropforge("drops", "withdraw", "1", "--reason", "deletion").out.splitlines()
    assert said == [
        "drop 1 (1.jsonl) is withdrawn: no later run of track default uses it",
        "run 2 is cancelled with it",
        "run 3 is cancelled with it",
        "run 4 is queued: it trains on what else is new, without that drop",
        (
            "the champion of track default, generation 1, was trained on it; to let the latest one without withdrawn "
            "drops serve: dropforge rollback --track default --to 0 --reason TEXT"
        ),
    ]


def test_the_verdict_of_a_run_that_was_cancelled_is_not_told(asking: House, dropforge: Callable[..., Any]) -> None:
    run = asking.run()
    asking.withdraw(1)
    for words in (("status",), ("runs",), ("show", str(run))):
        said = dropforge(*words).out
        assert WHY.format(1, "1.jsonl") in said, words
        assert "promoted" not in said, words
        assert "waits for approval" not in said, words
    assert dropforge("show", str(run), "--json").json["run"]["verdict"] is None
