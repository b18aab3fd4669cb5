"""The dispatcher on a real database and real folders; the executor is one that does each step at once, by a script."""

import errno
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from sqlalchemy import Engine, event
from sqlmodel import col, select

from daemon.champions import decisions, history, promotion
from daemon.dispatch import publication
from daemon.dispatch.dispatcher import Dispatcher
from daemon.dispatch.spool import JobState, LocalExecutor
from daemon.dispatch.step_process import result_of_dead
from daemon.messages.texts import text_of
from daemon.queue import drops, leave_one_out, run_queue, states, suspects
from daemon.settings.model import Settings, SuspectSettings
from daemon.state import run_files
from daemon.state.clauses import change_clauses, verdict_clauses
from daemon.state.database import ChangeWatch, open_engine, transaction
from daemon.state.events import Word
from daemon.state.states import AttemptState, DropState, Purpose, RunState
from daemon.state.tables import Attempt, Drop, Event, Promotion, Run, Suspect, Track
from daemon.views.overview import Overview
from pipeline import durable
from pipeline.artifacts import GuardResult, Judgement, Preview, Replacement, Settlement, Shortfall, TrialScores
from pipeline.config import GateConfig, JudgeConfig, RunConfig
from pipeline.contract import RESULT_NAME, SPEC_NAME, Progress, StepError, StepResult, StepSpec
from pipeline.decide.explain import sentence
from pipeline.errors import EXIT_INTERRUPTED, EXIT_START_AGAIN
from pipeline.models.manifest import check_base
from tests import run_owner
from tests.made_artifacts import good_result, made_adapter, made_dataset, made_model, made_report, made_verdict
from tests.run_owner import spool_of

NOW = 1_750_000_000_000
# What a tick does here does not depend on how fast the machine is.
publication._AT_ONCE_SECONDS = 3600.0
TOO_LITTLE = Shortfall(heldout_rows=3, needed_heldout_rows=100, needed_rows=700)
FULL = OSError(errno.ENOSPC, "disk full")
JUDGE = JudgeConfig(url="http://127.0.0.1:1/v1", model="m", api_key_env="JUDGE_KEY")


class ScriptedExecutor(LocalExecutor):
    """Does a step when it is polled; `script` may give another result than the good one for a step."""

    def __init__(self) -> None:
        self.submitted: list[StepSpec] = []
        self.script: dict[str, list[Callable[[StepSpec], StepResult | None]]] = {}
        self.reasons: tuple[str, ...] = ()
        self.outcome = "promoted"
        self.shortfall: Shortfall | None = None
        #: By the id of the champion that the data is prepared for: what it was trained on of the held-out records.
        self.known: defaultdict[str, int] = defaultdict(int)
        self.goes_on = False
        """Whether a training goes on from the champion."""
        self.batch_size = 0
        self.version = "v"
        self.cancelled: list[str] = []

    def submit(self, spec: StepSpec) -> None:
        (Path(spec.root) / spec.folder).mkdir(parents=True, exist_ok=True)
        durable.write_json(Path(spec.root) / spec.folder / SPEC_NAME, spec.model_dump(mode="json"))
        self.submitted.append(spec)

    def poll(self, spec: StepSpec) -> JobState:
        folder = Path(spec.root) / spec.folder
        if (folder / RESULT_NAME).exists():
            return JobState.ENDED
        special = self.script.get(spec.step, [])
        result = special.pop(0)(spec) if special else self.good(spec)
        if result is None:
            result = result_of_dead(spec, None)
        durable.write_json(folder / RESULT_NAME, result.model_dump(mode="json"))
        return JobState.ENDED

    def cancel(self, key: str) -> None:
        self.cancelled.append(key)

    @property
    def steps(self) -> list[str]:
        return [spec.step for spec in self.submitted]

    def good(self, spec: StepSpec) -> StepResult:
        root = Path(spec.root)
        artifact: Any
        if spec.step == "prepare":
            known = self.known[spec.champion.model_id]
            few = Shortfall(heldout_rows=120 - known, needed_heldout_rows=100, needed_rows=1) if known > 20 else None
            artifact = made_dataset(
                spec,
                heldout_rows=120 - known,
                heldout_groups=120 - known,
                unit="document",
                seen_by_champion=known,
                start=spec.champion if self.goes_on and spec.champion.generation else None,
                heldout_version=self.version,
                shortfall=self.shortfall or few,
            )
        elif spec.step == "train":
            begun = durable.read_json(root / spec.inputs["prepare"])["start"]
            artifact = made_adapter(spec, start=begun)
        elif spec.step == "merge":
            artifact = made_model(spec)
        elif spec.step == "evaluate":
            worse = TrialScores(groups=120, wins=5, losses=23, p_value=0.001) if spec.trial else None
            artifact = made_report(spec, batch_size=self.batch_size, trial=worse)
        elif spec.step == "judge":
            counts = dict.fromkeys(("losses", "ties", "inconsistent", "failed"), 0)
            artifact = Judgement(folder=spec.folder, model="m", records=1, wins=1, **counts)
        elif spec.step == "preview":
            artifact = Preview(records=40, points=31.0, metric="exact_match")
        else:
            report = durable.read_json(root / spec.inputs["evaluate"]) if "evaluate" in spec.inputs else {}
            if report and of_report(report) != (spec.champion.generation, spec.champion.model_id):
                return ended("failed", 2)(spec)  # the step refuses it, too
            outcome, gain = (self.outcome, 12.3) if report else ("insufficient_evidence", None)
            artifact = made_verdict(spec, outcome, reasons=self.reasons, gain=gain)
        return good_result(spec, artifact)


def of_report(report: dict[str, Any]) -> tuple[int, str]:
    return report["champion_generation"], report["champion"]["model_id"]


def ended(status: str, code: int) -> Callable[[StepSpec], StepResult]:
    return lambda spec: StepResult.model_validate(
        {
            "key": spec.key,
            "fence": spec.fence,
            "status": status,
            "exit_code": code,
            "error": StepError(message="it did not work", hint="try this"),
        }
    )


def new_dispatcher(engine: Engine, settings: Settings, executor: ScriptedExecutor) -> Dispatcher:
    with transaction(engine) as session:
        states.ensure_track(session, "default", NOW)
    dispatcher = Dispatcher(engine, settings, executor)
    dispatcher.recover(NOW)
    return dispatcher


def add_drop(engine: Engine, name: str, track: str = "default") -> int:
    with transaction(engine) as session:
        number = run_owner.add_drop(session, track, name_bytes=name.encode(), name=name, sha256=name * 8, rows=10)
        run_queue.enqueue(session, track, "drop", NOW, NOW)
        return number


def run_row(engine: Engine, run_id: int = 1) -> Run:
    with transaction(engine) as session:
        run = session.get(Run, run_id)
    assert run is not None
    return run


def ticks(dispatcher: Dispatcher, count: int = 12, now: int = NOW) -> None:
    for turn in range(count):
        dispatcher.tick(now + turn)


class Box:
    """A workspace with a scripted executor; its dispatcher begins when it is first asked for."""

    def __init__(self, engine: Engine, settings: Settings, executor: ScriptedExecutor) -> None:
        self.engine, self.settings, self.executor = engine, settings, executor

    @cached_property
    def dispatcher(self) -> Dispatcher:
        return self.new_dispatcher()

    def new_dispatcher(self, settings: Settings | None = None) -> Dispatcher:
        return new_dispatcher(self.engine, settings or self.settings, self.executor)

    def drop(self, name: str, track: str = "default") -> int:
        return add_drop(self.engine, name, track)

    def ticks(self, count: int = 12, now: int = NOW) -> None:
        ticks(self.dispatcher, count, now)

    def run(self, number: int = 1) -> Run:
        return run_row(self.engine, number)

    def drop_state(self, number: int) -> str:
        with transaction(self.engine) as session:
            return session.get_one(Drop, number).state

    def meanwhile(self, step: str, act: Callable[[], object]) -> None:
        """Let something happen while a step is done for the first time."""

        def do(spec: StepSpec) -> StepResult:
            act()
            return self.executor.good(spec)

        self.executor.script[step] = [do]

    def promotions(self) -> list[Promotion]:
        with transaction(self.engine) as session:
            return [row for row in session.exec(select(Promotion)) if row.run_id is not None]


def test_a_good_run_goes_through_every_step_and_moves_the_link(box: Box) -> None:
    box.drop("a")
    box.ticks()
    assert box.executor.steps == ["prepare", "train", "merge", "evaluate", "decide"]
    run = box.run()
    assert run.verdict is not None
    assert (run.state, run.outcome, run.verdict["gain"]) == (RunState.SUCCEEDED, "promoted", 12.3)
    link = box.settings.state_folder / "tracks" / "default" / "champion"
    assert link.resolve().parent == (box.settings.state_folder / "models").resolve()
    assert (link / "model.safetensors").read_bytes().endswith(b"weights of run 1")
    assert [row.generation for row in box.promotions()] == [1]
    assert (box.settings.state_folder / "predictions" / "key" / "1-evaluate-1.jsonl").read_text() == "{}\n"


def begun(engine: Engine, work: Callable[[], object]) -> int:
    """Return how many transactions of `engine` begin during `work`."""
    seen: list[object] = []

    def note(connection: object) -> None:
        seen.append(connection)

    event.listen(engine, "begin", note)
    work()
    event.remove(engine, "begin", note)
    return len(seen)


def test_an_idle_dispatcher_asks_the_queue_only_when_somebody_has_changed_it(box: Box) -> None:
    box.ticks()
    box.dispatcher.upkeep.finish()  # the first collection of garbage has transactions of its own
    assert begun(box.engine, box.ticks) == 0
    other = open_engine(box.settings.state_folder / "dropforge.db")
    with transaction(other) as session:
        run_queue.enqueue(session, "default", "drop", NOW, NOW + 500)
    add_drop(other, "a")
    assert begun(box.engine, lambda: box.ticks(now=NOW + 400)) > 0
    assert box.executor.steps == [], "it is not due"
    assert begun(box.engine, lambda: box.ticks(now=NOW + 420)) == 0
    box.ticks(now=NOW + 500)
    assert box.run().state == RunState.SUCCEEDED, "nobody told that its time had come"


def test_a_claim_that_failed_is_tried_again(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.drop("a")
    with monkeypatch.context() as broken:
        broken.setattr(run_queue, "claim", Mock(side_effect=FULL))
        with pytest.raises(OSError, match="disk full"):
            box.dispatcher.tick(NOW)
    box.ticks()
    assert box.run().state == RunState.SUCCEEDED


def test_a_drop_that_is_worse_than_a_control_too_is_suspended_and_the_control_keeps_its_trials_settings(
    box: Box,
) -> None:
    old = box.drop("a")
    box.ticks()
    champion = (box.settings.state_folder / "tracks" / "default" / "champion").readlink()
    box.executor.outcome = "worse"
    new = box.drop("b")
    while (3, "decide") not in {(spec.run, spec.step) for spec in box.executor.submitted}:
        box.ticks(1)
    changed = box.settings.train.model_copy(update={"epochs": 3.0})
    ticks(box.new_dispatcher(with_gate(box.settings, p_value=0.05).model_copy(update={"train": changed})))
    trial, control = (RunConfig.model_validate(box.run(number).config) for number in (3, 4))
    assert control.train.seed != trial.train.seed
    seeded = trial.train.model_copy(update={"seed": control.train.seed})
    assert control == trial.model_copy(update={"train": seeded})
    ended = [(box.run(number).outcome, box.run(number).purpose) for number in (2, 3, 4)]
    assert ended == [("worse", "candidate"), ("worse", "trial"), ("worse", "control")]
    told = [spec for spec in box.executor.submitted if spec.step == "decide" and spec.run > 2]
    before, of_trial = "runs/2/decide.json", "runs/3/decide.json"
    assert [(spec.suspect, spec.blamed["decide"]) for spec in told] == [(new, before), (None, before)]
    assert [spec.trial.get("decide") for spec in told] == [None, of_trial]
    assert (box.drop_state(old), box.drop_state(new)) == (DropState.ACCEPTED, DropState.SUSPENDED)
    assert (box.settings.state_folder / "tracks" / "default" / "champion").readlink() == champion
    assert len(box.promotions()) == 1


def settled_by_control(
    box: Box, p_value: float = 0.5, of_control: str = "not_shown_better", *, passed: bool = True
) -> None:
    """Let a drop's run and trial win but for a guard, and go on until the control's verdict, which settles that."""
    box.drop("a")
    box.ticks()
    box.executor.outcome = "guard_failed"
    lost = GuardResult(
        guard="slice", about=("drop 1",), unit="points", change=-6.0, p_value=0.02, state="failed", drop=1
    )

    def decide(spec: StepSpec) -> StepResult:
        more: dict[str, Any] = {"blames_new_drops": True, "guards": (lost,), "gain": 12.3}
        outcome = "guard_failed"
        if spec.trial:
            assert set(spec.trial) == set(spec.blamed) == {"prepare", "train", "merge", "evaluate", "decide"}
            outcome, more = of_control, {"gain": 0.3, "settlement": Settlement(guards=(), passed=passed)}
        return good_result(spec, made_verdict(spec, outcome, **more))

    def evaluate(spec: StepSpec) -> StepResult:
        compared = TrialScores(groups=120, wins=5, losses=6, p_value=p_value) if spec.trial else None
        return good_result(spec, made_report(spec, trial=compared))

    box.executor.script |= {"decide": [decide] * 3, "evaluate": [evaluate] * 3}
    box.drop("b")
    while not any(spec.trial and spec.step == "decide" for spec in box.executor.submitted):
        box.ticks(1)


def test_a_trial_that_its_control_settles_serves_and_says_so(box: Box) -> None:
    settled_by_control(box)
    box.ticks()
    assert [box.run(number).outcome for number in (2, 3, 4)] == ["guard_failed", "promoted", "not_shown_better"]
    link = box.settings.state_folder / "tracks/default/champion"
    assert (link / "model.safetensors").read_bytes().endswith(b"weights of run 3")
    change = box.promotions()[-1]
    assert (change.run_id, change.kind, change.generation, change.drops) == (3, "promotion", 2, [1, 2])
    why = "promoted after its control, run 4: +12.3 points"
    assert sentence(change_clauses(change)) == sentence(verdict_clauses(box.run(3))) == why
    assert (
        sentence(verdict_clauses(box.run(4)))
        == "not shown better: +0.3 points; with it, guards of old drops pass its trial"
    )
    view = Overview.of(box.settings).run(3)
    assert (view.outcome, view.sentence) == ("promoted", why)
    with transaction(box.engine) as session:
        told = session.exec(select(Event).where(Event.kind == "trial_settled")).one()
        assert (told.run_id, told.detail) == (3, {"outcome": "promoted", "control": 4})
        assert {row.ended for row in session.exec(select(Suspect)).all()} == {"cleared"}
    assert box.drop_state(2) == DropState.ACCEPTED


def test_a_trial_that_its_control_settles_waits_where_a_person_approves(box: Box) -> None:
    settled_by_control(box)
    serves = (box.settings.state_folder / "tracks/default/champion").readlink()
    ticks(box.new_dispatcher(with_gate(box.settings, approval="manual")))
    assert (box.run(3).outcome, len(box.promotions())) == ("awaiting_approval", 1)
    assert (box.settings.state_folder / "tracks/default/champion").readlink() == serves
    with transaction(box.engine) as session:
        event_ = session.exec(select(Event).where(Event.kind == "trial_settled")).one()
        message = text_of(session, event_)
    assert message is not None
    assert message.title == "[dropforge] WAITS FOR APPROVAL: default, run 3"
    assert "to take it: dropforge promote 3" in message.body
    decisions.approve(box.engine, box.settings.work_folder, 3, Word("", NOW, "me"))
    assert (box.run(3).outcome, box.promotions()[-1].run_id) == ("promoted", 3)


@pytest.mark.parametrize("module", [run_queue, promotion])
def test_a_settled_trial_serves_with_the_end_of_its_control_or_not_at_all(
    box: Box, monkeypatch: pytest.MonkeyPatch, module: object
) -> None:
    settled_by_control(box)
    with monkeypatch.context() as broken:
        broken.setattr(module, "settle" if module is run_queue else "sync_link", Mock(side_effect=FULL))
        with pytest.raises(OSError, match="disk full"):
            box.ticks()
    assert (box.run(3).outcome, box.run(4).state, len(box.promotions())) == ("guard_failed", "running", 1)
    ticks(box.new_dispatcher())
    assert (box.run(3).outcome, len(box.promotions())) == ("promoted", 2)


@pytest.mark.parametrize(("of_control", "passed"), [("not_shown_better", False), ("promoted", True)])
def test_a_trial_does_not_serve_if_its_control_lost_too_little_or_won(
    box: Box, of_control: str, *, passed: bool
) -> None:
    settled_by_control(box, of_control=of_control, passed=passed)
    box.executor.outcome = "not_shown_better"
    box.ticks(40)
    assert [row.run_id for row in box.promotions()[1:]] == ([4] if of_control == "promoted" else [])
    assert (box.run(3).outcome, box.run(4).outcome) == ("guard_failed", of_control)


@pytest.mark.parametrize("meanwhile", ["another champion", "a drop of it withdrawn", "its model is gone"])
def test_a_settled_trial_does_not_serve_if_the_world_has_changed_meanwhile(box: Box, meanwhile: str) -> None:
    settled_by_control(box)
    if meanwhile == "another champion":
        swears(box)
    elif meanwhile == "a drop of it withdrawn":
        drops.withdraw(box.engine, 2, Word("wrong", NOW), box.settings)
    else:
        model = run_files.load_model(box.settings.work_folder, 3)
        assert model is not None
        shutil.rmtree(box.settings.work_folder / "models" / model.model_id)
    box.executor.outcome = "not_shown_better"
    box.ticks(40)
    assert 3 not in {row.run_id for row in box.promotions()}
    assert (box.run(3).outcome, box.run(4).failures) == ("guard_failed", 0)


@pytest.mark.parametrize(("p_value", "state"), [(0.5, DropState.ACCEPTED), (0.001, DropState.SUSPENDED)])
def test_a_control_decides_on_its_drop_though_the_model_of_the_trial_is_damaged(
    box: Box, p_value: float, state: DropState
) -> None:
    settled_by_control(box, p_value)
    model = run_files.load_model(box.settings.work_folder, 3)
    assert model is not None
    (box.settings.work_folder / "models" / model.model_id / "model.safetensors").write_bytes(b"x")
    box.executor.outcome = "not_shown_better"
    box.ticks()
    assert (box.run(4).state, box.run(4).failures, box.run(3).outcome) == ("succeeded", 0, "guard_failed")
    assert (box.drop_state(2), len(box.promotions())) == (state, 1)


def test_an_idle_track_leaves_out_a_drop_a_week_and_tells_what_it_is_worth(box: Box) -> None:
    def judged(spec: StepSpec) -> StepResult:
        found = made_verdict(spec, "worse", gain=-1.8, interval=(-3.0, -0.6), champion_model_id=spec.champion.model_id)
        return box.executor.good(spec).model_copy(update={"artifact": found.model_dump(mode="json")})

    box.drop("a")
    box.drop("b")
    box.ticks()
    box.executor.script["decide"] = [judged, judged]
    wanted = with_gate(box.settings, trials_per_week=1)
    idle = box.new_dispatcher(wanted.model_copy(update={"suspects": SuspectSettings(leave_one_out=True)}))
    ticks(idle, now=NOW + 100)
    ticks(idle, now=NOW + 200)
    prepared = [(spec.left_out, spec.drops) for spec in box.executor.submitted if spec.step == "prepare"]
    assert [(out, [drop.id for drop in drops]) for out, drops in prepared] == [(None, [1, 2]), (1, [2])]
    ticks(idle, now=NOW + 8 * 86_400_000)
    with transaction(box.engine) as session:
        drops = session.exec(select(Drop).order_by(col(Drop.id))).all()
    assert [(one.worth_run, one.worth_points) for one in drops] == [(2, 1.8), (3, 1.8)]
    assert [one.worth_half_width for one in drops] == pytest.approx([1.2, 1.2])
    assert box.drop_state(1) == DropState.ACCEPTED


def test_the_run_of_a_track_that_was_taken_out_of_the_settings_still_ends(box: Box) -> None:
    declared = box.settings.model_copy(update={"tracks": {"jokes": {}}})
    box.drop("a", "jokes")
    ticks(box.new_dispatcher(declared))
    box.executor.outcome = "worse"
    box.drop("b", "jokes")
    ticks(box.new_dispatcher(declared), count=3)
    assert box.run(2).state == RunState.RUNNING
    ticks(box.new_dispatcher())
    assert box.run(2).outcome == "worse"
    with transaction(box.engine) as session:
        assert len(session.exec(select(Run)).all()) == 2


def with_gate(settings: Settings, **values: object) -> Settings:
    return settings.model_copy(update={"gate": settings.gate.model_copy(update=values)})


@pytest.mark.parametrize(("known", "evaluated"), [(0, ["evaluate"]), (120, [])])
def test_where_a_person_approves_a_model_is_made_of_little_data_too_and_fixes_nothing(
    box: Box, known: int, evaluated: list[str]
) -> None:
    box.executor.shortfall = TOO_LITTLE
    # Without a held-out record there is nothing to evaluate.
    box.executor.known = defaultdict(lambda: known)
    box.executor.outcome, box.executor.batch_size = "insufficient_evidence", 7
    box.drop("a")
    ticks(box.new_dispatcher(with_gate(box.settings, approval="manual")))
    assert box.executor.steps == ["prepare", "train", "merge", *evaluated, "decide"]
    assert box.run().outcome == "insufficient_evidence"
    with transaction(box.engine) as session:
        track = session.get_one(Track, "default")
    assert (track.metric, track.max_new_tokens, track.split, track.unit, track.eval_batch_size) == (None,) * 5


def test_what_the_first_verdict_fixed_holds_for_later_runs(box: Box) -> None:
    def fixed() -> tuple[object, ...]:
        with transaction(box.engine) as session:
            track = session.get_one(Track, "default")
        return track.metric, track.max_new_tokens, track.unit, track.eval_batch_size

    box.executor.batch_size = 16
    box.drop("a")
    while box.executor.steps[-1:] != ["evaluate"]:
        box.ticks(1)
    assert fixed() == (None,) * 4, "there is no verdict yet"
    box.ticks()
    assert fixed() == ("exact_match", 16, "document", 16)
    assert box.executor.submitted[-1].config.unit is None
    box.executor.batch_size = 4
    split = box.settings.split.model_copy(update={"heldout": 0.5, "scored_records": 700})
    box.drop("b")
    ticks(box.new_dispatcher(box.settings.model_copy(update={"split": split})))
    config = box.executor.submitted[-1].config
    # What would let a prompt change sides is fixed; how many are scored is not.
    assert (config.split.heldout, config.split.scored_records) == (box.settings.split.heldout, 700)
    assert config.unit == "document"
    asked = config.evaluate
    assert (asked.metric, asked.max_new_tokens, asked.batch_size) == ("exact_match", 16, 16)
    assert fixed()[-1] == 4, "16 did not fit into memory"


def test_a_step_is_told_what_the_champion_and_the_former_ones_were_made_from(box: Box) -> None:
    for name in "abcde":
        box.drop(name)
        box.ticks()
    told = [spec for spec in box.executor.submitted if spec.step == "decide"]
    assert [spec.champion.drops for spec in told] == [None, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
    assert [[one.generation for one in spec.former] for spec in told] == [[], [0], [1, 0], [2, 1, 0], [3, 2, 1]]
    assert [one.drops for one in told[3].former] == [(1, 2), (1,), None]
    assert told[1].former[0].path == box.settings.base_model
    assert all((box.settings.state_folder / one.path).is_dir() for one in told[4].former)
    decisions.rollback(box.engine, box.settings.work_folder, "default", Word("it swears", NOW), to=3)
    box.drop("f")
    box.ticks()
    last = box.executor.submitted[-1]
    assert (last.champion.generation, last.champion.drops) == (6, (1, 2, 3))
    # Generation 5 is blocked, 4 was skipped on the way back, 3 serves again as 6.
    assert [one.generation for one in last.former] == [2, 1, 0]
    shutil.rmtree(box.settings.state_folder / told[2].champion.path)
    box.drop("g")
    box.ticks()
    assert [one.generation for one in box.executor.submitted[-1].former] == [6, 1, 0], "whose folder is there"


def test_a_step_is_told_how_often_the_track_and_this_very_set_were_used(box: Box) -> None:
    script = (
        ("not_shown_better", "v"),
        ("insufficient_evidence", "v"),
        ("promoted", "w"),
        ("contaminated", "w"),
        ("worse", "v"),
    )
    for name, (outcome, version) in zip("abcde", script, strict=True):
        box.executor.outcome, box.executor.version = outcome, version
        box.drop(name)
        box.ticks()
    told = [(spec.uses, spec.judged_versions) for spec in box.executor.submitted if spec.step == "decide"]
    assert told == [
        (0, {}),
        (1, {"v": 1}),
        (1, {"v": 1}),
        (2, {"v": 1, "w": 1}),
        (3, {"v": 1, "w": 2}),
        (4, {"v": 2, "w": 2}),
    ]
    assert [box.run(number).heldout_version for number in (1, 3)] == ["v", "w"]


@pytest.mark.parametrize("code", [EXIT_INTERRUPTED, EXIT_START_AGAIN])
def test_an_interrupted_run_goes_on_at_its_step_and_the_attempt_is_not_counted(box: Box, code: int) -> None:
    # More than Slurm may stop in a row.
    box.executor.script["train"] = [ended("interrupted", code)] * 12
    box.drop("a")
    box.ticks(60)
    run = box.run()
    assert (run.state, run.failures, run.deaths) == (RunState.SUCCEEDED, 0, 0)
    assert box.executor.steps == ["prepare", *["train"] * 13, "merge", "evaluate", "decide"]


def leave_checkpoint(spec: StepSpec) -> None:
    folder = Path(spec.root) / spec.checkpoints / f"step-480-{spec.attempt}"
    folder.mkdir(parents=True)
    (folder / "files.json").write_text("{}")


def stopped_by_slurm(
    spec: StepSpec, until: int = 0, *, checkpoint: bool = False, revoked: str | None = None
) -> StepResult:
    """End an attempt that a job worked on, perhaps after it has left a checkpoint."""
    folder = Path(spec.root) / spec.folder
    durable.write_json(folder / "claim.json", {"job": "4711", "node": "n2", "until": until})
    if checkpoint:
        leave_checkpoint(spec)
    if revoked:
        durable.write_json(folder / "revoked.json", {"error": {"message": revoked}})
    return ended("interrupted", EXIT_INTERRUPTED)(spec)


def test_ten_jobs_in_a_row_that_slurm_stops_without_a_checkpoint_are_a_failure(box: Box) -> None:
    saved = partial(stopped_by_slurm, checkpoint=True)
    box.executor.script["train"] = [*[stopped_by_slurm] * 9, saved, *[stopped_by_slurm] * 2]
    box.drop("a")
    box.ticks(60)
    assert (box.run().failures, box.executor.steps.count("train")) == (0, 13)
    box.executor.script["train"] = [stopped_by_slurm] * 11
    box.drop("b")
    box.ticks(60)
    run = box.run(2)
    assert (run.state, run.failures, box.executor.steps.count("train")) == (RunState.WAITING, 1, 23)
    assert run.error == "Slurm stopped job 4711 of step train on n2"
    assert run.hint == "10 attempts in a row left no checkpoint; see why: dropforge show 2"
    box.ticks(60, NOW + 3_600_000)
    assert (box.run(2).state, box.run(2).failures, box.executor.script["train"]) == (RunState.SUCCEEDED, 1, [])


AWAY = OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/shared/runs/1")


def test_a_job_goes_on_while_its_files_cannot_be_read(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared file system may be away for a while."""
    monkeypatch.setattr(box.dispatcher, "_on_nodes", {"prepare": box.executor})
    box.drop("a")
    with monkeypatch.context() as patch:
        patch.setattr(box.executor, "poll", Mock(side_effect=AWAY))
        box.ticks()
        assert (box.run().state, box.executor.cancelled) == (RunState.RUNNING, [])
        assert "Stale file handle" in box.dispatcher._troubles.words["files of run 1"]
    box.ticks()
    assert (box.run().state, box.executor.steps.count("prepare")) == (RunState.SUCCEEDED, 1)
    assert box.dispatcher._troubles.words == {}


def test_a_run_whose_claim_is_lost_is_no_trouble_any_more(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box.dispatcher, "_on_nodes", {"prepare": box.executor})
    monkeypatch.setattr(box.executor, "poll", Mock(side_effect=AWAY))
    box.drop("a")
    box.ticks()
    assert list(box.dispatcher._troubles.words) == ["files of run 1"]
    with transaction(box.engine) as session:
        session.get_one(Run, 1).token = "another daemon's"  # noqa: S105 - of a claim
    box.ticks()
    assert box.dispatcher._troubles.words == {}


@pytest.mark.parametrize(("checkpoint", "failures"), [(True, 0), (False, 1)])
def test_the_time_limit_is_a_failure_without_a_new_checkpoint(box: Box, failures: int, *, checkpoint: bool) -> None:
    box.executor.script["train"] = [partial(stopped_by_slurm, until=1, checkpoint=checkpoint)]
    box.drop("a")
    while box.run().state != RunState.WAITING:
        box.ticks(1)
    run = box.run()
    assert run.failures == failures
    assert ("raise executor.slurm.train.time" in (run.hint or "")) is (not checkpoint)


def evaluated(lines: int) -> Callable[[StepSpec], StepResult]:
    """Let an evaluation be out of time with so many lines of predictions; if any were made before, one is a copy."""

    def stop(spec: StepSpec) -> StepResult:
        folder = Path(spec.root) / spec.folder / "predictions"
        folder.mkdir()
        (folder / "key.jsonl").write_text("{}\n" * lines)
        return stopped_by_slurm(spec, until=1)

    return stop


@pytest.mark.parametrize(("lines", "failures"), [((1, 2, 2), 0), ((1, 1), 1), ((0,), 1)])
def test_the_time_limit_of_an_evaluation_is_a_failure_without_new_predictions(
    box: Box, lines: tuple[int, ...], failures: int
) -> None:
    box.executor.script["evaluate"] = list(map(evaluated, lines))
    box.drop("a")
    box.ticks(60)
    box.ticks(60, NOW + 3_600_000)
    assert (box.run().state, box.run().failures) == (RunState.SUCCEEDED, failures)
    assert box.executor.steps.count("evaluate") == len(lines) + 1


@pytest.mark.parametrize(
    ("revoked", "words"),
    [
        (None, "Slurm stopped job 4711 of step train on n2"),
        ("Slurm ended job 4711 of step train on n2: PREEMPTED", "Slurm ended job 4711 of step train on n2: PREEMPTED"),
    ],
)
def test_a_run_that_slurm_stopped_says_so_until_its_step_is_done(box: Box, revoked: str | None, words: str) -> None:
    box.executor.script["train"] = [partial(stopped_by_slurm, checkpoint=True, revoked=revoked)]
    box.drop("a")
    words = f"{words}; it goes on from step 480"
    while box.run().state != RunState.WAITING:
        box.dispatcher.tick(NOW)
    assert box.run().error == words
    box.dispatcher.tick(NOW)
    attempts = Overview.of(box.settings).run(1).attempts
    assert [(one.step, one.state, one.error) for one in attempts[1:]] == [
        ("train", "interrupted", words),
        ("train", "submitted", None),
    ]
    assert box.run().error == words
    box.dispatcher.tick(NOW)
    assert box.run().error is None
    box.ticks()
    assert (box.run().state, box.run().failures, box.run().deaths) == (RunState.SUCCEEDED, 0, 0)


def test_a_failed_step_is_tried_again_after_a_pause_and_given_up_at_the_limit(box: Box) -> None:
    box.executor.script["train"] = [ended("failed", 1)] * 3
    box.drop("a")
    box.ticks()
    run = box.run()
    assert (run.state, run.failures) == (RunState.WAITING, 1)
    assert run.not_before >= NOW + 30_000
    box.ticks(now=NOW + 10_000_000)
    assert box.run().not_before >= NOW + 10_060_000, "twice as long"
    box.ticks(now=NOW + 20_000_000)
    run = box.run()
    assert (run.state, run.error, run.hint) == (RunState.FAILED, "it did not work", "try this")
    assert (run.failures, run.deaths) == (3, 0)
    assert box.executor.steps.count("train") == 3
    assert box.executor.steps.count("prepare") == 1, "a retried run goes on at the first step that is not published"


def test_vanished_processes_are_counted_apart_and_quarantine_the_run_at_the_third(box: Box) -> None:
    box.executor.script["train"] = [lambda _spec: None, ended("failed", 137), lambda _spec: None]
    box.drop("a")
    for day in range(5):
        box.ticks(now=NOW + day * 10_000_000)
    run = box.run()
    assert (run.state, run.deaths, run.failures) == (RunState.CRASHED, 3, 0)
    assert "dropforge retry 1" in (run.hint or "")


def move_champion(box: Box) -> None:
    """Let somebody else's model take the place of the base model."""
    run_owner.crown(box.engine, box.settings.work_folder, "somebody else's", 0)


def test_a_verdict_that_a_retry_takes_back_is_made_against_todays_champion(box: Box) -> None:
    box.drop("a")
    box.ticks(5)
    spec = box.executor.submitted[-1]
    assert spec.step == "decide"
    run_files.publish(spec, box.executor.good(spec))
    attempt = states.open_attempt(box.engine, 1)
    assert attempt is not None
    with transaction(box.engine) as session:
        run, row = session.get_one(Run, 1), session.get_one(Attempt, attempt.id)
        row.state, row.ended_at = AttemptState.PUBLISHED, NOW
        # As a retry leaves it: today's box.settings, by which the verdict is stale.
        run.config = {**(run.config or {}), "gate": GateConfig(min_gain=2.5).model_dump()}
    move_champion(box)
    box.ticks(20)
    assert box.executor.steps == ["prepare", "train", "merge", *["evaluate", "decide"] * 2]
    assert (box.run().outcome, box.run().failures) == ("promoted", 0)


def test_a_champion_that_moved_meanwhile_makes_the_comparison_again(box: Box) -> None:
    box.settings = box.settings.model_copy(update={"judge": JUDGE})
    box.meanwhile("decide", lambda: move_champion(box))
    box.drop("a")
    box.ticks(20)
    assert box.executor.steps == ["prepare", "train", "merge", *["evaluate", "judge", "decide"] * 2]
    assert box.executor.submitted[-1].champion.generation == 1
    assert [row.generation for row in box.promotions()] == [1, 2]


@pytest.mark.parametrize("outcome", ["worse", "insufficient_evidence"])
def test_a_loss_against_a_champion_that_serves_no_more_is_not_acted_on(box: Box, outcome: str) -> None:
    def moved_meanwhile(spec: StepSpec) -> StepResult:
        move_champion(box)
        result = box.executor.good(spec)
        box.executor.outcome, box.executor.reasons = "promoted", ()
        return result

    box.executor.outcome, box.executor.reasons = outcome, ("slice_lost",)
    box.executor.script["decide"] = [moved_meanwhile]
    drop = box.drop("a")
    box.ticks(20)
    assert box.executor.steps == ["prepare", "train", "merge", *["evaluate", "decide"] * 2]
    assert box.executor.submitted[-1].champion.generation == 1
    assert (box.run().outcome, box.drop_state(drop)) == ("promoted", DropState.ACCEPTED)
    assert [row.generation for row in box.promotions()] == [1, 2]


@pytest.mark.parametrize(
    ("outcome", "shortfall", "steps"),
    [
        ("contaminated", None, ["prepare", "train", "merge", "evaluate", "decide"]),
        ("insufficient_evidence", TOO_LITTLE, ["prepare", "decide"]),
    ],
)
def test_what_does_not_hang_on_the_champion_is_acted_on_whoever_serves(
    box: Box, outcome: str, shortfall: Shortfall | None, steps: list[str]
) -> None:
    box.executor.outcome, box.executor.shortfall = outcome, shortfall
    box.meanwhile("decide", lambda: move_champion(box))
    box.drop("a")
    box.ticks()
    assert (box.executor.steps, box.run().outcome) == (steps, outcome)


def with_knowing_champion(box: Box, known: int) -> None:
    """Let run 1 make a champion that was trained on so many of the held-out records of every later run."""
    box.drop("a")
    box.ticks()
    assert box.run().outcome == "promoted"
    with transaction(box.engine) as session:
        box.executor.known[promotion.champion(session, "default").model_id] = known
    box.executor.submitted.clear()


def swears(box: Box) -> None:
    decisions.rollback(box.engine, box.settings.work_folder, "default", Word("it swears", NOW + 60), to=0)


@pytest.mark.parametrize(
    ("known", "goes_on"), [(71, False), (7, False), (0, True)], ids=["too little data", "enough data", "to go on from"]
)
def test_data_that_was_prepared_for_a_champion_that_serves_no_more_is_prepared_again(
    box: Box, known: int, *, goes_on: bool
) -> None:
    with_knowing_champion(box, known)
    box.executor.goes_on = goes_on
    box.drop("b")
    box.dispatcher.tick(NOW + 50)
    box.dispatcher.draining = True
    box.dispatcher.tick(NOW + 51)
    assert (box.executor.steps, box.run(2).state) == (["prepare"], RunState.WAITING)
    swears(box)
    ticks(box.new_dispatcher(), 20, now=NOW + 10**6)
    assert box.executor.steps == ["prepare", "prepare", "train", "merge", "evaluate", "decide"]
    assert [spec.champion.generation for spec in box.executor.submitted] == [1, 2, 2, 2, 2, 2]
    run = box.run(2)
    assert (run.outcome, run.failures, run.deaths) == ("promoted", 0, 0)


def test_a_verdict_of_too_little_data_for_a_champion_that_serves_no_more_ends_no_run(box: Box) -> None:
    with_knowing_champion(box, 71)
    box.meanwhile("decide", lambda: swears(box))
    box.drop("b")
    box.ticks(20, now=NOW + 50)
    assert box.executor.steps == ["prepare", "decide", "prepare", "train", "merge", "evaluate", "decide"]
    assert box.run(2).outcome == "promoted"


@pytest.mark.parametrize("kept", ["adapter", "checkpoint"])
def test_what_was_trained_is_not_thrown_away_for_records_that_a_former_champion_knew(box: Box, kept: str) -> None:
    def moved_meanwhile(spec: StepSpec) -> StepResult:
        swears(box)
        if kept == "adapter":
            return box.executor.good(spec)
        leave_checkpoint(spec)
        box.dispatcher.draining = True
        return ended("interrupted", 75)(spec)

    with_knowing_champion(box, 7)
    box.executor.script["train"] = [moved_meanwhile]
    box.drop("b")
    box.ticks(20, now=NOW + 50)
    ticks(box.new_dispatcher(), 20, now=NOW + 10**6)
    trained = ["train"] if kept == "adapter" else ["train", "train"]
    assert box.executor.steps == ["prepare", *trained, "merge", "evaluate", "decide"]
    assert box.run(2).outcome == "promoted"


@pytest.mark.parametrize("step", ["prepare", "train", "merge", "evaluate", "decide"])
def test_a_model_that_was_rolled_back_does_not_return_as_its_child(box: Box, step: str) -> None:
    with_knowing_champion(box, 0)
    box.executor.goes_on = True
    box.meanwhile(step, lambda: swears(box))
    box.drop("b")
    ticks(box.new_dispatcher(), 24, NOW + 50)
    steps = ["prepare", "train", "merge", "evaluate", "decide"]
    assert box.executor.steps == [*steps[: steps.index(step) + 1], *steps]
    adapter = run_files.load_adapter(box.settings.work_folder, 2)
    assert adapter is not None
    with transaction(box.engine) as session:
        past = promotion.champions_of(session, "default")
    assert adapter.start is None or adapter.start.model_id not in history.blocked(past)
    assert box.run(2).outcome == "promoted"
    with transaction(box.engine) as session:
        (told,) = session.exec(select(Event).where(Event.kind == "run_began_again")).all()
    assert told.detail == {"reason": "generation 1, from which it was trained, is not the champion any more"}


def test_a_training_from_a_model_that_is_rolled_back_is_stopped(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    with_knowing_champion(box, 0)
    box.executor.goes_on = True
    box.drop("b")
    box.ticks(2, now=NOW + 50)
    assert box.executor.steps == ["prepare", "train"]
    with monkeypatch.context() as training:
        training.setattr(box.executor, "poll", lambda _spec: JobState.RUNNING)
        box.ticks(3, now=NOW + 60)
        assert box.executor.cancelled == []
        swears(box)
        box.ticks(3, now=NOW + 70)
    assert set(box.executor.cancelled) == {"2-train-1"}
    box.executor.script["train"] = [ended("interrupted", 75)]
    box.ticks(20, now=NOW + 80)
    assert box.executor.steps == ["prepare", "train", "prepare", "train", "merge", "evaluate", "decide"]
    assert (box.run(2).outcome, box.run(2).failures) == ("promoted", 0)


def test_drops_are_put_on_trial_in_the_moment_in_which_the_run_ends_or_not_at_all(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.drop("a")
    box.ticks()
    box.executor.outcome = "worse"
    box.drop("b")
    with monkeypatch.context() as broken:
        box.ticks(4)
        broken.setattr(run_queue, "change", Mock(side_effect=FULL))
        with pytest.raises(OSError, match="disk full"):
            box.ticks()
    assert box.executor.steps[-1] == "decide"
    # Only now another champion: a drop that the old verdict put on trial would stay there.
    swears(box)
    box.executor.outcome = "not_shown_better"
    box.ticks()
    assert box.run(2).outcome == "not_shown_better"
    with transaction(box.engine) as session:
        assert session.exec(select(Suspect)).all() == []


@pytest.mark.parametrize(("module", "name"), [(run_queue, "finish"), (suspects, "follow_verdict")])
def test_a_run_that_cannot_end_promotes_nothing(
    box: Box, monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    link = box.settings.work_folder / "tracks/default/champion"
    box.drop("a")
    box.ticks(1)
    serves = link.readlink()
    with monkeypatch.context() as broken:
        broken.setattr(module, name, full)
        with pytest.raises(OSError, match="disk full"):
            box.ticks()
    assert (box.promotions(), link.readlink()) == ([], serves)
    ticks(box.new_dispatcher())
    assert (box.run().outcome, len(box.promotions())) == ("promoted", 1)
    assert link.readlink() != serves


def test_a_missing_base_model_is_said_and_nothing_is_lost(box: Box) -> None:
    base = Path(box.settings.base_model)
    base.rename(base.with_name("elsewhere"))
    dispatcher = box.new_dispatcher()
    box.drop("a")
    ticks(dispatcher)
    run = box.run()
    assert run.state == RunState.QUEUED
    assert str(base) in (run.error or "")
    assert dispatcher.upkeep.bases.problem("default") is not None
    base.with_name("elsewhere").rename(base)
    ticks(dispatcher, now=NOW + 100_000)
    assert box.run().outcome == "promoted"


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_base_model_is_not_looked_at_again_until_a_file_of_it_changes(
    box: Box, monkeypatch: pytest.MonkeyPatch, spoilt: bool
) -> None:
    config, looks = Path(box.settings.base_model) / "config.json", []
    whole = config.read_bytes()
    if spoilt:
        config.write_bytes(b"{")

    def look(folder: Path, fmt: str) -> None:
        looks.append(folder)
        check_base(folder, fmt)

    monkeypatch.setattr("daemon.champions.base_models.check_base", look)
    bases = box.new_dispatcher().upkeep.bases
    for second in range(5):
        bases.refresh(NOW + second)
    assert (len(looks), bases.problem("default") is not None) == (1, spoilt)
    config.write_bytes(whole + b" ")
    bases.refresh(NOW + 9)
    assert (len(looks), bases.problem("default")) == (2, None)
    config.chmod(0o640)
    bases.refresh(NOW + 10)
    assert len(looks) == 3, "it may have become readable"


@pytest.mark.parametrize(("fmt", "is_usable"), [("auto", False), ("alpaca", True)])
def test_a_base_model_without_a_default_template_is_used_where_none_is_needed(
    box: Box, fmt: str, is_usable: bool
) -> None:
    further = Path(box.settings.base_model) / "additional_chat_templates"
    further.mkdir()
    (further / "tool_use.jinja").touch()
    train = box.settings.train.model_copy(update={"format": fmt})
    bases = box.new_dispatcher(box.settings.model_copy(update={"train": train})).upkeep.bases
    assert (bases.problem("default") is None) == is_usable


def test_a_base_model_with_other_weights_of_the_same_size_and_time_is_another(box: Box) -> None:
    bases = box.new_dispatcher().upkeep.bases
    note = box.settings.state_folder / "tracks/default/base.json"
    before = json.loads(note.read_bytes())["model_id"]
    weights = next(Path(box.settings.base_model).glob("*.safetensors"))
    info, data = weights.stat(), weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(weights, ns=(info.st_atime_ns, info.st_mtime_ns))
    bases.refresh(NOW + 1)
    assert json.loads(note.read_bytes())["model_id"] != before


@pytest.mark.parametrize("damage", [b"", b"[1]", b"{\xff", b'{"signature": SIGNATURE}'])
def test_a_damaged_note_on_the_base_model_is_made_again(box: Box, damage: bytes) -> None:
    box.new_dispatcher()
    note = box.settings.state_folder / "tracks/default/base.json"
    whole = note.read_bytes()
    note.write_bytes(damage.replace(b"SIGNATURE", json.dumps(json.loads(whole)["signature"]).encode()))
    assert box.new_dispatcher().upkeep.bases.problem("default") is None
    assert note.read_bytes() == whole


def test_an_attempt_that_never_reached_the_spool_is_ordered_again_and_nobody_died(box: Box) -> None:
    dispatcher = Dispatcher(box.engine, box.settings, LocalExecutor(spool_of(box.settings.state_folder)))
    with transaction(box.engine) as session:
        states.ensure_track(session, "default", NOW)
    dispatcher.recover(NOW)
    box.drop("a")
    dispatcher.tick(NOW)
    entry = box.settings.state_folder / "spool" / "queue" / "1-prepare-1.json"
    entry.unlink()
    dispatcher.tick(NOW + 1)
    assert entry.exists()
    assert box.run().deaths == 0


def test_a_run_with_trouble_of_its_own_waits_alone_and_goes_on_when_it_is_over(box: Box) -> None:
    two = Settings.model_validate({**box.settings.model_dump(exclude_unset=True), "tracks": {"other": {}}})
    dispatcher = box.new_dispatcher(two)
    # A file in the place of a folder: the kernel says so to root, too.
    place = box.settings.state_folder / "runs/1"
    place.parent.mkdir(exist_ok=True)
    place.touch()
    box.drop("a")
    box.drop("b", "other")
    ticks(dispatcher, 20)
    assert (box.run().state, box.run(2).state) == (RunState.WAITING, RunState.SUCCEEDED)
    run = box.run()
    assert (run.failures, run.deaths, run.not_before) == (0, 0, NOW + 30_000)
    assert (run.error or "").startswith("the files of run 1 cannot be used: ")
    assert "dropforge cancel 1" in (run.hint or "")
    with transaction(box.engine) as session:
        open_ones = [one for one in session.exec(select(Attempt)) if one.state == AttemptState.SUBMITTED]
    assert open_ones == []
    place.unlink()
    ticks(dispatcher, 20, run.not_before)
    assert (box.run().state, box.run().failures) == (RunState.SUCCEEDED, 0)


def test_a_running_run_whose_files_cannot_be_used_at_the_start_waits(box: Box) -> None:
    box.drop("a")
    ticks(box.new_dispatcher(), 2)
    assert box.run().state == RunState.RUNNING
    # A folder in the place of a leftover: the kernel unlinks none for root either.
    (box.settings.state_folder / "runs/1/.drops.json.1.tmp").mkdir()
    box.new_dispatcher()
    assert (box.run().state, box.run().failures, box.run().deaths) == (RunState.WAITING, 0, 0)
    assert (box.run().error or "").startswith("the files of run 1 cannot be used: ")


def test_the_judge_alone_may_use_the_network_and_its_judgement_reaches_the_decision(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-hush")
    dispatcher = box.new_dispatcher(box.settings.model_copy(update={"judge": JUDGE}))
    box.drop("a")
    ticks(dispatcher)
    assert box.executor.steps == ["prepare", "train", "merge", "evaluate", "judge", "decide"]
    assert [spec.step for spec in box.executor.submitted if spec.network] == ["judge"]
    assert box.executor.submitted[-1].inputs["judge"] == "runs/1/judge.json"
    kept = [path for path in box.settings.state_folder.rglob("*") if path.is_file()]
    assert [path for path in kept if b"sk-hush" in path.read_bytes()] == []


def test_a_retried_run_without_a_judge_does_not_keep_the_old_judgement(box: Box) -> None:
    box.executor.script["decide"] = [ended("failed", 65)]
    box.drop("a")
    ticks(box.new_dispatcher(box.settings.model_copy(update={"judge": JUDGE})))
    run_owner.retry(box.engine, 1, NOW + 100)
    ticks(box.new_dispatcher(), now=NOW + 200)
    assert box.executor.steps == ["prepare", "train", "merge", "evaluate", "judge", "decide", "decide"]
    assert "judge" not in box.executor.submitted[-1].inputs


def test_an_interrupted_judge_keeps_its_replies_for_the_next_attempt(box: Box) -> None:
    def cut_off(spec: StepSpec) -> StepResult:
        folder = Path(spec.root) / spec.folder / "predictions"
        folder.mkdir()
        (folder / "judge.replies.jsonl").write_text("{}")
        return ended("interrupted", 75)(spec)

    def go_on(spec: StepSpec) -> StepResult:
        first = (Path(spec.root) / spec.folder).with_name("judge-1")
        assert (first / "predictions/judge.replies.jsonl").exists()
        return box.executor.good(spec)

    box.executor.script["judge"] = [cut_off, go_on]
    box.drop("a")
    ticks(box.new_dispatcher(box.settings.model_copy(update={"judge": JUDGE})), 20)
    assert box.run().outcome == "promoted"
    assert box.executor.steps[-3:] == ["judge", "judge", "decide"]


def test_an_artifact_whose_files_changed_since_is_not_published(box: Box) -> None:
    def torn(spec: StepSpec) -> StepResult:
        (Path(spec.root) / spec.folder / "adapter.bin").write_bytes(b"half")
        return box.executor.good(spec).model_copy(update={"outputs": {"adapter.bin": "0" * 64}})

    box.executor.script["train"] = [torn]
    box.drop("a")
    box.ticks()
    assert "adapter.bin" in (box.run().error or "")
    assert "train" not in run_files.published(box.settings.work_folder, 1)


def test_trouble_with_one_run_stops_no_other(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = box.new_dispatcher()
    broken = run_files.publish

    def publish(spec: StepSpec, result: StepResult, *lock: Any) -> Any:
        if spec.run == 1:
            message = "a defect"
            raise LookupError(message)
        return broken(spec, result, *lock)

    monkeypatch.setattr(run_files, "publish", publish)
    box.drop("a")
    ticks(dispatcher)
    assert (box.run().state, box.run().error) == (RunState.FAILED, "LookupError: a defect")
    assert box.executor.cancelled == ["1-prepare-1"], "nobody polls its step any more"
    box.drop("b")
    ticks(dispatcher)
    assert box.run(2).outcome == "promoted"


def test_the_service_manager_is_told_how_far_a_step_is_in_the_words_of_status(box: Box) -> None:
    box.drop("a")
    box.dispatcher.tick(NOW)
    folder = box.dispatcher._root / "runs" / "1" / "attempts" / "prepare-1"
    progress = Progress(step="prepare", done=3, total=9, eta_seconds=75.0)
    durable.write_hint(folder / "progress.json", progress.model_dump())
    assert box.dispatcher.describe() == f"run 1 {progress.words}" == "run 1 prepare 3/9, 1 min 15 s left"


def test_a_training_that_dies_after_each_new_checkpoint_is_not_quarantined(box: Box) -> None:
    box.executor.script["train"] = [leave_checkpoint] * 5
    box.drop("a")
    box.ticks(count=30)
    assert (box.run().outcome, box.run().deaths) == ("promoted", 0)
    assert box.executor.steps.count("train") == 6


# --- what a crash leaves


def test_what_a_dead_daemon_left_half_written_is_cleared_away_and_a_living_steps_files_are_not(box: Box) -> None:
    box.drop("a")
    box.dispatcher.tick(NOW)
    root = box.settings.state_folder
    attempt = root / "runs/1/attempts/prepare-1"
    dead = [attempt / ".spec.json.0.tmp", root / "runs/1/.prepare.json.0.tmp"]
    alive = attempt / ".result.json.0.tmp"
    for path in (*dead, alive):
        path.write_text("part")
    box.new_dispatcher()
    assert [path.name for path in dead if path.exists()] == []
    assert alive.exists()


def test_checkpoints_stay_until_their_run_has_ended(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.drop("a")
    checkpoint = box.settings.state_folder / "runs/1/checkpoints/step-2-1"
    box.meanwhile("train", partial(checkpoint.mkdir, parents=True))
    with monkeypatch.context() as killed:
        killed.setattr(run_queue, "finish", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            box.ticks()
    assert checkpoint.exists()
    ticks(box.new_dispatcher())
    assert (box.run().outcome, checkpoint.parent.exists()) == ("promoted", False)


@pytest.mark.parametrize("name", [SPEC_NAME, RESULT_NAME])
def test_an_attempt_with_a_damaged_file_is_repeated(box: Box, name: str) -> None:
    box.drop("a")
    while "train" not in box.executor.steps:
        box.ticks(1)
    (box.settings.state_folder / "runs/1/attempts/train-1" / name).write_text('{"status": ')
    ticks(box.new_dispatcher())
    assert (box.run().outcome, box.executor.steps.count("train")) == ("promoted", 2)


def test_a_run_whose_spec_is_damaged_each_time_crashes(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.drop("a")
    monkeypatch.setattr(box.executor, "poll", lambda _spec: JobState.RUNNING)
    for number in range(1, 4):
        while not (spec := box.settings.state_folder / f"runs/1/attempts/prepare-{number}" / SPEC_NAME).exists():
            box.ticks(1)
        spec.write_text("{")
        ticks(box.new_dispatcher(), 1)
    assert (box.run().state, box.run().deaths) == ("crashed", 3)


def test_a_step_at_work_writes_nothing_into_the_database(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box.executor, "poll", lambda _spec: JobState.RUNNING)
    box.drop("a")
    box.dispatcher.tick(NOW)
    watch = ChangeWatch(box.engine)
    watch.changed()
    for seconds in range(0, 600, 10):
        box.dispatcher.tick(NOW + 1000 * seconds)
    assert not watch.changed(), "each commit wakes hooks and messages, and every open page asks for all it shows"


def test_a_failure_counts_though_what_it_left_cannot_be_deleted(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves_a_file(spec: StepSpec) -> StepResult:
        (Path(spec.root) / spec.folder / "half").write_bytes(b"")
        monkeypatch.setattr(Path, "unlink", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
        return ended("failed", 1)(spec)

    box.executor.script["train"] = [leaves_a_file]
    box.drop("a")
    box.ticks()
    assert (box.run().state, box.run().failures) == (RunState.WAITING, 1)


def test_new_answers_of_a_drop_are_noted_and_count_in_the_run_after_they_are_accepted(box: Box) -> None:
    def proposes(spec: StepSpec) -> StepResult:
        found = (Replacement(old=1, new=2, rows=30), Replacement(old=7, new=2, rows=10))
        return good_result(spec, made_dataset(spec, proposals=found))

    def new_answers() -> int | None:
        with transaction(box.engine) as session:
            return session.get_one(Drop, drop).new_answers

    box.executor.script["prepare"] = [proposes]
    box.drop("a")
    drop = box.drop("b")
    box.ticks()
    assert new_answers() == 40
    assert [drop.answers_accepted for drop in box.executor.submitted[0].drops] == [False, False]
    drops.accept_answers(box.engine, drop, Word("", NOW), box.settings)
    box.ticks(now=NOW + 10**7)
    again = next(spec for spec in box.executor.submitted if spec.run == 2)
    assert [drop.answers_accepted for drop in again.drops] == [False, True]
    assert new_answers() == 0
    with transaction(box.engine) as session:
        leave_one_out.queue_run(session, Purpose.TRIAL, "default", drop, NOW + 10**7, tested=[drop])
    box.executor.script["prepare"] = [proposes]
    box.ticks(now=NOW + 10**7)
    assert (box.executor.submitted[-1].run, new_answers()) == (3, 0), "a trial has not all drops of the track"
