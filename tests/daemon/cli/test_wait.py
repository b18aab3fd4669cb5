"""`wait`: each verdict has its exit code, whoever is waited for."""

from collections.abc import Callable
from typing import Any

import pytest

from daemon.cli import wait
from daemon.cli.status import describe_run
from daemon.queue import order, run_queue
from daemon.queue.attempt_ends import Then
from daemon.state.clauses import Suspension, drop_clauses
from daemon.state.database import transaction
from daemon.state.states import DropState
from daemon.state.tables import Drop
from daemon.system.processes import FileLock
from daemon.views.overview import Overview
from pipeline.artifacts import TrialScores
from tests import run_owner
from tests.daemon.cli.conftest import end_running, running

Command = Callable[..., Any]
CODES = (
    ("promoted", 0),
    ("worse", 10),
    ("overtaken", 10),
    ("insufficient_evidence", 11),
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look more often than once a second."""
    monkeypatch.setattr(wait, "_LOOK_SECONDS", 0.01)


@pytest.mark.parametrize(("outcome", "code"), CODES)
def test_the_exit_code_says_which_verdict(alive: Any, dropforge: Command, outcome: str, code: int) -> None:
    end_running(alive, outcome, 1.5)
    ended = dropforge("wait", "3")
    assert (ended.code, "+1.5 points" in ended.out or "needs 200" in ended.out) == (code, True)
    found = dropforge("wait", "3", "--json")
    assert (found.code, found.json["exit_code"], found.json["gain"], found.json["run"]) == (code, code, 1.5, 3)


def test_failed_and_cancelled_runs_have_codes_and_their_reason(alive: Any, dropforge: Command) -> None:
    ended = dropforge("wait", "2")
    assert (ended.code, ended.out) == (13, "run 2 failed: out of memory\n")
    held = [drop.name for drop in Overview.of(alive.settings).drops() if drop.first_run == 3]
    run_queue.cancel(alive.engine, 3, alive.tick())
    run_owner.leave(alive.engine, running(alive), alive.tick(), Then.CANCEL)
    ended = dropforge("wait", "3")
    assert (ended.code, ended.out) == (14, "run 3 was cancelled\n")
    assert held, "and so are those waited for by whom it has given back"
    assert {dropforge("wait", name).code for name in held} == {14}


def test_a_crashed_run_has_failed(alive: Any, dropforge: Command) -> None:
    run_owner.leave(alive.engine, running(alive), alive.tick(), Then.DIE, error="its process vanished", limit=1)
    ended = dropforge("wait", "3")
    assert (ended.code, ended.out) == (13, "run 3 crashed: its process vanished\n")


@pytest.mark.usefixtures("alive")
def test_a_drop_is_waited_for_as_its_run_or_by_what_it_is(dropforge: Command) -> None:
    assert dropforge("wait", "first.jsonl").code == 0
    assert dropforge("wait", "some/where/first.jsonl").code == 0
    assert dropforge("wait", "again.jsonl").code == 0, "a duplicate is waited for as what it repeats"
    ended = dropforge("wait", "bad.jsonl")
    assert (ended.code, ended.out.startswith("drop 4 (bad.jsonl) is rejected: ")) == (65, True)
    assert dropforge("wait", "bad.jsonl", "--json").json["verdict"] == "rejected"


def test_a_suspended_drop_is_told_with_what_its_trial_found_and_what_helps(alive: Any, dropforge: Command) -> None:
    scores = TrialScores(groups=9, wins=1, losses=8, p_value=0.01, lost_drops=(1,))
    found = Suspension(blamed_run=2, trial=3, tested=(2,), control=4, scores=scores)
    with transaction(alive.engine) as session:
        drop = session.get_one(Drop, 2)
        drop.state, drop.first_run, drop.suspension = DropState.SUSPENDED, None, found.model_dump(mode="json")
        clauses = drop_clauses(drop)
    ended = dropforge("wait", "first.jsonl")
    assert len(clauses) > 1
    assert (ended.code, ended.out) == (10, f"drop 2 (first.jsonl) is suspended: {'; '.join(clauses)}\n")


@pytest.mark.usefixtures("alive")
def test_a_timeout_has_its_own_code_and_says_how_far_it_is(dropforge: Command) -> None:
    ended = dropforge("wait", "3", "--timeout", "0")
    assert ended.code == 15
    assert "run 3 is running: train 12/30" in ended.err
    assert "error: no verdict after 0 s: run 3 is running" in ended.err
    found = dropforge("wait", "3", "--timeout", "0", "--json").json
    assert found["error"]["code"] == 15


def test_a_win_that_waits_for_a_person_has_no_verdict_yet(alive: Any, dropforge: Command) -> None:
    end_running(alive, "awaiting_approval", 3.0)
    ended = dropforge("wait", "3", "--timeout", "0")
    assert (ended.code, "waits for approval: dropforge promote 3" in ended.err) == (15, True)


@pytest.mark.usefixtures("lived_in")
def test_without_a_daemon_nobody_waits_but_a_verdict_is_told(dropforge: Command) -> None:
    ended = dropforge("wait", "3")
    assert (ended.code, "the daemon is not running" in ended.err) == (69, True)
    assert dropforge("wait", "1").code == 0


@pytest.mark.usefixtures("quick", "alive")
def test_it_ends_when_the_daemon_has_died_and_does_not_come_back(
    dropforge: Command, daemon_lock: FileLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(run: Any) -> str:
        daemon_lock.release()
        return describe_run(run)

    monkeypatch.setattr("daemon.cli.wait.describe_run", dies)
    monkeypatch.setattr(wait, "GONE_SECONDS", 0.05)
    ended = dropforge("wait", "3")
    assert (ended.code, "the daemon is not running, so no verdict will come" in ended.err) == (69, True)


@pytest.mark.usefixtures("quick")
def test_while_it_waits_it_says_each_new_state(alive: Any, dropforge: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    happens = iter((lambda: None, lambda: None, lambda: end_running(alive, "promoted", 4.0)))
    monkeypatch.setattr("daemon.cli.wait.time.sleep", lambda _seconds: next(happens)())
    ended = dropforge("wait", "3")
    assert (ended.code, ended.out) == (0, "promoted: +4.0 points\n")
    assert [line.partition(",")[0] for line in ended.err.splitlines()] == ["run 3 is running: train 12/30"]


@pytest.mark.usefixtures("quick")
def test_a_file_in_the_inbox_is_waited_for_though_an_older_one_had_its_name(alive: Any, dropforge: Command) -> None:
    inbox = alive.settings.inbox_folder
    (inbox / "first.jsonl").write_text("{}\n")
    ended = dropforge("wait", "first.jsonl", "--timeout", "0")
    assert (ended.code, "lies in the inbox" in ended.err) == (15, True)


def test_a_queued_run_says_what_it_waits_for(busy: Any, dropforge: Command) -> None:
    order.move_first(busy.engine, 5, busy.tick(), "ada")
    ended = dropforge("wait", "case.jsonl", "--track", "support", "--timeout", "0")
    assert (ended.code, "drop 8 (case.jsonl) waits for a run of track support" in ended.err) == (15, True)
