"""What a retried run keeps: just what a new run by today's settings would make again."""

import errno
import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from daemon.settings.model import Settings
from daemon.state import run_files
from daemon.state.database import migrate, open_engine, transaction
from daemon.state.states import DropState, RunState
from daemon.state.tables import Drop
from pipeline import durable
from pipeline.artifacts import Frozen
from pipeline.contract import StepResult, StepSpec
from tests import run_owner
from tests.daemon.dispatch.test_dispatcher import NOW, ScriptedExecutor, add_drop, ended, new_dispatcher, run_row, ticks
from tests.made_artifacts import made_adapter, made_dataset, made_model, made_report
from tests.model_folder import write_model

ALL = ["prepare", "train", "merge", "evaluate", "decide"]
#: What of an artifact is not the same when it is made again from the same.
OWN = {"folder", "seconds", "champion", "drops"}


class Derived(ScriptedExecutor):
    """Steps whose results follow from what the real ones read, and from nothing else."""

    def good(self, spec: StepSpec) -> StepResult:
        config, read = (
            spec.config,
            {name: durable.read_json(Path(spec.root) / path) for name, path in spec.inputs.items()},
        )
        evaluate = config.evaluate
        data = read.get("prepare", {})
        choices = (data.get("metric"), data.get("max_new_tokens"))
        artifact: Any
        if spec.step == "prepare":
            return self._prepared(spec)
        if spec.step == "train":
            rows = [self._content(spec, data["folder"], name) for name in ("train", "dev")]
            begins = {"start", "replay", "general_rows"}
            own = config.train.model_dump(exclude={"checkpoint_minutes", *begins})
            artifact = made_adapter(spec, adapter_sha256=digest(rows, own, config.base_model_id))
        elif spec.step == "merge":
            weights = digest(read["train"]["adapter_sha256"], choices[1], evaluate.repetition_penalty)
            artifact = made_model(spec, weights.encode())
        elif spec.step == "evaluate":
            asked = self._content(spec, data["folder"], "heldout"), evaluate.general, evaluate.vllm
            how = (*choices, evaluate.repetition_penalty, evaluate.batch_size, read["merge"]["model_id"])
            artifact = made_report(spec, versions={"derived": digest(asked, how)})
        else:
            return super().good(spec)
        return good_result(spec, artifact)

    def _prepared(self, spec: StepSpec) -> StepResult:
        config, folder = spec.config, Path(spec.root) / spec.folder / "data"
        folder.mkdir()
        drops = [drop.id for drop in spec.drops]
        for name, content in (
            ("train", (drops, config.gate.on)),
            ("dev", drops),
            ("heldout", (drops, config.gate.on, config.split.scored_records)),
        ):
            (folder / f"{name}.jsonl").write_text(digest(content))
        metric, most = config.evaluate.metric, config.evaluate.max_new_tokens
        artifact = made_dataset(
            spec,
            folder=f"{spec.folder}/data",
            metric="exact_match" if metric == "auto" else metric,
            max_new_tokens=most or 16,
        )
        outputs = {f"data/{path.name}": durable.sha256_file(path) for path in folder.iterdir()}
        return good_result(spec, artifact).model_copy(update={"outputs": outputs})

    def _content(self, spec: StepSpec, folder: str, name: str) -> str:
        return (Path(spec.root) / folder / f"{name}.jsonl").read_text()


def digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def good_result(spec: StepSpec, artifact: Frozen) -> StepResult:
    return StepResult(
        key=spec.key, fence=spec.fence, status="ok", exit_code=0, artifact=artifact.model_dump(mode="json")
    )


class House:
    """A state folder with two drops, whose run may be let fail, and retried by other settings."""

    def __init__(self, folder: Path) -> None:
        write_model(folder / "base", b"base weights")
        for name in ("state", "inbox"):
            (folder / name).mkdir()
        plain = Settings(inbox=str(folder / "inbox"), state=str(folder / "state"), base_model=str(folder / "base"))
        # Without a collector: a model is put aside below.
        self.settings = changed(plain, "gc", {"automatic": False})
        self.root = self.settings.state_folder
        migrate(self.root / "dropforge.db")
        self.engine = open_engine(self.root / "dropforge.db")
        self.executor = Derived()
        self.now = NOW

    def drop(self) -> None:
        for name in "ab":
            add_drop(self.engine, name)

    def go(self) -> None:
        self.now += 100_000
        ticks(new_dispatcher(self.engine, self.settings, self.executor), 20, self.now)

    def fail_at(self, step: str) -> bool:
        """Let the run fail at a step, at `end` after its last one; say whether it came to it."""
        self.executor.script = {step: [ended("failed", 65)]} if step != "end" else {"decide": [self._lose_model]}
        self.go()
        self.executor.script.clear()
        if (self.root / "lost").exists():
            (self.root / "lost").rename(self.root / "models" / str(self.published()["merge"]["model_id"]))
        return run_row(self.engine).state == RunState.FAILED

    def retry(self, section: str, values: dict[str, object]) -> None:
        """Set something, withdraw a drop if the section is `drop`, and retry the run."""
        self.now += 100_000
        if section == "drop":
            with transaction(self.engine) as session:
                session.get_one(Drop, 2).state = DropState.WITHDRAWN
        else:
            self.settings = changed(self.settings, section, values)
        self.executor.submitted.clear()
        run_owner.retry(self.engine, 1, self.now)

    def published(self) -> dict[str, Any]:
        done = run_files.published(self.root, 1)
        return {name: durable.read_json(self.root / path) for name, path in done.items()}

    def made(self) -> dict[str, Any]:
        """Return what the run has made, without what differs each time, and the contents of its data."""
        found = self.published()
        folder = self.root / str(found["prepare"]["folder"])
        files = {path.name: path.read_text() for path in folder.iterdir()}
        return files | {
            name: {key: value for key, value in one.items() if key not in OWN}
            for name, one in found.items()
            if name != "decide"
        }

    def _lose_model(self, spec: StepSpec) -> StepResult:
        """Decide, and lose the model before it can be promoted: the run fails with all of its steps published."""
        result = self.executor.good(spec)
        (self.root / "models" / str(self.published()["merge"]["model_id"])).rename(self.root / "lost")
        return result


def changed(settings: Settings, section: str, values: dict[str, object]) -> Settings:
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})


@pytest.fixture
def house(tmp_path: Path) -> House:
    made = House(tmp_path)
    made.drop()
    return made


#: What is set before a retry of a run with all steps published, and the first step that is done again.
CHANGES: list[tuple[str, dict[str, object], str | None]] = [
    ("guards", {"slices": 9.0}, "decide"),
    ("gate", {"p_value": 0.002}, "decide"),
    ("evaluate", {"general": ()}, "evaluate"),
    ("evaluate", {"batch_size": 3}, "evaluate"),
    ("evaluate", {"batch_size": 0}, None),
    ("evaluate", {"repetition_penalty": 1.5}, "merge"),
    ("evaluate", {"max_new_tokens": 32}, "prepare"),
    ("evaluate", {"metric": "rougeL"}, "prepare"),
    ("split", {"scored_records": 500}, "prepare"),
    ("gate", {"on": "pinned"}, "prepare"),
    ("train", {"start": "champion"}, "prepare"),
    ("train", {"replay": 0.5}, None),
    ("train", {"checkpoint_minutes": 1.0}, None),
    ("train", {"rank": 4}, "train"),
    ("drop", {}, "prepare"),
]


@pytest.mark.parametrize(("section", "values", "first"), CHANGES)
def test_a_retried_run_does_again_what_is_made_otherwise_today(
    house: House, section: str, values: dict[str, object], first: str | None
) -> None:
    house.fail_at("end")
    house.retry(section, values)
    house.go()
    again = ALL[ALL.index(first) :] if first else []
    assert house.executor.steps == again
    assert run_row(house.engine).outcome == "promoted"
    assert [spec.attempt for spec in house.executor.submitted] == [2] * len(again)


def test_a_step_whose_spec_is_damaged_is_done_again(house: House) -> None:
    house.fail_at("end")
    house.retry("train", {"replay": 0.5})
    (spec,) = house.root.glob("runs/1/attempts/decide-*/spec.json")
    spec.write_text('{"version": 1,')
    house.go()
    assert (house.executor.steps, run_row(house.engine).outcome) == (["decide"], "promoted")


CHANGE = st.sampled_from([(section, tuple(values.items())) for section, values, *_ in CHANGES])


@limits(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from([*ALL[1:], "end"]), CHANGE), min_size=1, max_size=3))
def test_what_stands_is_what_a_new_run_by_the_same_settings_would_make(
    tmp_path_factory: pytest.TempPathFactory, tries: list[tuple[str, tuple[str, tuple[tuple[str, object], ...]]]]
) -> None:
    house = House(tmp_path_factory.mktemp("retried"))
    house.drop()
    done = []
    for step, (section, values) in tries:
        if house.fail_at(step):
            house.retry(section, dict(values))
            done.append(section)
    house.go()
    assert run_row(house.engine).outcome == "promoted"
    fresh = House(tmp_path_factory.mktemp("fresh"))
    fresh.settings = house.settings.model_copy(
        update={"state": fresh.settings.state, "inbox": fresh.settings.inbox, "base_model": fresh.settings.base_model}
    )
    fresh.drop()
    if "drop" in done:
        with transaction(fresh.engine) as session:
            session.get_one(Drop, 2).state = DropState.WITHDRAWN
    fresh.go()
    assert house.made() == fresh.made()


@pytest.mark.parametrize("kills", [0, 1])
@pytest.mark.parametrize(
    ("change", "first"), [(("evaluate", {"general": ()}), "evaluate"), (("gate", {"on": "pinned"}), "prepare")]
)
def test_a_run_that_is_killed_while_steps_are_taken_back_comes_to_the_same(
    house: House, change: tuple[str, dict[str, object]], first: str, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpublish, left = run_files.unpublish, kills

    def killed(*arguments: Any) -> None:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, "killed")
        left -= 1
        unpublish(*arguments)

    house.fail_at("end")
    house.retry(*change)
    with monkeypatch.context() as broken:
        broken.setattr(run_files, "unpublish", killed)
        with suppress(OSError):
            house.go()
    for turn in range(24):
        # The daemon dies after each look.
        new_dispatcher(house.engine, house.settings, house.executor).tick(house.now + 100_000 + turn)
    assert house.executor.steps == ALL[ALL.index(first) :]
    assert run_row(house.engine).outcome == "promoted"
