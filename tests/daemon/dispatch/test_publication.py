"""A publication that takes long, or waits for a collection: nothing else waits for it."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.dispatch import publication
from daemon.queue import run_queue
from daemon.state.states import RunState
from daemon.storage import gc
from pipeline import durable
from pipeline.contract import SPEC_NAME, StepResult, StepSpec
from tests.daemon.dispatch.test_dispatcher import NOW, Box, ScriptedExecutor
from tests.slurm.cluster import wait_for


@pytest.fixture
def box(box: Box, monkeypatch: pytest.MonkeyPatch) -> Box:
    """Give a box with two tracks that does not wait for a publication."""
    monkeypatch.setattr(publication, "_AT_ONCE_SECONDS", 0.02)
    told = box.settings.executor.model_copy(update={"parallel": 2})
    box.settings = box.settings.model_copy(update={"tracks": {"support": {}}, "executor": told})
    return box


class Slow:
    """Files whose hashing takes until `end`."""

    def __init__(self) -> None:
        self.begun, self.end = threading.Event(), threading.Event()

    def work(self, spec: StepSpec) -> StepResult:
        """Leave such a file as an output of a good step."""
        (Path(spec.root) / spec.folder / "big").write_bytes(b"x")
        digest = durable.sha256_file(Path(spec.root) / spec.folder / SPEC_NAME)
        return ScriptedExecutor().good(spec).model_copy(update={"outputs": {"big": digest}})


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    """Let a file named `big` be hashed for as long as the test wants."""
    made, real = Slow(), durable.sha256_file

    def hash_file(path: Path) -> str:
        if path.name == "big":
            made.begun.set()
            made.end.wait()
            return real(path.with_name(SPEC_NAME))
        return real(path)

    monkeypatch.setattr(durable, "sha256_file", hash_file)
    yield made
    made.end.set()


def begin(box: Box, slow: Slow) -> None:
    """Let the dispatcher work until the file is being hashed."""

    def is_begun() -> bool:
        box.dispatcher.tick(NOW)
        return slow.begun.is_set()

    wait_for(is_begun)


def finish(box: Box, run: int) -> None:
    """Let the dispatcher work until a run has succeeded."""
    turns = iter(range(1, 10**9))

    def is_over() -> bool:
        box.dispatcher.tick(NOW + next(turns))
        return box.run(run).state == RunState.SUCCEEDED

    wait_for(is_over)


def test_another_tracks_run_ends_and_a_collection_too_while_a_file_is_hashed(box: Box, slow: Slow) -> None:
    box.executor.script["prepare"] = [slow.work]
    box.drop("a")
    begin(box, slow)
    box.drop("b", "support")
    finish(box, 2)
    gc.collect(box.engine, box.settings, NOW)
    assert (box.run(1).state, box.executor.steps.count("train")) == (RunState.RUNNING, 1)
    slow.end.set()
    finish(box, 1)
    assert (box.run(1).failures, box.executor.steps.count("prepare")) == (0, 2)


def test_the_dispatcher_does_not_wait_for_a_collection(box: Box) -> None:
    box.drop("a")
    box.ticks(1)
    with gc.collecting(box.settings.state_folder):
        box.ticks()
        assert box.executor.steps == ["prepare"]
    finish(box, 1)
    assert box.executor.steps == ["prepare", "train", "merge", "evaluate", "decide"]


def test_a_run_is_cancelled_while_its_result_is_published(box: Box, slow: Slow) -> None:
    box.executor.script["train"] = [slow.work]
    box.drop("a")
    begin(box, slow)
    run_queue.cancel(box.engine, 1, NOW)
    box.ticks(3)
    assert box.run().state == RunState.CANCELLED


def test_a_publication_that_a_stop_breaks_off_is_done_by_the_next_daemon(box: Box, slow: Slow) -> None:
    box.executor.script["train"] = [slow.work]
    box.drop("a")
    begin(box, slow)
    box.dispatcher.abandon(NOW)
    assert box.run().state == RunState.RUNNING
    box.__dict__["dispatcher"] = box.new_dispatcher()
    box.ticks(3)  # while the thread of the first one has not ended
    slow.end.set()
    finish(box, 1)
    assert (box.executor.steps.count("train"), box.run().deaths) == (1, 0)
