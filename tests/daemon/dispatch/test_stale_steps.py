"""What a retried run does again: the first step that today's settings or drops change, and all later ones."""

import errno
from contextlib import suppress
from typing import Any

import pytest

from daemon.settings.model import Settings
from daemon.state import run_files
from daemon.state.database import transaction
from daemon.state.states import DropState
from daemon.state.tables import Drop
from pipeline.contract import StepResult, StepSpec
from tests import run_owner
from tests.daemon.dispatch.test_dispatcher import NOW, Box, ticks

ALL = ["prepare", "train", "merge", "evaluate", "decide"]


def changed(settings: Settings, section: str, values: dict[str, object]) -> Settings:
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})


@pytest.fixture
def failed(box: Box) -> Box:
    """Give a workspace with two drops, whose run has failed with all of its steps published."""
    # Without a collector: a model is put aside below.
    box.settings = changed(box.settings, "gc", {"automatic": False})
    root = box.settings.state_folder

    def lose_model(spec: StepSpec) -> StepResult:
        result = box.executor.good(spec)
        (root / "models").rename(root / "lost")
        return result

    for name in "ab":
        box.drop(name)
    box.executor.script["decide"] = [lose_model]
    box.ticks()
    (root / "lost").rename(root / "models")
    assert box.run().state == "failed"
    box.executor.submitted.clear()
    return box


def retry(box: Box, section: str, values: dict[str, object]) -> None:
    """Set something, withdraw a drop if the section is `drop`, damage a file if it is `spec`, and retry the run."""
    if section == "spec":
        (spec,) = box.settings.state_folder.glob("runs/1/attempts/decide-*/spec.json")
        spec.write_text('{"version": 1,')
    elif section == "drop":
        with transaction(box.engine) as session:
            session.get_one(Drop, 2).state = DropState.WITHDRAWN
    else:
        box.settings = changed(box.settings, section, values)
    run_owner.retry(box.engine, 1, NOW + 100)


#: What is set before a retry, and the first step that is done again.
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
    ("train", {"preset": "fast"}, "train"),
    ("drop", {}, "prepare"),
    ("spec", {}, "decide"),
]


@pytest.mark.parametrize(("section", "values", "first"), CHANGES)
def test_a_retried_run_does_again_what_is_made_otherwise_today(
    failed: Box, section: str, values: dict[str, object], first: str | None
) -> None:
    retry(failed, section, values)
    ticks(failed.new_dispatcher(), 20, NOW + 200)
    again = ALL[ALL.index(first) :] if first else []
    assert failed.executor.steps == again
    assert failed.run().outcome == "promoted"
    assert [spec.attempt for spec in failed.executor.submitted] == [2] * len(again)


@pytest.mark.parametrize("kills", [0, 1])
def test_a_run_that_is_killed_while_steps_are_taken_back_comes_to_the_same(
    failed: Box, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpublish, left = run_files.unpublish, kills

    def killed(*arguments: Any) -> None:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, "killed")
        left -= 1
        unpublish(*arguments)

    retry(failed, "gate", {"on": "pinned"})
    with monkeypatch.context() as broken:
        broken.setattr(run_files, "unpublish", killed)
        with suppress(OSError):
            ticks(failed.new_dispatcher(), 20, NOW + 200)
    for turn in range(24):
        # The daemon dies after each look.
        failed.new_dispatcher().tick(NOW + 100_000 + turn)
    assert failed.executor.steps == ALL
    assert failed.run().outcome == "promoted"
