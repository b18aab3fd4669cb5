"""Searches with real trainings: what is tried, what is lost, what goes on after a kill, and what is chosen."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from itertools import chain, count, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import durable
from pipeline.artifacts import CurvePoint, Trained
from pipeline.config import TrainConfig
from pipeline.contract import SPEC_NAME, Attempt
from pipeline.errors import CannotTrain, Interrupted, StartAgain, StepFailed
from pipeline.models import placement
from pipeline.models.memory_estimate import base_sizes, nf4_bytes
from pipeline.search_settings import with_settings
from pipeline.train import memory, step, training
from pipeline.train import search as search_module
from pipeline.train.search import TrialState, search, suggest
from pipeline.train.step import train
from tests.training_runs import TrainingRun, same

#: Kills its own process in the second trial, as no signal handler and no `finally` would notice.
KILLED = """
import os, signal, sys
from pipeline.__main__ import main
from pipeline.train.search import _TrialAttempt

progress = _TrialAttempt.progress

def killed(self, done, total, **fields):
    progress(self, done, total, **fields)
    if self.spec.checkpoints.endswith("trial-2") and fields.get("phase") == "train" and done >= 2:
        os.kill(os.getpid(), signal.SIGKILL)

_TrialAttempt.progress = killed
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def run(new_run: Callable[..., TrainingRun], tiny_llama: Path) -> TrainingRun:
    return new_run(tiny_llama, quantization="none", epochs=0.5)


def ended(run: TrainingRun) -> list[TrialState]:
    paths = sorted(run.checkpoints.glob("trial-*/ended.json"))
    return [TrialState.model_validate(durable.read_json(path)) for path in paths]


def test_trials_train_over_the_base_in_one_precision_though_more_memory_is_free_later(
    run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = chain([1], repeat(1 << 40))
    monkeypatch.setattr(memory, "free_memory", lambda *_: next(free))
    adapter = train(run.attempt(quantization="auto", search={"space": {"learning_rate": [1e-7, 3e-3]}}))
    assert [one.once and one.once.quantization for one in ended(run)] == ["nf4", "nf4"]
    assert adapter.quantization == "nf4"


@pytest.mark.parametrize(
    ("share", "vllm", "words"),
    [(0.5, "", "does not fit on the GPU for evaluation, even in NF4"), (1.2, "/bin/vllm", "as vLLM would evaluate it")],
)
def test_no_trial_begins_if_its_model_could_not_be_evaluated_on_the_gpus(
    run: TrainingRun, monkeypatch: pytest.MonkeyPatch, share: float, vllm: str, words: str
) -> None:
    monkeypatch.setattr(step, "chosen_device", lambda: "cuda")
    monkeypatch.setattr(step, "process_count", lambda *_: 1)
    monkeypatch.setattr(placement, "free_on_gpus", lambda: [int(share * nf4_bytes(base_sizes(run.base)))])
    spec = run.attempt(search={"space": {"learning_rate": [1e-7, 3e-3]}}).spec
    evaluation = spec.config.evaluate.model_copy(update={"vllm": vllm})
    config = spec.config.model_copy(update={"evaluate": evaluation})
    with pytest.raises(StepFailed, match=words):
        train(Attempt(spec.model_copy(update={"config": config})))
    assert not list(run.checkpoints.glob("trial-*"))


def test_a_grid_trains_all_and_hands_over_the_one_that_the_dev_rows_choose(run: TrainingRun) -> None:
    attempt = run.attempt(search={"space": {"learning_rate": [1e-7, 3e-3]}})
    notes: dict[str, None] = {}
    attempt.progress = lambda *_, note="", **__: notes.setdefault(note)  # type: ignore[method-assign]
    adapter = train(attempt)
    assert list(notes) == ["", "trial 1 of 2: learning_rate 1e-07", "trial 2 of 2: learning_rate 0.003"]
    low, high = adapter.candidates
    assert [one.settings for one in adapter.candidates] == [{"learning_rate": 1e-7}, {"learning_rate": 3e-3}]
    assert (low.outcome, low.chosen, high.outcome, high.chosen) == ("finished", False, "finished", True)
    assert low.dev_loss is not None
    assert low.dev_loss > adapter.dev_curve[-1].loss == high.dev_loss
    assert adapter.seconds == pytest.approx(low.seconds + high.seconds)
    assert sorted(path.name for path in attempt.folder.rglob("*")) == [
        "adapter",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not list(run.checkpoints.glob("trial-*/step-*"))
    weights = run.weights(adapter)
    run.forget()
    alone, expected = run.finish(learning_rate=3e-3)
    assert same(weights, expected), "a training by itself with these settings comes to the same weights"
    assert (alone.candidates, alone.loss_curve) == ((), adapter.loss_curve)


@pytest.mark.long
def test_optuna_searches_and_a_step_that_is_killed_goes_on_where_it_was(run: TrainingRun, tmp_path: Path) -> None:
    space = {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "rank": [2, 4]}
    settings: dict[str, Any] = {"search": {"method": "tpe", "trials": 3, "space": space}, "dropout": 0.1}
    whole, expected = run.finish(**settings)
    assert len(whole.candidates) == 3
    run.forget()
    attempt = run.attempt(**settings)
    spec, script = attempt.folder / SPEC_NAME, tmp_path / "killed.py"
    durable.write_json(spec, attempt.spec.model_dump(mode="json"))
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script, "train", spec], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    shutil.rmtree(attempt.folder / "trial-2")
    files = [run.checkpoints / "trial-1" / name for name in ("adapter/adapter_model.safetensors", "ended.json")]
    before = [file.stat() for file in files]
    assert len(ended(run)) == 1
    adapter, weights = run.finish(**settings)
    assert [file.stat() for file in files] == before, "it was not trained again"
    assert same(weights, expected)
    told = [one.model_dump(exclude={"seconds"}) for one in adapter.candidates]
    assert told == [one.model_dump(exclude={"seconds"}) for one in whole.candidates]


def test_a_search_that_is_asked_to_stop_goes_on_in_its_trial(run: TrainingRun) -> None:
    settings: dict[str, Any] = {"search": {"space": {"rank": [2, 4]}}, "dropout": 0.1}
    _, expected = run.finish(**settings)
    run.forget()
    attempt = run.attempt(**settings)
    report = attempt.progress

    def stop(done: int, total: int, **fields: Any) -> None:
        report(done, total, **fields)
        if fields.get("note", "").startswith("trial 2") and fields.get("loss") is not None and done >= 2:
            attempt.stop.set()

    attempt.progress = stop  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="left a checkpoint at step 3 of 4"):
        train(attempt)
    left = TrialState.model_validate(durable.read_json(run.checkpoints / "trial-2/trial.json"))
    assert (len(ended(run)), left.seconds > 0) == (1, True)
    adapter, weights = run.finish(**settings)
    assert same(weights, expected)
    resumed = ended(run)[1].once
    assert resumed is not None
    assert resumed.resumed_from_step == 3
    assert len(adapter.candidates) == 2


def test_each_gpu_has_a_trial_of_its_own_and_one_that_was_interrupted_goes_on(run: TrainingRun) -> None:
    run.finish(search={"space": {"rank": [2]}})
    once = ended(run)[0].once
    assert once is not None
    attempt = run.attempt(search={"space": {"rank": [2, 3, 4, 5, 6]}})
    both, begun = threading.Barrier(2, timeout=60), list[tuple[int, int]]()

    def train_once(trial: Attempt, _: Path, *, gpu: int) -> Trained:
        rank = trial.config.train.rank
        begun.append((rank, gpu))
        if rank < 4:
            both.wait()  # which breaks unless both run at the same time
        if rank == 4 and [rank for rank, _ in begun].count(4) == 1:
            raise StartAgain("memory ran out")
        return once

    with pytest.raises(StartAgain):
        search(attempt, attempt.config.train, "mark", train_once, range(2))
    assert {rank: gpu for rank, gpu in begun if rank < 4} in ({2: 0, 3: 1}, {2: 1, 3: 0})
    assert 3 not in [int(path.parent.name.removeprefix("trial-")) for path in run.checkpoints.glob("*/ended.json")]
    _, _, trials = search(attempt, attempt.config.train, "mark", train_once, range(2))
    assert sorted(rank for rank, _ in begun) == [2, 3, 4, 4, 5, 6]
    assert [one.outcome for one in trials] == ["finished"] * 5


@pytest.mark.long
def test_trials_at_the_same_time_come_to_the_same(run: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    space = {"space": {"learning_rate": [1e-7, 1e-3, 3e-3]}}
    one_by_one, expected = run.finish(search=space)
    run.forget()
    # As on two GPUs, each trial trains in a process of its own.
    for module in (step, training):
        monkeypatch.setattr(module, "visible_gpus", lambda _: 2)
    adapter, weights = run.finish(search=space)
    assert same(weights, expected)
    assert [one.dev_loss for one in adapter.candidates] == [one.dev_loss for one in one_by_one.candidates]


def test_a_trial_that_diverges_is_one_trial_lost(run: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def far(whole: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
        made = with_settings(whole, settings)
        # Beyond what settings may say, so that it diverges on every processor.
        return made.model_copy(update={"learning_rate": 1e30}) if settings["learning_rate"] > 1 else made

    monkeypatch.setattr(search_module, "with_settings", far)
    adapter, _ = run.finish(search={"space": {"learning_rate": [9.0, 3e-3]}})
    lost, kept = adapter.candidates
    assert (lost.outcome, lost.chosen, kept.outcome, kept.chosen) == ("failed", False, "finished", True)
    assert "diverged" in lost.why
    with pytest.raises(CannotTrain, match=r"all trials of the search failed; the first: .*diverged") as raised:
        run.finish(search={"space": {"learning_rate": [9.0, 8.0]}})
    assert "learning_rate" in raised.value.hint
    assert ended(run) == [], "a retry begins anew"


def test_too_few_dev_rows_are_refused(run: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "DEV_ROWS", 25)
    with pytest.raises(CannotTrain, match="a search needs 25 dev records to choose by, and there are 24") as raised:
        run.finish(search={"space": {"rank": [2, 4]}})
    assert "split.dev" in raised.value.hint


def test_no_trial_begins_that_does_not_fit_into_the_hours(
    run: TrainingRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search_module, "time", SimpleNamespace(monotonic=count(0, 1200.0).__next__))
    adapter, _ = run.finish(search={"space": {"rank": [2, 3, 4, 5]}, "hours": 0.7})
    assert [one.seconds for one in adapter.candidates] == [1200.0, 1200.0], "a third would end after an hour"
    assert "no further trial fits" in capsys.readouterr().err


# What is tried next: the same for the same past, in whatever process ----------------------------------------------

SPACE = {
    "learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
    "rank": {"low": 4, "high": 64},
    "method": ["lora", "dora"],
    "targets": [["mlp"], ["all-linear"]],
}


def tried(settings: Mapping[str, Any], loss: float | None) -> TrialState:
    """Return a trial with this last dev loss, or one that failed."""
    trained: Any = Trained.model_construct
    made = None if loss is None else trained(dev_curve=(CurvePoint(step=1, loss=loss),))
    outcome: Any = "failed" if loss is None else "finished"
    return TrialState.model_construct(number=1, settings=dict(settings), outcome=outcome, once=made, dev_loss=loss)


def searched(count: int, train: TrainConfig, past: list[TrialState] | None = None) -> list[TrialState]:
    """Let a search go on for so many trials, each as good as its learning rate is near to 1e-3."""
    past = list(past or [])
    for _ in range(count):
        settings = suggest(train, past)
        if settings is None:
            break
        past.append(tried(settings, abs(settings["learning_rate"] - 1e-3)))
    return past


def tpe(**more: Any) -> TrainConfig:
    return TrainConfig.model_validate({"search": {"method": "tpe", "trials": 12, "space": SPACE, **more}})


def test_optuna_draws_the_same_in_one_go_and_after_a_restart() -> None:
    whole = searched(12, tpe())
    assert searched(7, tpe(), whole[:5]) == whole
    assert len(whole) == 12
    for one in whole:
        TrainConfig.model_validate(one.settings)
        assert 1e-5 <= one.settings["learning_rate"] <= 1e-2
        assert isinstance(one.settings["rank"], int)
    assert len({repr(one.settings) for one in whole}) == 12
    assert searched(3, tpe().model_copy(update={"seed": 7}))[0] != whole[0]
    # What failed is told to Optuna, too.
    past = [tried(one.settings, 2.0 if index % 2 else None) for index, one in enumerate(whole[:8])]
    assert suggest(tpe(), past) is not None


def test_trials_that_run_at_the_same_time_have_other_settings() -> None:
    past = searched(6, tpe())
    settings = suggest(tpe(), past)
    assert settings is not None
    running, failed = (TrialState(number=7, settings=settings, outcome=outcome) for outcome in ("running", "failed"))
    assert suggest(tpe(), [*past, running]) != suggest(tpe(), [*past, failed]), "Optuna avoids what is running"
    rates = tpe(space={"learning_rate": [1e-4, 1e-3]})
    assert suggest(rates, [TrialState(number=1, settings={"learning_rate": 1e-4})]) == {"learning_rate": 1e-3}


def test_a_search_ends_with_its_trials_or_when_all_was_tried() -> None:
    assert len(searched(5, tpe(trials=3))) == 3
    rates = [1e-4, 1e-3]
    found = searched(9, tpe(space={"learning_rate": rates}))
    assert sorted(one.settings["learning_rate"] for one in found) == rates
