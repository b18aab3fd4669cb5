"""Searches with real trainings: what is tried, what is lost, what goes on after a kill, and what is chosen."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline import durable
from pipeline.artifacts import Adapter, Dataset
from pipeline.config import RunConfig, TrainConfig
from pipeline.contract import SPEC_NAME, Attempt
from pipeline.errors import CannotTrain, Interrupted
from pipeline.models.manifest import model_id
from pipeline.records.heldout import dataset_hash
from pipeline.search_settings import with_settings
from pipeline.train.search import run as search_run
from pipeline.train.search.trials import TrialState
from pipeline.train.step import train

Row = Mapping[str, Any]
#: Kills its own process in the second trial, as no signal handler and no `finally` would notice.
KILLED = """
import os, signal, sys
from pipeline.__main__ import main
from pipeline.train.search.run import _TrialAttempt

progress = _TrialAttempt.progress

def killed(self, done, total, **fields):
    progress(self, done, total, **fields)
    if self.spec.checkpoints.endswith("trial-2") and fields.get("phase") == "train" and done >= 2:
        os.kill(os.getpid(), signal.SIGKILL)

_TrialAttempt.progress = killed
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPFORGE_DEVICE", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


class Bench:
    """Searches on 32 rows, four steps an epoch, with so many dev rows."""

    def __init__(self, root: Path, base: Path, tiny: Any, make_attempt: Callable[..., Attempt]) -> None:
        self.root, self.base, self.tiny, self.make_attempt = root, base, tiny, make_attempt

    def attempt(self, space: Any, *, dev: int = 20, heldout: Sequence[Row] = (), **settings: Any) -> Attempt:
        """Make the next attempt at a training; settings of the search go by `search_...`."""
        rows = [{"id": str(number), **row} for number, row in enumerate(self.tiny.rows(32 + dev, seed=5))]
        parts = {"train": rows[:32], "dev": rows[32:], "heldout": heldout}
        (self.root / "data").mkdir(exist_ok=True)
        for name, part in parts.items():
            (self.root / "data" / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part))
        dataset = Dataset(
            folder="data",
            train_rows=32,
            dev_rows=dev,
            heldout_rows=len(heldout),
            heldout_groups=0,
            heldout_pinned=False,
            heldout_version="v",
            dataset_sha256=dataset_hash(self.root / "data"),
            duplicates=0,
            replaced=0,
            removed_heldout=0,
            metric="exact_match",
            max_new_tokens=8,
        )
        search = {name.removeprefix("search_"): settings.pop(name) for name in list(settings) if "search_" in name}
        small = {"quantization": "none", "rank": 4, "learning_rate": 3e-3}
        config = RunConfig(
            track="default",
            base_model=str(self.base),
            base_model_id=model_id(self.base),
            salt="s",
            train=TrainConfig.model_validate({**small, **settings, "search": {"space": space, **search}}),
        )
        return self.make_attempt("train", config=config, inputs={"prepare": dataset})

    def train(self, space: Any, **settings: Any) -> tuple[Adapter, Mapping[str, torch.Tensor]]:
        """Return what the train step makes, and its weights; forgets what other searches of the run left."""
        attempt = self.attempt(space, **settings)
        forget(attempt)
        return weights_of(attempt)


def weights_of(attempt: Attempt) -> tuple[Adapter, Mapping[str, torch.Tensor]]:
    adapter = train(attempt)
    return adapter, load_file(attempt.path(adapter.folder) / "adapter_model.safetensors")


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def forget(attempt: Attempt) -> None:
    """Forget the searches of earlier attempts."""
    shutil.rmtree(attempt.path(attempt.spec.checkpoints), ignore_errors=True)


def ended(attempt: Attempt) -> list[TrialState]:
    paths = sorted(attempt.path(attempt.spec.checkpoints).glob("trial-*/ended.json"))
    return [TrialState.model_validate(durable.read_json(path)) for path in paths]


@pytest.fixture
def bench(tmp_path: Path, tiny: Any, tiny_llama: Path, make_attempt: Callable[..., Attempt]) -> Bench:
    return Bench(tmp_path, tiny_llama, tiny, make_attempt)


def test_a_grid_trains_all_and_hands_over_the_one_that_the_dev_rows_choose(bench: Bench) -> None:
    heldout = [{"id": f"h{number}", **row} for number, row in enumerate(bench.tiny.rows(40, seed=9))]
    attempt = bench.attempt({"learning_rate": [1e-7, 3e-3]}, heldout=heldout)
    opened: list[str] = []

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(f"{attempt.root}/data/heldout.jsonl"):
            opened.append(str(arguments[0]))

    sys.addaudithook(heard)
    notes: dict[str, None] = {}
    attempt.progress = lambda *_, note="", **__: notes.setdefault(note)  # type: ignore[method-assign]
    adapter, weights = weights_of(attempt)
    assert list(notes) == ["", "trial 1 of 2: learning_rate 1e-07", "trial 2 of 2: learning_rate 0.003"]
    assert len(opened) == 1, "for the hash that says whether the data is what `prepare` froze, not for the choice"
    low, high = adapter.candidates
    assert [one.settings for one in adapter.candidates] == [{"learning_rate": 1e-7}, {"learning_rate": 3e-3}]
    assert (low.outcome, high.outcome) == ("finished", "finished")
    assert (low.chosen, high.chosen) == (False, True)
    assert high.dev_loss == adapter.dev_curve[-1].loss
    assert low.dev_loss is not None
    assert low.dev_loss > adapter.dev_curve[-1].loss
    assert adapter.seconds == pytest.approx(low.seconds + high.seconds)
    assert low.tokens == high.tokens == adapter.trained_tokens
    assert sorted(path.name for path in attempt.folder.rglob("*")) == [
        "adapter",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    # A training by itself with these settings comes to the same weights.
    alone, expected = bench.train({}, learning_rate=3e-3)
    assert same(weights, expected)
    assert (alone.candidates, alone.loss_curve) == ((), adapter.loss_curve)


@pytest.mark.long
def test_optuna_searches_and_a_step_that_is_killed_goes_on_where_it_was(bench: Bench, tmp_path: Path) -> None:
    space = {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "rank": [2, 4]}
    settings: dict[str, Any] = {
        "search_method": "tpe",
        "search_trials": 3,
        "dropout": 0.1,
        "checkpoint_minutes": 1e-6,
    }
    whole, expected = bench.train(space, **settings)
    assert len(whole.candidates) == 3
    attempt = bench.attempt(space, **settings)
    forget(attempt)
    checkpoints, spec, script = (
        attempt.path(attempt.spec.checkpoints),
        attempt.folder / SPEC_NAME,
        tmp_path / "killed.py",
    )
    durable.write_json(spec, attempt.spec.model_dump(mode="json"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    script.write_text(KILLED)
    done = subprocess.run([sys.executable, script, "train", spec], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    shutil.rmtree(attempt.folder / "trial-2")
    trained = (checkpoints / "trial-1/adapter/adapter_model.safetensors").stat()
    assert len(ended(attempt)) == 1
    before = (checkpoints / "trial-1/ended.json").read_bytes()
    adapter, weights = weights_of(bench.attempt(space, **settings))
    assert (checkpoints / "trial-1/adapter/adapter_model.safetensors").stat() == trained, "it was not trained again"
    assert (checkpoints / "trial-1/ended.json").read_bytes() == before
    assert same(weights, expected)
    told = [one.model_dump(exclude={"seconds"}) for one in adapter.candidates]
    assert told == [one.model_dump(exclude={"seconds"}) for one in whole.candidates]


def test_a_search_that_is_asked_to_stop_goes_on_in_its_trial(bench: Bench) -> None:
    space = {"rank": [2, 4]}
    _, expected = bench.train(space, dropout=0.1)
    attempt = bench.attempt(space, dropout=0.1)
    forget(attempt)
    report = attempt.progress

    def stop(done: int, total: int, **fields: Any) -> None:
        report(done, total, **fields)
        if fields.get("note", "").startswith("trial 2") and fields.get("loss") is not None and done >= 2:
            attempt.stop.set()

    attempt.progress = stop  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="left a checkpoint at step 3 of 4"):
        train(attempt)
    left = TrialState.model_validate(durable.read_json(attempt.path(attempt.spec.checkpoints) / "trial-2/trial.json"))
    assert (len(ended(attempt)), left.seconds > 0) == (1, True)
    adapter, weights = weights_of(bench.attempt(space, dropout=0.1))
    assert same(weights, expected)
    resumed = ended(attempt)[1].once
    assert resumed is not None
    assert resumed.trained.resumed_from_step == 3
    assert len(adapter.candidates) == 2


def test_a_trial_that_diverges_is_one_trial_lost(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def far(whole: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
        made = with_settings(whole, settings)
        # Beyond what settings may say, so that it diverges on every processor.
        return made.model_copy(update={"learning_rate": 1e30}) if settings["learning_rate"] > 1 else made

    monkeypatch.setattr(search_run, "with_settings", far)
    adapter, _ = bench.train({"learning_rate": [9.0, 3e-3]})
    lost, kept = adapter.candidates
    assert (lost.outcome, lost.chosen, kept.outcome, kept.chosen) == ("failed", False, "finished", True)
    assert "diverged" in lost.why
    attempt = bench.attempt({"learning_rate": [9.0, 8.0]})
    with pytest.raises(CannotTrain, match=r"all trials of the search failed; the first: .*diverged") as raised:
        train(attempt)
    assert "learning_rate" in raised.value.hint
    assert ended(attempt) == [], "a retry begins anew"


def test_too_few_dev_rows_are_refused(bench: Bench) -> None:
    with pytest.raises(CannotTrain, match="a search needs 20 dev rows to choose by, and there are 12") as raised:
        bench.train({"rank": [2, 4]}, dev=12)
    assert "split.dev" in raised.value.hint


def test_no_trial_begins_that_does_not_fit_into_the_hours(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search_run, "time", SimpleNamespace(monotonic=count(0, 1200.0).__next__))
    adapter, _ = bench.train({"rank": [2, 3, 4, 5]}, search_hours=0.7)
    assert [one.seconds for one in adapter.candidates] == [1200.0, 1200.0], "a third would end after an hour"
    assert "no further trial fits" in capsys.readouterr().err
