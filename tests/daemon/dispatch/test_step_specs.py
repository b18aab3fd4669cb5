"""What a step is told of other runs: the one that its own repeats, the one whose adapter the champion has."""

from collections.abc import Callable
from typing import Any

import pytest

from daemon.dispatch.step_specs import spec_of
from daemon.queue import drops, leave_one_out, suspects
from daemon.queue.states import Claim
from daemon.settings.model import SuspectSettings
from daemon.state.database import transaction
from daemon.state.events import Word
from daemon.state.states import DropState
from daemon.state.tables import Attempt, Drop, Promotion, Run
from daemon.state.troubles import Troubles
from pipeline import durable
from pipeline.contract import StepSpec
from pipeline.steps import STEPS
from tests import run_owner
from tests.daemon.conftest import MODEL_ID

ROW = '{{"instruction": "say {0}", "output": "{0}"}}\n'


def end_worse(made: Any, claim: Claim, champion: str) -> None:
    said = run_owner.WORSE.model_copy(update={"gain": -9.0, "champion_model_id": champion})
    made.attempt(claim, "decide")
    path = made.settings.state_folder / "runs" / str(claim.run_id) / "decide.json"
    durable.write_json(path, said.model_dump(mode="json"))
    run_owner.end(made, claim, said)


def spec(made: Any, claim: Claim, step: str = "decide") -> StepSpec:
    with transaction(made.engine) as session:
        run = session.get_one(Run, claim.run_id)
    attempt = Attempt(run_id=claim.run_id, step=step, number=1, fence="f", started_at=0)
    return spec_of(made.engine, made.settings, run, attempt, {})


def test_a_step_is_told_the_files_of_its_runs_drops_in_order_as_they_were_accepted(
    new_workspace: Callable[[], Any],
) -> None:
    made = new_workspace()
    made.take("exam.jsonl", ROW.format("x"), "heldout")
    made.take("a.jsonl", ROW.format("a") + ROW.format("b"))
    made.take("foreign.jsonl", ROW.format("y") + ROW.format("z") + ROW.format("w"), "heldout")
    with transaction(made.engine) as session:
        session.get_one(Drop, 3).state = DropState.PROPOSED
    claim = made.claim()
    made.take("later.jsonl", ROW.format("c"))
    before = spec(made, claim)
    drops.withdraw(made.engine, 2, Word("wrong", made.tick()), made.settings)
    drops.restore(made.engine, 2, Word("right", made.tick()), made.settings)
    assert spec(made, claim).drops == before.drops
    told = [(drop.id, drop.name, drop.role, drop.rows) for drop in before.drops]
    assert told == [(1, "exam.jsonl", "heldout", 1), (2, "a.jsonl", "train", 2)]
    assert before.proposed_rows == 3
    for drop in before.drops:
        path = made.settings.state_folder / drop.path
        assert durable.sha256_file(path) == drop.sha256
    assert {step.name for step in STEPS if spec(made, claim, step.name).drops} == {"prepare", "decide"}


def test_a_trial_is_told_of_the_drop_that_it_tries(new_workspace: Callable[[], Any]) -> None:
    made = new_workspace()
    made.win("honest")
    for word in ("b", "c"):
        made.take(f"{word}.jsonl", ROW.format(word))
    second = made.claim()
    assert (spec(made, second).suspect, spec(made, second).left_out) == (None, None)
    end_worse(made, second, MODEL_ID)
    suspects.go_on(made.engine, made.settings, made.tick(), Troubles())
    trial = made.claim()
    tried = spec(made, trial)
    assert (tried.suspect, tried.trial, tried.left_out) == (3, {}, None), "the newest drop is tried first"
    end_worse(made, trial, MODEL_ID)
    suspects.go_on(made.engine, made.settings, made.tick(), Troubles())
    control = spec(made, made.claim())
    assert (control.suspect, control.trial) == (None, {"decide": f"runs/{trial.run_id}/decide.json"})
    assert control.blamed == {}, "it had another drop, too"


@pytest.mark.parametrize("queued_before", [False, True])
def test_drops_whose_new_answers_were_accepted_since_are_new_to_a_training_and_guarded_all_the_same(
    new_workspace: Callable[[], Any], *, queued_before: bool
) -> None:
    made = new_workspace()
    made.win("a", "b")
    wanted = made.settings.model_copy(update={"suspects": SuspectSettings(leave_one_out=True)})
    if queued_before:
        leave_one_out.go_on(made.engine, wanted, ["default"], made.tick(), Troubles(), (0, 0))
    with transaction(made.engine) as session:
        session.get_one(Drop, 1).new_answers = 9
    drops.accept_answers(made.engine, 1, Word("", made.tick()), made.settings)
    claim = made.claim()
    assert (claim.run_id, queued_before) in {(2, False), (3, True)}
    told = spec(made, claim, "prepare")
    assert [drop.answers_accepted for drop in told.drops] == [True, False]
    assert (told.champion.drops, told.renewed) == ((1, 2), (1,))
    with transaction(made.engine) as session:
        promoted: dict[str, Any] = {"track": "default", "generation": 2, "kind": "promotion", "run_id": 2}
        model: dict[str, Any] = {"model_id": MODEL_ID, "model_path": f"models/{MODEL_ID}", "drops": [1, 2]}
        session.add(Promotion(**promoted, **model, reason="better", created_at=made.tick()))
    assert spec(made, claim).champion.drops == (1, 2), "guards hold for each drop that the champion knows"
    assert spec(made, claim).renewed == ((1,) if queued_before else ()), "one training more with all rows of drop 1"
