"""How a search for the drop that made a run worse is told: to whoever asks, and to whoever drops the file again."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from sqlmodel import Session

from daemon.queue import leave_one_out, suspects
from daemon.queue.states import Claim
from daemon.settings.model import SuspectSettings
from daemon.state.database import transaction
from daemon.state.tables import Run
from daemon.state.troubles import Troubles
from daemon.views.overview import Overview
from pipeline import durable
from pipeline.artifacts import TrialScores
from tests import run_owner
from tests.daemon.conftest import MODEL_ID
from tests.made_artifacts import made_report, made_spec
from tests.run_owner import WORSE, end

Command = Callable[..., Any]


def record(word: str) -> str:
    return json.dumps({"instruction": f"say {word}", "output": word}) + "\n"


def go_on(made: Any) -> Claim:
    """Queue what comes next in the search, and begin it."""
    suspects.go_on(made.engine, made.settings, made.tick(), Troubles())
    claim: Claim = made.claim()
    return claim


def suspend(made: Any) -> None:
    """Let drop 3 be worse in its trial, and than the control."""
    end(made, go_on(made))
    control = go_on(made)
    scores = TrialScores(groups=120, wins=5, losses=23, p_value=0.001)
    folder = made.attempt(control, "evaluate")
    report = made_report(made_spec(made.settings.work_folder, "evaluate", run=control.run_id), trial=scores)
    durable.write_json(folder.parents[1] / "evaluate.json", report.model_dump(mode="json"))
    end(made, control, WORSE.model_copy(update={"outcome": "not_shown_better"}))


def leave_out(made: Any) -> None:
    """Queue a run without a drop of the champion's."""
    wanted = made.settings.model_copy(update={"suspects": SuspectSettings(leave_one_out=True)})
    leave_one_out.go_on(made.engine, wanted, leave_one_out.tracks_of(wanted), made.tick(), Troubles(), (0, 0))


def lose(made: Any, points: float) -> None:
    """End the next run, which left a drop out, with a candidate that has so many points less than the champion."""
    interval = (-points - 1.4, -points + 1.0)
    said = WORSE.model_copy(update={"gain": -points, "interval": interval, "champion_model_id": MODEL_ID})

    def still(session: Session, run: Run) -> None:
        leave_one_out.follow_verdict(session, run, said, made.now)

    run_owner.finish(made.engine, made.claim(), (said.outcome, said), made.tick(), still)


@pytest.fixture
def searched(new_workspace: Callable[[], Any]) -> Any:
    """A workspace with a champion, and a run on two further drops that was worse."""
    made = new_workspace()
    made.win("honest")
    made.take("b.jsonl", record("b"))
    made.take("c.jsonl", record("c"))
    end(made, made.claim())
    return made


def words(command: Any) -> list[str]:
    """Return the lines that a command printed, each with one blank between its words."""
    return [" ".join(line.split()) for line in command.out.splitlines()]


def test_drops_on_trial_are_told_before_and_during_their_trial(searched: Any, dropforge: Command) -> None:
    lines = words(dropforge("drops"))
    tried = "it may have made run 2 worse; it is tried when nothing else is to be run"
    assert [line.endswith(tried) and "on trial" in line for line in lines[1:4]] == [True, True, False]
    suspects.go_on(searched.engine, searched.settings, searched.tick(), Troubles())
    lines = words(dropforge("drops"))
    assert lines[1].endswith("c.jsonl: it may have made run 2 worse; run 3 tries it")
    assert lines[2].endswith(tried)
    told = {drop["id"]: drop["on_trial"] for drop in json.loads(dropforge("drops", "--json").out)["drops"]}
    assert told == {1: None, 2: tried, 3: "it may have made run 2 worse; run 3 tries it"}


def test_a_drop_on_trial_is_not_counted_as_accepted(searched: Any, dropforge: Command) -> None:
    assert Overview.of(searched.settings).drop_counts() == {"default": {"accepted": 1, "on trial": 2}}
    assert any(line.endswith("1 accepted, 2 on trial") for line in words(dropforge("status")))


def test_a_trial_is_told_as_what_it_is_from_its_place_in_the_queue_to_its_end(
    searched: Any, dropforge: Command
) -> None:
    suspects.go_on(searched.engine, searched.settings, searched.tick(), Troubles())
    said = "tries drop 3, which may have made run 2 worse"
    assert any(line.endswith(f"{said}; begins in its turn") for line in words(dropforge("status")))
    assert any(line.endswith(f"{said}; begins in its turn") for line in words(dropforge("runs")))
    claim = searched.claim()
    searched.attempt(claim, "train", None)
    assert any(said in line and "train" in line for line in words(dropforge("runs")))
    end(searched, claim)
    over = "tried drop 3, which might have made run 2 worse"
    assert any(line.endswith(f"worse: −9.0 points; {over}") for line in words(dropforge("runs")))
    assert any(line.endswith(f"worse: −9.0 points; {over}") for line in words(dropforge("status")))
    assert over in words(dropforge("show", "3"))
    assert Overview.of(searched.settings).run(3).trial == over
    go_on(searched)
    lines = words(dropforge("drops"))
    assert lines[1].endswith("it may have made run 2 worse; run 3 was worse, too; a control without it decides")
    assert "control of the trial of drop 3, trained without it; beginning" in words(dropforge("show", "4"))
    shown = json.loads(dropforge("show", "4", "--json").out)["run"]
    assert (shown["trigger"], shown["purpose"], shown["about_drop"]) == ("idle", "control", 3)


def test_a_suspended_drop_says_by_which_runs_and_how_to_look(searched: Any, dropforge: Command) -> None:
    suspend(searched)
    lines = words(dropforge("drops"))
    why = (
        "run 2 was worse with it, and so was run 3, which tried it alone; the control, run 4, was better on 23 "
        "and worse on 5 of 120 groups of records: dropforge report 3"
    )
    assert "suspended" in lines[1]
    assert why in lines[1]
    assert ("on trial" in lines[2], "accepted" in lines[2]) == (False, True)


def test_a_run_that_leaves_a_drop_out_says_so_and_the_drop_what_it_is_worth_and_the_mean(
    new_workspace: Callable[[], Any], dropforge: Command
) -> None:
    made = new_workspace()
    made.win("a", "b")
    leave_out(made)
    tries = "tries the champion's data without drop 1; begins in its turn"
    assert any(line.endswith(tries) for line in words(dropforge("status")))
    lose(made, 1.8)
    assert "tried the champion's data without drop 1" in words(dropforge("show", "2"))
    lines = words(dropforge("drops"))
    worth = ": worth +1.8 points ±1.2 of these two models (run 2)"
    assert [line.partition("jsonl")[2] for line in lines[1:3]] == ["", worth]
    leave_out(made)
    lose(made, -0.6)
    lines = words(dropforge("drops"))
    assert [line.partition(" of these two models ")[2] for line in lines[1:3]] == [
        "(run 3); the mean of 2 drops is +0.6",
        "(run 2); the mean of 2 drops is +0.6",
    ]
    with transaction(made.engine) as session:
        session.get_one(Run, 3).about_champion = "another"
    lines = words(dropforge("drops"))
    assert [line.partition(" of these two models ")[2] for line in lines[1:3]] == ["(run 3)", "(run 2)"]
