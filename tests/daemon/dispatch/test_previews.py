"""Previews through the dispatcher: which drops the champion answers, when, what is stored, and what a failure costs."""

import errno
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from sqlalchemy import Engine
from sqlmodel import col, select

from daemon.champions import decisions
from daemon.dispatch.dispatcher import Dispatcher
from daemon.dispatch.spool import JobState, LocalExecutor, Spool
from daemon.dispatch.step_process import step_command
from daemon.inbox.answers.verdict_notes import VerdictNotes
from daemon.inbox.folders import InboxFolders
from daemon.inbox.intake import Intake
from daemon.inbox.watcher import Settled, make_inbox
from daemon.messages.texts import text_of
from daemon.queue import drops, order
from daemon.settings.model import HookSettings, Settings
from daemon.state.clauses import preview_clauses
from daemon.state.database import transaction
from daemon.state.events import Word
from daemon.state.states import DropState, RunState
from daemon.state.tables import Drop, Event, Promotion, Run, Track
from daemon.state.troubles import Troubles
from daemon.views.overview import Overview
from pipeline import durable
from pipeline.artifacts import Preview
from pipeline.contract import RESULT_NAME, SPEC_NAME, StepResult, StepSpec
from pipeline.models.loading import load_tokenizer
from pipeline.models.manifest import write_manifest
from tests import run_owner
from tests.daemon.dispatch.test_dispatcher import NOW, Box, ScriptedExecutor, ended
from tests.made_artifacts import good_result, made_verdict
from tests.model_families import make_family
from tests.pipeline.preview.test_step import TOKENS, answers_of, questions, rows

RECORDS = 40


class Answers(ScriptedExecutor):
    """A champion that won with 81.3 points, and that answers a drop's records with 6."""

    points = 6.0

    def good(self, spec: StepSpec) -> StepResult:
        if spec.step == "decide":
            return good_result(spec, made_verdict(spec, self.outcome, gain=12.3, candidate_score=81.3))
        if spec.step == "preview":
            return good_result(spec, Preview(records=RECORDS, points=self.points, metric="exact_match"))
        return super().good(spec)


class Noon(Box):
    """A track with a champion, where files wait for the night."""

    executor: Answers

    def __init__(self, engine: Engine, settings: Settings, executor: Answers | None = None) -> None:
        super().__init__(engine, settings, executor or Answers())
        self.drop("a")
        self.ticks()
        self.executor.outcome = "not_shown_better"

    def add(self, **fields: Any) -> int:
        with transaction(self.engine) as session:
            name = fields.pop("name", "b.jsonl")
            return run_owner.add_drop(session, name=name, name_bytes=name.encode(), **fields)

    def preview(self, number: int) -> dict[str, Any] | None:
        with transaction(self.engine) as session:
            return session.get_one(Drop, number).preview

    @property
    def tried(self) -> list[int]:
        return [spec.attempt for spec in self.executor.submitted if spec.step == "preview"]

    def folder(self, drop: int) -> Path:
        return self.settings.work_folder / f"runs/1/attempts/preview-{drop}"

    def events(self) -> list[Event]:
        with transaction(self.engine) as session:
            return list(session.exec(select(Event).where(Event.kind == "drop_previewed").order_by(col(Event.id))))


@pytest.fixture
def noon(engine: Engine, settings: Settings) -> Noon:
    return Noon(engine, settings)


def test_the_champion_answers_a_drop_that_waits_for_a_run(noon: Noon) -> None:
    number = noon.add()
    noon.ticks(1)
    assert noon.dispatcher.describe() == f"the champion answers records of drop {number}"
    noon.ticks()
    assert noon.dispatcher.describe() == "idle"
    assert noon.preview(number) == {"records": RECORDS, "points": 6.0, "metric": "exact_match", "usual": 81.3}
    (spec,) = [spec for spec in noon.executor.submitted if spec.step == "preview"]
    assert (spec.champion.generation, [drop.id for drop in spec.drops]) == (1, [1, number])
    assert (spec.config.evaluate.metric, spec.config.evaluate.max_new_tokens) == ("exact_match", 16)
    assert (noon.tried, noon.folder(number).exists()) == ([number], False)
    assert [run.id for run in Overview.of(noon.settings).runs()] == [1], "a preview is no run"


def test_one_that_is_far_below_its_sisters_is_told_at_once(noon: Noon) -> None:
    low = noon.add(name="poisoned.jsonl")
    noon.ticks()
    noon.executor.points = 78.0
    usual = noon.add(name="mended.jsonl")
    noon.ticks()
    with transaction(noon.engine) as session:
        texts = [text_of(session, event) for event in noon.events()]
    assert texts[1] is None
    assert texts[0] is not None
    assert texts[0].title == "[dropforge] LOW AGREEMENT: default, poisoned.jsonl"
    assert texts[0].body.splitlines() == [
        "the file: poisoned.jsonl, drop 2",
        "agreement 6.0 points: the champion's answers to 40 new records (exact match)",
        "far below its 81.3 on held-out records: a new kind of task, or wrong answers",
        "it is used all the same; to take it out: dropforge drops withdraw 2 --reason TEXT",
    ]
    assert noon.drop_state(low) == DropState.ACCEPTED
    noon.drop("c")
    noon.ticks(24)
    with transaction(noon.engine) as session:
        assert session.get_one(Run, 2).snapshot == [1, low, usual, 4], "nothing follows from it"


def _no_verdict(noon: Noon) -> None:
    with transaction(noon.engine) as session:
        track = session.get_one(Track, "default")
        track.metric = None
        session.add(track)
    noon.add()


def _paused(noon: Noon) -> None:
    order.pause(noon.engine, "default", Word("the machine is needed", NOW, "ada"))
    noon.add()


def _base_serves(noon: Noon) -> None:
    decisions.rollback(noon.engine, noon.settings.work_folder, "default", Word("it swears", NOW), to=0)
    noon.add()


def _known(noon: Noon) -> None:
    """Let the drop that the champion was trained on count as new."""
    with transaction(noon.engine) as session:
        session.get_one(Drop, 1).new_answers = 3
    nightly = noon.settings.model_copy(update={"trigger": "nightly"})
    drops.accept_answers(noon.engine, 1, Word("", NOW, "ada"), nightly)
    with transaction(noon.engine) as session:
        assert session.get_one(Drop, 1).first_run is None


def _shared_gpu(noon: Noon) -> None:
    hooks = HookSettings(before_training=("true",))
    noon.dispatcher = noon.new_dispatcher(noon.settings.model_copy(update={"hooks": hooks}))
    noon.add()


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda noon: noon.add(role="heldout"), id="held out"),
        pytest.param(lambda noon: noon.add(state=DropState.WITHDRAWN), id="withdrawn"),
        pytest.param(lambda noon: noon.add(state=DropState.REJECTED), id="rejected"),
        pytest.param(lambda noon: noon.add(first_run=1), id="not new"),
        pytest.param(_no_verdict, id="no verdict"),
        pytest.param(_paused, id="paused"),
        pytest.param(_base_serves, id="a base model serves"),
        pytest.param(_known, id="the champion was trained on it"),
        pytest.param(_shared_gpu, id="a server shares the GPU"),
    ],
)
def test_no_other_drop_is_answered(noon: Noon, act: Callable[[Noon], object]) -> None:
    act(noon)
    noon.ticks()
    assert (noon.tried, noon.dispatcher._troubles.words) == ([], {})


def test_a_track_that_is_not_in_the_settings_keeps_no_other_from_its_turn(noon: Noon) -> None:
    with transaction(noon.engine) as session:
        track, won = session.get_one(Track, "default"), session.exec(select(Promotion)).all()[-1]
        session.add(Track(**{**track.model_dump(), "name": "gone"}))
        session.add(Promotion(**{**won.model_dump(), "id": None, "track": "gone", "kind": "forced"}))
    noon.add(track="gone")
    number = noon.add()
    noon.ticks()
    assert noon.tried == [number]


class NoWorker(Answers):
    """The order of a preview stays in the spool: no worker is running."""

    def __init__(self, spool: Spool) -> None:
        super().__init__()
        self._spool = spool

    def submit(self, spec: StepSpec) -> None:
        super().submit(spec)
        if spec.step == "preview":
            LocalExecutor.submit(self, spec)

    def poll(self, spec: StepSpec) -> JobState:
        return LocalExecutor.poll(self, spec) if spec.step == "preview" else super().poll(spec)

    def cancel(self, key: str) -> None:
        LocalExecutor.cancel(self, key)


@pytest.fixture
def waiting(engine: Engine, settings: Settings) -> Noon:
    """A preview of drop 2 is ordered."""
    noon = Noon(engine, settings, NoWorker(run_owner.spool_of(settings.state_folder)))
    noon.add()
    noon.ticks(3)
    assert noon.dispatcher.describe() == "the champion answers records of drop 2"
    return noon


def _is_cancelled(noon: Noon) -> bool:
    spool = run_owner.spool_of(noon.settings.state_folder)
    return noon.preview(2) is None and not noon.folder(2).exists() and not any(spool.queue.iterdir())


def test_a_run_that_becomes_due_is_claimed_at_once_and_the_preview_is_cancelled(waiting: Noon) -> None:
    waiting.drop("c")
    waiting.ticks(1)
    assert waiting.executor.steps[-1] != "preview"
    waiting.ticks()
    assert (waiting.run(2).state, waiting.tried) == (RunState.SUCCEEDED, [2])
    assert _is_cancelled(waiting)
    waiting.meanwhile("train", waiting.add)
    waiting.drop("d")
    waiting.ticks()
    assert waiting.executor.steps[-2:] == ["decide", "preview"], "it does not begin while a run is going"


def test_a_stop_of_the_daemon_cancels_it_and_it_begins_again(waiting: Noon) -> None:
    waiting.dispatcher.draining = True
    waiting.ticks(2)
    assert (waiting.tried, waiting.dispatcher.describe()) == ([2], "idle")
    assert _is_cancelled(waiting)
    waiting.dispatcher = waiting.new_dispatcher()
    waiting.ticks(1)
    assert waiting.tried == [2, 2]


def test_an_order_that_cannot_be_written_is_a_trouble_and_written_again_in_a_minute(
    noon: Noon, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    troubles = Troubles(lambda: clock[0])
    noon.dispatcher = Dispatcher(noon.engine, noon.settings, noon.executor, troubles)
    submit = Mock(side_effect=PermissionError(errno.EACCES, "Permission denied", "spec.json"))
    monkeypatch.setattr(noon.executor, "submit", submit)
    number = noon.add()
    noon.ticks()
    assert (submit.call_count, list(troubles.words), noon.dispatcher.describe()) == (1, ["previews"], "idle")
    monkeypatch.undo()
    clock[0] = 61.0
    noon.ticks()
    assert ((noon.preview(number) or {})["records"], troubles.words) == (RECORDS, {})


def _damaged(spec: StepSpec) -> StepResult:
    return good_result(spec, Preview(records=1)).model_copy(update={"artifact": {"records": "many"}})


@pytest.mark.parametrize("end", [ended("failed", 65), ended("failed", 137), lambda _spec: None, _damaged])
def test_a_preview_that_fails_is_not_repeated_and_the_run_comes(
    noon: Noon, end: Callable[[StepSpec], StepResult | None]
) -> None:
    noon.executor.script["preview"] = [end]
    number, later = noon.add(), noon.add()
    noon.ticks()
    noon.ticks(now=NOW + 100)
    assert noon.tried == [number, later], "the next one has its turn"
    assert noon.preview(number) == {"records": 0, "points": None, "metric": "", "usual": None}
    assert preview_clauses(Overview.of(noon.settings).drop(number)) == []
    assert (len(noon.events()), noon.folder(number).exists()) == (1, False)
    noon.drop("c")
    noon.ticks(now=NOW + 200)
    assert noon.run(2).state == RunState.SUCCEEDED


def _foreign(spec: StepSpec) -> StepResult:
    """Return what an earlier worker leaves that was slow to stop."""
    return good_result(spec.model_copy(update={"fence": "earlier"}), Preview(records=1))


@pytest.mark.parametrize("end", [ended("interrupted", 75), _foreign])
def test_one_that_was_interrupted_begins_again(noon: Noon, end: Callable[[StepSpec], StepResult]) -> None:
    number = noon.add()
    noon.executor.script["preview"] = [end]
    noon.ticks(2)
    assert noon.preview(number) is None
    noon.ticks()
    assert noon.tried == [number, number]
    assert (noon.preview(number) or {})["records"] == RECORDS


def test_files_of_an_earlier_daemon_are_removed_and_not_used(noon: Noon, tmp_path: Path) -> None:
    number = noon.add()
    noon.ticks(1)
    (tmp_path / "precious").mkdir()
    spec = noon.executor.submitted[-1].model_copy(update={"folder": str(tmp_path / "precious")})
    (noon.folder(number) / SPEC_NAME).write_text(spec.model_dump_json())
    (noon.folder(number) / RESULT_NAME).write_text(good_result(spec, Preview(records=1)).model_dump_json())
    spool = run_owner.spool_of(noon.settings.state_folder)
    durable.write_json(spool.entry(spec.key), {"fence": spec.fence})
    noon.dispatcher = noon.new_dispatcher()
    assert not noon.folder(number).exists()
    assert not any(spool.queue.iterdir())
    noon.ticks()
    assert (tmp_path / "precious").exists()
    assert (noon.preview(number) or {})["records"] == RECORDS


def test_no_message_tells_of_a_drop_that_was_withdrawn_meanwhile(noon: Noon) -> None:
    number = noon.add()
    noon.ticks(1)
    drops.withdraw(noon.engine, number, Word("wrong", NOW, "ada"), noon.settings)
    noon.ticks()
    assert (noon.tried, noon.events()) == ([number], [])


class ByProcess(Answers):
    """Previews are made by the program that the worker starts."""

    def good(self, spec: StepSpec) -> StepResult:
        if spec.step != "preview":
            return super().good(spec)
        path = Path(spec.root) / spec.folder / SPEC_NAME
        subprocess.run(step_command(spec, path), check=True)
        return StepResult.model_validate(durable.read_json(path.with_name(RESULT_NAME)))


@pytest.mark.long
def test_a_real_model_answers_a_dropped_file_and_the_note_beside_it_says_how_well(
    engine: Engine, settings: Settings, tiny_llama: Path, tmp_path: Path
) -> None:
    base = make_family(tmp_path / "qwen3", "qwen3", load_tokenizer(tiny_llama))
    noon = Noon(engine, settings.model_copy(update={"base_model": str(base), "trigger": "nightly"}), ByProcess())
    identity = write_manifest(base)
    shutil.copytree(base, noon.settings.work_folder / "models" / identity)
    with transaction(engine) as session:
        track, won = session.get_one(Track, "default"), session.exec(select(Promotion)).all()[-1]
        track.champion_model_id = won.model_id = identity
        track.champion_path = won.model_path = f"models/{identity}"
        track.max_new_tokens = TOKENS
        session.get_one(Drop, 1).state = DropState.WITHDRAWN
    asked = questions(40)
    own = zip(asked, answers_of(base, asked), strict=True)
    known = [(one, answer) for one, answer in own if answer.isprintable() and answer != "nothing"][:8]
    content = rows(
        [one for one, _ in known],
        [answer if number % 2 else "something else" for number, (_, answer) in enumerate(known)],
    )
    text = "".join(json.dumps(row) + "\n" for row in content)
    make_inbox(noon.settings)
    (noon.settings.inbox_folder / "new.jsonl").write_text(text)
    assert Intake(engine, noon.settings).take(Settled("default", "train", b"new.jsonl"), NOW).kind == "accepted"
    noon.ticks()
    VerdictNotes(engine, noon.settings, InboxFolders(noon.settings.inbox_folder)).refresh()
    note = (noon.settings.inbox_folder / "done/new.jsonl.verdict.txt").read_text().splitlines()
    assert note[2].startswith("Accepted: it waits for the next run of track default, which begins by the schedule")
    agreement = "agreement 50.0 points: the champion's answers to 8 new records (exact match)"
    assert note[3:] == [f"Before any training: {agreement}."]
    assert [view.preview and view.preview["records"] for view in Overview.of(noon.settings).drops()] == [8, None]
