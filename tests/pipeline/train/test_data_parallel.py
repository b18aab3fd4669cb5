"""A training in two processes: what it learns, and what becomes of it when one of them is stopped, dies or runs out."""

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline import durable
from pipeline.artifacts import Adapter
from pipeline.config import TrainConfig
from pipeline.contract import CURVE_NAME, LOG_NAME, PROGRESS_NAME, RESULT_NAME, SPEC_NAME, Attempt, Curve, StepResult
from pipeline.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_START_AGAIN, CannotTrain
from pipeline.train.data_parallel import ProcessRank
from pipeline.train.training import _join_group, process_count
from tests.slurm.cluster import NEEDS_SLURM, new_cluster, wait_for
from tests.training_runs import TrainingRun

#: How far, of what was learned, two processes may be from one: rounding, which Adam's first steps make larger.
TOLERANCE = 1e-2
#: Of an epoch: each of them leaves a checkpoint, and each process measures the dev loss.
STEPS = 7
PATIENCE = 60.0
#: Does a step as `python -m pipeline` does, with a line of a test's own at each optimizer step of each process: the
#: processes of a training read this file, too.
SCRIPT = """
import json, os, signal, sys
import torch
from pipeline.__main__ import main
from pipeline.train.watcher import Watcher

def on_step_begin(self, args, state, control, **kwargs):
    rank, step, attempt = torch.distributed.get_rank(), state.global_step, self.attempt
    {line}

Watcher.on_step_begin = on_step_begin
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def run(new_run: Callable[..., TrainingRun], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingRun:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return new_run(tiny_llama, quantization="none", processes=2, epochs=1)


def distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    assert found.keys() == expected.keys()
    return math.sqrt(sum(float((found[name] - expected[name]).square().sum()) for name in expected))


def change(run: TrainingRun, expected: dict[str, Any]) -> float:
    """Return how far the weights went; of an adapter, how far its B, which begins at 0."""
    base = load_file(run.base / "model.safetensors")
    moved = {name: weight for name, weight in expected.items() if "lora_A" not in name}
    return distance(moved, {name: base.get(name, torch.zeros_like(weight)) for name, weight in moved.items()})


def execute(attempt: Attempt, line: str) -> int:
    """Do the step in a process of its own, with `line` at each optimizer step of each; return its exit code."""
    spec, script = attempt.folder / SPEC_NAME, attempt.folder / "script.py"
    durable.write_json(spec, attempt.spec.model_dump(mode="json"))
    script.write_text(SCRIPT.format(line=line))
    environment = {**os.environ, "TEST_SCRIPT": str(script)}
    with (attempt.folder / LOG_NAME).open("ab") as log:
        command = [sys.executable, str(script), "train", str(spec)]
        code = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode
    end = time.monotonic() + PATIENCE
    while left := alive(script):
        assert time.monotonic() < end, f"the processes {left} were left behind"
    return code


def result_of(attempt: Attempt) -> tuple[StepResult, str]:
    """Return what a step left, and its log."""
    printed = (attempt.folder / LOG_NAME).read_text()
    assert (attempt.folder / RESULT_NAME).exists(), printed
    return StepResult.model_validate(durable.read_json(attempt.folder / RESULT_NAME)), printed


def alive(script: Path) -> list[str]:
    """Return the processes that were started for a script, however they came to run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(script).encode() in (process / "environ").read_bytes():
                found.append(process.name)
    return found


@pytest.mark.long
def test_two_processes_learn_what_one_does(run: TrainingRun, capsys: pytest.CaptureFixture[str]) -> None:
    # Weights of the base; those of an adapter are compared where memory runs out.
    one, expected = run.finish(method="spectrum", processes=1, batch_tokens=2048)
    run.forget()
    two, found = run.finish(method="spectrum")
    assert "2 processes share the training\n" in capsys.readouterr().err
    assert one.resumed_from_step == two.resumed_from_step == 0
    assert one.optimizer_steps == two.optimizer_steps == STEPS
    assert one.trained_tokens == two.trained_tokens
    for ours, theirs in zip((*two.loss_curve, *two.dev_curve), (*one.loss_curve, *one.dev_curve), strict=True):
        assert ours.step == theirs.step
        assert ours.loss == pytest.approx(theirs.loss, rel=TOLERANCE)
    assert distance(found, expected) <= TOLERANCE * change(run, expected)


@pytest.mark.long
@NEEDS_SLURM
def test_two_nodes_of_a_slurm_job_learn_what_one_process_does(
    run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, expected = run.finish(processes=1)
    run.forget()
    attempt = run.attempt(processes="auto")
    spec = attempt.folder / SPEC_NAME
    durable.write_json(spec, attempt.spec.model_dump(mode="json"))
    # The nodes of the test's cluster are one machine, whose name may lead to no address.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    step = shlex.join((sys.executable, "-P", "-m", "pipeline", "train", str(spec)))
    with new_cluster() as cluster:
        log = attempt.folder / LOG_NAME
        job = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={log}", f"--wrap=exec {step}")
        cluster.says("sbatch", *job)
        wait_for((attempt.folder / RESULT_NAME).exists)
    result, printed = result_of(attempt)
    assert "2 processes share the training\n" in printed
    assert result.status == "ok", printed
    found = Adapter.model_validate(result.artifact)
    assert (found.optimizer_steps, found.trained_tokens) == (one.optimizer_steps, one.trained_tokens)
    assert distance(run.weights(found), expected) <= TOLERANCE * change(run, expected)


@pytest.mark.long
def test_a_process_that_dies_fails_the_step_and_the_next_attempt_ends_in_the_same_weights(run: TrainingRun) -> None:
    whole, expected = run.finish(dropout=0.1)
    run.forget()
    killed = run.attempt(dropout=0.1)
    assert execute(killed, "rank == 1 and step == 3 and os.kill(os.getpid(), signal.SIGKILL)") == EXIT_FAILED
    result, printed = result_of(killed)
    assert result.error is not None, printed
    assert result.error.message == "process 2 of 2 of the training was killed by SIGKILL"
    assert not (killed.folder / "scratch").exists()

    adapter, found = run.finish(dropout=0.1)
    assert adapter.resumed_from_step in {2, 3}
    assert adapter.optimizer_steps == STEPS
    assert adapter.trained_tokens == whole.trained_tokens
    assert distance(found, expected) == 0


@pytest.mark.long
def test_a_stop_reaches_all_processes_and_one_goes_on_from_their_checkpoint(run: TrainingRun) -> None:
    _, expected = run.finish(processes=1)
    run.forget()
    # The first one does not hear of it: what the second one was told has to be enough.
    deaf = "(signal.signal(signal.SIGTERM, signal.SIG_IGN), os.kill(os.getppid(), signal.SIGTERM))"
    stopped = run.attempt(checkpoint_minutes=60)
    assert execute(stopped, f"if step == 3: attempt.stop.wait({PATIENCE}) if rank else {deaf}") == EXIT_INTERRUPTED
    result, printed = result_of(stopped)
    assert (result.status, "step 4 of 7" in str(result.error)) == ("interrupted", True), printed
    assert durable.read_json(stopped.folder / PROGRESS_NAME)["done"] == 4
    curve = Curve.model_validate(durable.read_json(stopped.folder / CURVE_NAME))
    assert [point.step for point in curve.loss] == [1, 2, 3, 4]
    adapter, found = run.finish(processes=1)
    assert adapter.resumed_from_step == 4
    assert distance(found, expected) <= TOLERANCE * change(run, expected)


@pytest.mark.long
def test_memory_that_runs_out_in_one_process_ends_all_and_the_next_attempt_goes_on_with_less(run: TrainingRun) -> None:
    note = 'json.loads((attempt.path(attempt.spec.checkpoints) / "memory.json").read_text())["plan"]["batch_tokens"]'
    line = f"if rank == 1 and step == 3 and {note} == 200: raise MemoryError"
    assert execute(run.attempt(), line) == EXIT_START_AGAIN
    short = run.attempt()
    assert execute(short, line) == 0
    adapter = Adapter.model_validate(result_of(short)[0].artifact)
    assert adapter.batch_tokens < 200
    assert adapter.resumed_from_step in {2, 3}
    run.forget()
    _, expected = run.finish(processes=1)
    assert distance(run.weights(adapter), expected) <= TOLERANCE * change(run, expected)


@pytest.mark.long
def test_an_error_in_one_process_is_the_steps_and_ends_one_that_waits_for_ever(run: TrainingRun) -> None:
    failed = run.attempt()
    assert execute(failed, "if step == 2: 1 / 0 if rank else signal.pause()") == EXIT_FAILED
    result, printed = result_of(failed)
    assert result.error is not None
    assert result.error.message == "ZeroDivisionError: division by zero"
    assert "on_step_begin" in printed, "where it happened is in the log"


@pytest.mark.long
def test_no_process_outlives_the_step(run: TrainingRun) -> None:
    killed = run.attempt()
    gone = "step == 3 and (rank or os.kill(os.getppid(), signal.SIGKILL), signal.pause())"
    assert execute(killed, gone) == -signal.SIGKILL
    assert not (killed.folder / RESULT_NAME).exists()


@pytest.mark.parametrize(("setting", "batch_size", "expected"), [("auto", 8, 1), (2, 8, 2), (2, 1, 1)])
def test_on_a_processor_there_is_one_process_unless_the_setting_says_so(
    setting: Any, batch_size: int, expected: int
) -> None:
    assert process_count(TrainConfig(processes=setting, batch_size=batch_size), "cpu") == expected


def test_there_is_a_process_for_each_card_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert process_count(TrainConfig(), "cuda") == 4
    assert process_count(TrainConfig(processes=3), "cuda") == 3
    with pytest.raises(CannotTrain, match="processes is 5, and torch sees 4 CUDA devices"):
        process_count(TrainConfig(processes=5), "cuda")


@pytest.mark.parametrize(("visible", "expected"), [(None, "2"), ("2,5,7", "7"), ("GPU-a,b,GPU-c", "GPU-c")])
def test_the_processes_of_cards_are_bound_to_theirs_and_wait_for_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str | None, expected: str
) -> None:
    joined: dict[str, Any] = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda _backend, **given: joined.update(given))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    training: Any = SimpleNamespace(device="cuda", process=ProcessRank(1, 2, gpu=1), scratch=tmp_path)
    _join_group(training)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    assert joined["device_id"] == torch.device("cuda", 0)
    # Ten minutes, NCCL's own, are less than a large checkpoint can take.
    assert joined["timeout"] > timedelta(hours=1)
