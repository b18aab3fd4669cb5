"""Previews through the dispatcher: which drops the champion answers, when, what is stored, and what a failure costs."""

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from sqlalchemy import Engine
from sqlmodel import col, select

from daemon.dispatch import previews
from daemon.dispatch.step_process import step_command
from daemon.inbox.answers.verdict_notes import VerdictNotes
from daemon.inbox.folders import InboxFolders
from daemon.inbox.intake import Intake
from daemon.inbox.watcher import Settled, make_inbox
from daemon.messages.texts import text_of
from daemon.queue import order
from daemon.settings.model import HookSettings, Settings
from daemon.state.clauses import preview_clauses
from daemon.state.database import transaction
from daemon.state.events import Word
from daemon.state.states import DropState, RunState
from daemon.state.tables import Drop, Event, Promotion, Run, Track
from daemon.views.overview import Overview
from pipeline import durable
from pipeline.artifacts import Preview
from pipeline.contract import RESULT_NAME, SPEC_NAME, StepResult, StepSpec
from pipeline.models.loading import load_tokenizer
from pipeline.models.manifest import write_manifest
from tests import run_owner
from tests.daemon.dispatch.test_dispatcher import NOW, Box, ScriptedExecutor, ended, engine, settings
from tests.made_artifacts import good_result, made_verdict
from tests.model_families import make_family
from tests.pipeline.preview.test_step import TOKENS, answers_of, questions, rows

__all__ = ["engine", "settings"]
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


def test_it_says_so_in_the_list_and_tells_it_at_once_if_it_is_far_below_its_sisters(noon: Noon) -> None:
    low = noon.add(name="poisoned.jsonl")
    noon.ticks()
    noon.executor.points = 78.0
    usual = noon.add(name="mended.jsonl")
    noon.ticks()
    views = Overview.of(noon.settings).drops()
    assert {view.id: view.preview and view.preview["points"] for view in views} == {usual: 78.0, low: 6.0, 1: None}
    with transaction(noon.engine) as session:
        texts = [text_of(session, event) for event in noon.events()]
    assert texts[1] is None
    assert texts[0] is not None
    assert texts[0].title == "[dropforge] LOW AGREEMENT: default, poisoned.jsonl"
    assert texts[0].body.splitlines() == [
        "the file: poisoned.jsonl, drop 2",
        "agreement 6.0 points: the champion's answers to 40 new records (exact match)",
        "far below its 81.3 on earlier drops: a new kind of task, or wrong answers",
        "it is used all the same; to take it out: dropforge drops withdraw 2 --reason TEXT",
    ]
    assert noon.drop_state(low) == DropState.ACCEPTED
    noon.drop("c")
    noon.ticks(24)
    with transaction(noon.engine) as session:
        assert session.get_one(Run, 2).snapshot == [1, low, usual, 4], "nothing follows from it"


def _no_verdict(noon: Noon) -> dict[str, Any]:
    with transaction(noon.engine) as session:
        track = session.get_one(Track, "default")
        track.metric = None
        session.add(track)
    return {}


def _paused(noon: Noon) -> dict[str, Any]:
    order.pause(noon.engine, "default", Word("the machine is needed", NOW, "ada"))
    return {}


@pytest.mark.parametrize(
    "before",
    [
        lambda _noon: {"role": "heldout"},
        lambda _noon: {"state": DropState.WITHDRAWN},
        lambda _noon: {"state": DropState.REJECTED},
        lambda _noon: {"first_run": 1},
        _no_verdict,
        _paused,
    ],
)
def test_no_other_drop_is_answered(noon: Noon, before: Callable[[Noon], dict[str, Any]]) -> None:
    noon.add(**before(noon))
    noon.ticks()
    assert noon.tried == []


def test_a_track_that_is_not_in_the_settings_keeps_no_other_from_its_turn(noon: Noon) -> None:
    with transaction(noon.engine) as session:
        track, won = session.get_one(Track, "default"), session.exec(select(Promotion)).all()[-1]
        session.add(Track(**{**track.model_dump(), "name": "gone"}))
        session.add(Promotion(**{**won.model_dump(), "id": None, "track": "gone", "kind": "forced"}))
    noon.add(track="gone")
    number = noon.add()
    noon.ticks()
    assert noon.tried == [number]


def test_a_base_model_answers_nothing(engine: Engine, settings: Settings) -> None:
    box = Box(engine, settings, ScriptedExecutor())
    with transaction(engine) as session:
        run_owner.add_drop(session)
    box.ticks()
    assert box.executor.steps == []


def test_a_run_that_is_due_goes_first_and_one_that_becomes_due_waits(noon: Noon) -> None:
    noon.drop("b")
    noon.ticks()
    assert (noon.tried, noon.run(2).state) == ([], RunState.SUCCEEDED)
    number = noon.add()
    noon.dispatcher.tick(NOW)
    noon.drop("c")
    noon.dispatcher.tick(NOW)
    assert (noon.tried, noon.run(3).state) == ([number], RunState.QUEUED)
    noon.meanwhile("train", noon.add)
    noon.ticks()
    assert (noon.tried, noon.run(3).state) == ([number, number + 2], RunState.SUCCEEDED)
    assert noon.preview(number) is not None
    assert noon.executor.steps[-2:] == ["decide", "preview"], "it does not begin while a run is going"


@pytest.mark.parametrize("end", [ended("failed", 65), ended("failed", 137), lambda _spec: None])
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


def test_one_that_takes_too_long_is_stopped_and_not_repeated(noon: Noon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(previews, "_MOST_SECONDS", 0.0)
    monkeypatch.setattr(noon.executor, "poll", Mock(side_effect=AssertionError))
    number = noon.add()
    noon.ticks(1)
    assert (noon.folder(number) / SPEC_NAME).exists()
    noon.ticks(3)
    assert not noon.folder(number).exists(), "its process sees that and stops"
    monkeypatch.undo()
    noon.drop("c")
    noon.ticks()
    assert (noon.tried, (noon.preview(number) or {})["records"]) == ([number], 0)
    assert noon.run(2).state == RunState.SUCCEEDED


def _foreign(spec: StepSpec) -> StepResult:
    """Return what an earlier worker leaves that was slow to stop."""
    return ended("interrupted", 75)(spec.model_copy(update={"fence": "earlier"}))


@pytest.mark.parametrize("end", [ended("interrupted", 75), _foreign])
def test_one_that_a_stop_interrupted_begins_again_and_one_that_went_on_is_not_begun_twice(
    noon: Noon, end: Callable[[StepSpec], StepResult]
) -> None:
    number = noon.add()
    noon.executor.script["preview"] = [end]
    noon.ticks(1)
    noon.dispatcher = noon.new_dispatcher()
    noon.ticks(2)
    first, second = (spec.fence for spec in noon.executor.submitted if spec.step == "preview")
    assert first == second, "the worker may be at it"
    assert noon.preview(number) is None
    noon.ticks()
    fences = [spec.fence for spec in noon.executor.submitted if spec.step == "preview"]
    assert (len(fences), len(set(fences))) == (3, 2)
    assert (noon.preview(number) or {})["records"] == RECORDS


def test_a_damaged_order_is_written_anew_and_a_damaged_result_is_none(noon: Noon) -> None:
    number = noon.add()
    noon.folder(number).mkdir(parents=True)
    (noon.folder(number) / SPEC_NAME).write_text("{")
    noon.ticks()
    assert noon.preview(number) is not None
    other = noon.add()
    noon.executor.script["preview"] = [
        lambda spec: good_result(spec, Preview(records=1)).model_copy(update={"artifact": {"records": "many"}})
    ]
    noon.ticks()
    assert (noon.preview(other) or {})["records"] == 0


def test_the_gpu_of_a_server_is_left_alone(engine: Engine, settings: Settings) -> None:
    hooks = HookSettings(before_training=("true",))
    noon = Noon(engine, settings)
    noon.settings = settings.model_copy(update={"hooks": hooks})
    noon.dispatcher = noon.new_dispatcher()
    noon.add()
    noon.ticks()
    (spec,) = [spec for spec in noon.executor.submitted if spec.step == "preview"]
    assert spec.env["DROPFORGE_DEVICE"] == "cpu"
    assert not (settings.state_folder / "gpu-lent.json").exists()


class ByProcess(Answers):
    """Previews are made by the program that the worker starts."""

    def good(self, spec: StepSpec) -> StepResult:
        if spec.step != "preview":
            return super().good(spec)
        path = Path(spec.root) / spec.folder / SPEC_NAME
        subprocess.run(step_command(spec, path), check=True)
        return StepResult.model_validate(durable.read_json(path.with_name(RESULT_NAME)))


def _answered(folder: Path, asked: list[str], before: Sequence[list[str]] = ()) -> list[list[str]]:
    """Return talks, questions and answers in turn, in which the model's last answer is one that a file may hold."""
    earlier = [(("user", talk[0]), ("assistant", talk[1])) for talk in before]
    talks = [[*talk, text] for talk, text in zip(before or [[]] * len(asked), asked, strict=True)]
    ends = answers_of(folder, asked, earlier)
    return [[*talk, end] for talk, end in zip(talks, ends, strict=True) if end.isprintable() and end != "nothing"]


def _labels(folder: Path) -> tuple[list[dict[str, Any]], str]:
    asked, own = zip(*_answered(folder, questions(40))[:8], strict=True)
    given = [text if number % 2 else "something else" for number, text in enumerate(own)]
    return rows(asked, given), "agreement 50.0 points: the champion's answers to 8 new records (exact match)"


def _free_text(folder: Path) -> tuple[list[dict[str, Any]], str]:
    asked, own = zip(*_answered(folder, questions(40))[:8], strict=True)
    return rows(asked, own), "agreement 100.0 points: the champion's answers to 8 new records (rougeL)"


def _conversations(folder: Path) -> tuple[list[dict[str, Any]], str]:
    begun = _answered(folder, questions(60))
    talks = _answered(folder, questions(len(begun), seed=2), begun)[:4]
    said = [
        [{"from": who, "value": text} for who, text in zip(("human", "gpt") * 2, talk, strict=True)] for talk in talks
    ]
    words = "agreement 100.0 points: the champion's answers to 8 new records (exact match)"
    return [{"conversations": talk} for talk in said], words


@pytest.mark.long
@pytest.mark.parametrize(("family", "make"), [("llama3", _labels), ("qwen3", _free_text), ("qwen3", _conversations)])
def test_a_real_model_answers_a_dropped_file_and_the_note_beside_it_says_how_well(
    engine: Engine,
    settings: Settings,
    tiny_llama: Path,
    tmp_path: Path,
    family: str,
    make: Callable[[Path], tuple[list[dict[str, Any]], str]],
) -> None:
    base = make_family(tmp_path / family, family, load_tokenizer(tiny_llama))
    noon = Noon(engine, settings.model_copy(update={"base_model": str(base), "trigger": "nightly"}), ByProcess())
    identity = write_manifest(base)
    shutil.copytree(base, noon.settings.work_folder / "models" / identity)
    content, words = make(base)
    with transaction(engine) as session:
        track, won = session.get_one(Track, "default"), session.exec(select(Promotion)).all()[-1]
        track.champion_model_id = won.model_id = identity
        track.champion_path = won.model_path = f"models/{identity}"
        track.max_new_tokens = TOKENS
        track.metric = "rougeL" if "rougeL" in words else "exact_match"
        session.get_one(Drop, 1).state = DropState.WITHDRAWN
    text = "".join(json.dumps(row) + "\n" for row in content)
    make_inbox(noon.settings)
    (noon.settings.inbox_folder / "new.jsonl").write_text(text)
    assert Intake(engine, noon.settings).take(Settled("default", "train", b"new.jsonl"), NOW).kind == "accepted"
    noon.ticks()
    VerdictNotes(engine, noon.settings, InboxFolders(noon.settings.inbox_folder)).refresh()
    note = (noon.settings.inbox_folder / "done/new.jsonl.verdict.txt").read_text().splitlines()
    assert note[2].startswith("Accepted: it waits for the next run of track default, which begins by the schedule")
    assert note[3:] == [f"Before any training: {words}."]
    assert [view.preview and view.preview["records"] for view in Overview.of(noon.settings).drops()] == [8, None]
