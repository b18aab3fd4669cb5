"""A win that waits and what is against it: a withdrawn drop, a blocked model, a verdict that cannot be read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlmodel import col, select

from daemon.queue.snapshots import waiting_drops
from daemon.state.database import transaction
from daemon.state.layout import FOLDERS
from daemon.state.states import HookState
from daemon.state.tables import Drop, Promotion, Run
from pipeline import durable
from pipeline.contract import LOG_NAME
from tests.chaos.house import DAY, records
from tests.daemon.champions.test_approval import MANUAL, House

PINNED = '[gate]\non = "pinned"\n'


@pytest.fixture
def house(tmp_path: Path) -> House:
    """Give a house in which nobody is asked."""
    return House(tmp_path, PINNED)


def with_two_drops(house: House, outcome: str = "promoted") -> int:
    """Bring a run to its verdict that was made from `good.jsonl` and another drop; return the other one's number."""
    (house.daemon.settings.inbox_folder / "good.jsonl").write_bytes(records("good"))
    run = house.at("decide", outcome)
    with transaction(house.daemon.engine) as session:
        return session.exec(select(Drop.id).where(Drop.name == f"{run}.jsonl")).one() or 0


def with_an_exam(house: House, outcome: str = "promoted") -> int:
    """Bring a run to its verdict by a held-out drop; return the number of that."""
    (house.daemon.settings.inbox_folder / "heldout" / "exam.jsonl").write_bytes(records("exam"))
    run = house.at("decide", outcome)
    (exam,) = (int(str(drop["id"])) for drop in house.row(run).snapshot or () if drop["role"] == "heldout")
    return exam


def runs(house: House) -> list[tuple[str | None, list[str]]]:
    """Return the outcome of each run, and the names of the drops that it was made from."""
    with transaction(house.daemon.engine) as session:
        rows = session.exec(select(Run).order_by(col(Run.id))).all()
    return [(row.outcome or row.state, [str(drop["name"]) for drop in row.snapshot or ()]) for row in rows]


def waiting(house: House) -> int:
    with transaction(house.daemon.engine) as session:
        return waiting_drops(session, "default")


# --- what else was new in it


def test_the_other_drops_of_a_win_that_a_withdrawn_one_stops_are_trained_on_without_it(house: House) -> None:
    house.withdraw(with_two_drops(house))
    house.daemon.finish_runs(house.now, "promoted")
    assert runs(house) == [("overtaken", ["good.jsonl", "1.jsonl"]), ("promoted", ["good.jsonl"])]
    assert house.serves == (1, b"weights of run 2")


@pytest.mark.parametrize("second", ["promoted", "worse"])
@pytest.mark.parametrize("first", ["worse", "guard_failed"])
def test_a_bad_verdict_on_a_withdrawn_drop_holds_no_other_back_before_it_was_judged_without(
    house: House, first: str, second: str
) -> None:
    bad = with_two_drops(house, first)
    house.withdraw(bad)
    house.daemon.dispatcher.tick(house.now)
    assert (house.row(1).outcome, house.drop_state(3 - bad)) == (first, "accepted")
    house.daemon.finish_runs(house.now, second)
    assert runs(house) == [(first, ["good.jsonl", "1.jsonl"]), (second, ["good.jsonl"])]
    # What was bad without it is: the withdrawal clears nobody.
    assert house.drop_state(3 - bad) == ("accepted" if second == "promoted" else "suspended")
    assert house.drop_state(bad) == "withdrawn"


def test_a_bad_verdict_by_a_held_out_drop_that_was_withdrawn_holds_no_drop_back(house: House) -> None:
    (house.daemon.settings.inbox_folder / "heldout" / "exam.jsonl").write_bytes(records("exam"))
    house.run()
    house.at("decide", "worse")
    (exam,) = (int(str(drop["id"])) for drop in house.row(2).snapshot or () if drop["role"] == "heldout")
    house.withdraw(exam)
    house.daemon.finish_runs(house.now, "promoted")
    assert [house.drop_state(drop) for drop in (1, 2, 3) if drop != exam] == ["accepted", "accepted"]
    assert runs(house)[1:] == [("worse", ["exam.jsonl", "1.jsonl", "2.jsonl"]), ("promoted", ["1.jsonl", "2.jsonl"])]


@pytest.mark.parametrize("settings", [PINNED, MANUAL])
@pytest.mark.parametrize("outcome", ["promoted", "not_shown_better"])
def test_a_verdict_by_a_held_out_drop_that_was_withdrawn_clears_nobody(
    tmp_path: Path, outcome: str, settings: str
) -> None:
    house = House(tmp_path, settings)
    house.withdraw(with_an_exam(house, outcome))
    house.daemon.finish_runs(house.now, "worse")
    house.runs = 2
    house.run("worse")
    with transaction(house.daemon.engine) as session:
        states = dict(session.exec(select(Drop.name, Drop.state)).all())
    assert states == {"exam.jsonl": "withdrawn", "1.jsonl": "suspended", "3.jsonl": "suspended"}


def test_a_win_by_a_held_out_drop_clears_its_drops_once_it_is_promoted_all_the_same(tmp_path: Path) -> None:
    house = House(tmp_path, MANUAL)
    exam = with_an_exam(house)
    house.daemon.dispatcher.tick(house.now)
    house.withdraw(exam)
    house.force(1)
    house.daemon.finish_runs(house.now, "worse")
    assert [house.drop_state(drop) for drop in (1, 2) if drop != exam] == ["accepted"]


@pytest.mark.parametrize("outcome", ["promoted", "worse"])
def test_what_an_earlier_run_had_without_a_verdict_is_trained_on_without_it_too(house: House, outcome: str) -> None:
    house.run("insufficient_evidence")
    house.at("decide", outcome)
    house.withdraw(2)
    house.daemon.finish_runs(house.now, "worse")
    assert runs(house)[2:] == [("worse", ["1.jsonl"])]
    assert house.drop_state(1) == "suspended"


def test_a_withdrawn_drop_that_is_old_excuses_nothing(house: House) -> None:
    house.run()
    house.at("decide", "worse")
    house.withdraw(1)
    house.daemon.finish_runs(house.now)
    assert (house.drop_state(2), len(runs(house))) == ("suspended", 2)


def test_a_bad_verdict_on_withdrawn_drops_alone_starts_nothing(house: House) -> None:
    house.at("decide", "worse")
    house.withdraw(1)
    house.daemon.finish_runs(house.now)
    assert [outcome for outcome, _ in runs(house)] == ["worse"]


@pytest.mark.parametrize("second", ["not_shown_better", "worse"])
def test_a_loss_of_the_run_without_it_leaves_the_stopped_win_waiting(house: House, second: str) -> None:
    bad = with_two_drops(house)
    house.withdraw(bad)
    house.daemon.dispatcher.tick(house.now)
    assert house.row(1).outcome == "awaiting_approval"
    house.daemon.finish_runs(house.now, second)
    assert [outcome for outcome, _ in runs(house)] == ["awaiting_approval", second]
    assert waiting(house) == 0
    # The win says nothing for the other drop, since the withdrawn one may be all that won.
    assert house.drop_state(3 - bad) == ("suspended" if second == "worse" else "accepted")


def test_at_night_the_other_drops_are_new_again(house: House) -> None:
    house.withdraw(with_two_drops(house))
    path = house.folder / "dropforge.toml"
    path.write_text(path.read_text().replace('trigger = "both"', 'trigger = "nightly"'))
    daemon = house.restart("")
    daemon.night(house.now)  # nights count from the first look
    daemon.finish_runs(house.now, "promoted")
    assert [outcome for outcome, _ in runs(house)] == ["awaiting_approval"]
    assert waiting(house) == 1
    daemon.night(house.now + DAY)
    daemon.finish_runs(house.now + DAY, "promoted")
    assert runs(house)[1] == ("promoted", ["good.jsonl"])


def test_where_only_withdrawn_drops_were_new_nothing_is_started(house: House) -> None:
    house.run()
    house.at("decide")
    house.withdraw(2)
    house.daemon.finish_runs(house.now, "promoted")
    assert [outcome for outcome, _ in runs(house)] == ["promoted", "awaiting_approval"]
    assert waiting(house) == 0


def test_an_older_drop_that_is_withdrawn_costs_the_new_one_nothing(house: House) -> None:
    house.run()
    house.at("decide")
    house.withdraw(1)
    house.daemon.finish_runs(house.now, "promoted")
    assert runs(house)[1:] == [("overtaken", ["1.jsonl", "2.jsonl"]), ("promoted", ["2.jsonl"])]


def test_it_takes_a_withdrawal_to_stop_the_next_run(house: House) -> None:
    bad = with_two_drops(house)
    house.withdraw(bad)
    house.daemon.dispatcher.tick(house.now)
    house.daemon.until("decide", house.now, "promoted")
    house.withdraw(3 - bad)
    house.daemon.finish_runs(house.now, "promoted")
    house.daemon.finish_runs(house.now + DAY, "promoted")
    assert [outcome for outcome, _ in runs(house)] == ["awaiting_approval"] * 2


def test_where_a_person_is_asked_the_run_without_it_is_made_too(tmp_path: Path) -> None:
    house = House(tmp_path, MANUAL)
    house.withdraw(with_two_drops(house))
    house.daemon.finish_runs(house.now, "promoted")
    assert runs(house) == [("awaiting_approval", ["good.jsonl", "1.jsonl"]), ("awaiting_approval", ["good.jsonl"])]
    assert house.approve(2).generation == 1
    assert house.row(1).outcome == "overtaken"


def test_a_drop_that_is_withdrawn_while_its_win_waits_lets_the_others_be_trained_on(tmp_path: Path) -> None:
    house = House(tmp_path, MANUAL)
    bad = with_two_drops(house)
    house.daemon.finish_runs(house.now, "promoted")
    assert waiting(house) == 0
    house.withdraw(bad)
    assert waiting(house) == 1
    house.daemon.finish_runs(house.now, "promoted")
    assert runs(house) == [("awaiting_approval", ["good.jsonl", "1.jsonl"]), ("awaiting_approval", ["good.jsonl"])]
    house.withdraw(3 - bad)
    house.daemon.finish_runs(house.now + DAY, "promoted")
    assert len(runs(house)) == 2


# --- what is said of it


def test_the_log_says_of_a_stopped_win_what_is_against_it(house: House) -> None:
    run = house.at("decide")
    house.withdraw(1)
    with structlog.testing.capture_logs() as logged:
        house.daemon.finish_runs(house.now, "promoted")
    (told,) = [one for one in logged if one["event"] == "run_finished"]
    assert told["outcome"] == "awaiting_approval"
    against = "it was trained on drop 1 (1.jsonl), withdrawn since: the customer asked for it"
    assert told["sentence"].startswith(f"won, but {against} (dropforge promote {run} --force --reason TEXT takes it")


def test_withdrawing_names_the_run_that_it_starts(tmp_path: Path, dropforge: Callable[..., Any]) -> None:
    house = House(tmp_path, MANUAL)
    bad = with_two_drops(house)
    house.daemon.finish_runs(house.now, "promoted")
    said = dropforge("drops", "withdraw", str(bad), "--reason", "deletion").out.splitlines()
    assert said[2:] == ["run 2 is queued: it trains on what else was new in run 1, without the withdrawn drops"]
    said = dropforge("drops", "withdraw", str(3 - bad), "--reason", "deletion").out.splitlines()
    assert len(said) == 2, "nothing else was new"


def test_withdrawing_a_held_out_drop_says_when_a_corrected_one_has_to_be_there(
    tmp_path: Path, dropforge: Callable[..., Any]
) -> None:
    house = House(tmp_path, MANUAL)
    exam = with_an_exam(house)
    house.daemon.dispatcher.tick(house.now)
    said = dropforge("drops", "withdraw", str(exam), "--reason", "wrong answers").out.splitlines()
    assert said[1].startswith("run 1 won with it and waits for approval")
    assert said[2] == "run 2 is queued: it trains on what else was new in run 1, without the withdrawn drops"
    assert "drop it before that run begins" in said[3]


def test_withdrawing_names_what_was_held_back_with_the_drop(house: House, dropforge: Callable[..., Any]) -> None:
    bad = with_two_drops(house, "worse")
    house.daemon.dispatcher.tick(house.now)
    said = dropforge("drops", "withdraw", str(bad), "--reason", "wrong answers").out.splitlines()
    way = f"if that was all that was wrong: dropforge drops restore {3 - bad} --reason TEXT"
    assert said[1:] == [f"drop {3 - bad} is suspended for run 1, which had this one, too; {way}"]


def test_a_run_whose_bad_verdict_holds_nothing_says_why(house: House, dropforge: Callable[..., Any]) -> None:
    bad = with_two_drops(house, "worse")
    house.withdraw(bad)
    with structlog.testing.capture_logs() as logged:
        house.daemon.dispatcher.tick(house.now)
    kept = "no drop is suspended for this, and what else was new is trained on without it"
    why = f"Drop {bad} (1.jsonl) was withdrawn meanwhile: {kept}"
    (told,) = [one for one in logged if one["event"] == "run_finished"]
    assert why in told["sentence"]
    assert why in dropforge("show", "1").out


def test_the_way_back_that_is_named_is_not_to_an_unhealthy_model(house: House, dropforge: Callable[..., Any]) -> None:
    for _ in range(2):
        house.run()
    with transaction(house.daemon.engine) as session:
        row = session.exec(select(Promotion).where(Promotion.generation == 1)).one()
        row.health_state = HookState.FAILED
        session.add(row)
    assert "rollback --track default --to 0 " in dropforge("drops", "withdraw", "2", "--reason", "deletion").out


def test_where_a_former_champion_was_rolled_back_from_it_is_not_said_to_have_withdrawn_drops(
    house: House, dropforge: Callable[..., Any]
) -> None:
    run = house.run()
    house.back()
    house.force(run)
    house.back()
    house.back(1)
    said = dropforge("drops", "withdraw", "1", "--reason", "deletion").out
    assert "every former one has withdrawn drops, lost its place by a rollback or is gone: dropforge history" in said


def test_the_champion_that_is_named_was_trained_on_no_withdrawn_drop(
    house: House, dropforge: Callable[..., Any]
) -> None:
    for _ in range(2):
        house.run()
    house.withdraw(1)
    said = dropforge("drops", "withdraw", "2", "--reason", "deletion").out
    assert "generation 2, was trained on it; to let the latest one without withdrawn drops serve: " in said
    assert "dropforge rollback --track default --to 0 --reason TEXT" in said


def test_where_every_former_champion_has_a_withdrawn_drop_none_is_named(
    house: House, dropforge: Callable[..., Any]
) -> None:
    for _ in range(2):
        house.run()
    house.withdraw(1)
    (house.folder / "base").rename(house.folder / "elsewhere")
    said = dropforge("drops", "withdraw", "2", "--reason", "deletion").out
    words = "every former one has withdrawn drops, lost its place by a rollback or is gone"
    assert f"generation 2, was trained on it; {words}: dropforge history --track default\n" in said
    assert "dropforge rollback" not in said


def test_withdrawing_does_not_say_of_a_blocked_win_that_it_waits(tmp_path: Path, dropforge: Callable[..., Any]) -> None:
    house = House(tmp_path, MANUAL)
    run = house.blocked_win()
    said = dropforge("drops", "withdraw", str(run), "--reason", "deletion").out
    assert said == f"drop {run} ({run}.jsonl) is withdrawn: no later run of track default uses it\n"


def test_a_win_of_a_blocked_model_is_over_and_is_not_trained_again_every_night(
    house: House, dropforge: Callable[..., Any]
) -> None:
    first = house.run()
    house.back()
    run = house.at("decide")
    # The new drop repeats old rows: the same data makes the same model.
    identity = durable.read_json(house.root / f"runs/{first}/merge.json")["model_id"]
    (path,) = (house.root / f"runs/{run}/attempts").glob("decide-*/result.json")
    result = durable.read_json(path)
    result["artifact"]["candidate_model_id"] = identity
    durable.write_json(path, result)
    house.daemon.finish_runs(house.now)
    assert house.row(run).state == "succeeded"
    assert house.serves == (2, b"base weights")
    assert (waiting(house), runs(house)[-1][0]) == (0, "awaiting_approval")
    said = dropforge("status").out
    assert "won, but its model is blocked: the track was rolled back to generation 0: it swears" in said
    assert "waits for approval" not in said


DAMAGED = (b"{", b"[]", b"", b"\xff", b'{"outcome": "promoted"}', b'{"candidate_model_id": []}')


@pytest.mark.parametrize("damage", DAMAGED)
def test_one_damaged_verdict_is_named_where_it_is_asked_for_and_ends_nothing_else(
    tmp_path: Path, dropforge: Callable[..., Any], damage: bytes
) -> None:
    house = House(tmp_path, MANUAL)
    run = house.run()
    log = next((house.root / f"runs/{run}/attempts").glob("train-*")) / LOG_NAME
    log.write_text("trained\n")
    path = house.root / f"runs/{run}/decide.json"
    path.write_bytes(damage)
    for words in (("status",), ("status", "--json"), ("runs",), ("champion",), ("history",), ("logs", str(run))):
        done = dropforge(*words)
        assert (done.code in {0, 69}, done.err) == (True, ""), words
    assert f"run {run} of track default won, waits for approval" in dropforge("status").out
    for words in (("show", str(run)), ("promote", str(run)), ("report", str(run))):
        done = dropforge(*words)
        assert done.code == 1, words
        assert f"error: the verdict of run {run} is damaged: {path}\nhint: bring runs/{run}/decide.json" in done.err
    assert f"or: dropforge promote {run} --force --reason TEXT" in dropforge("promote", str(run)).err
    assert dropforge("drops", "withdraw", "1", "--reason", "deletion").err == ""
    assert house.force(run).generation == 1


# --- the folders that rights are tried in


def test_every_folder_that_is_made_in_the_state_folder_is_known(house: House, dropforge: Callable[..., Any]) -> None:
    house.run()
    assert dropforge("backup").code == 0
    made = {path.name for path in house.root.iterdir() if path.is_dir()}
    assert {"backups", "drops", "incoming", "models", "predictions", "runs", "spool", "tracks"} <= made <= {*FOLDERS}
