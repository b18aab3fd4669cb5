"""Trainings on a GPU: each faster way to compute learns what the plain way learns, and death loses little."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import durable
from pipeline.artifacts import Adapter
from pipeline.contract import SPEC_NAME
from pipeline.errors import StartAgain
from pipeline.train import trainer
from pipeline.train.memory import Sizes
from pipeline.train.step import train
from tests.training_runs import TrainingRun

NewRun = Callable[..., TrainingRun]
#: Losses of another order of bfloat16's roundings, and of another device.
ROUNDING, DEVICE = 0.02, 0.05
TWO, CARDS = 2, torch.cuda.device_count()


def losses(adapter: Adapter) -> list[float]:
    return [point.loss for point in adapter.loss_curve]


#: What is put in place of a faster way.
PLAIN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "padded": lambda patch: patch.setattr(trainer, "enable_packing", lambda *_: False),
    "TRL's loss": lambda patch: patch.setattr(trainer, "has_plain_head", lambda *_: False),
    "recomputed": lambda patch: patch.setattr(Sizes, "fits", lambda _, plan: plan.activations == "recomputed"),
}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("plain", PLAIN)
def test_each_faster_way_has_the_losses_of_the_plain_way(
    new_run: NewRun,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    plain: str,
    quantization: str,
) -> None:
    run = new_run(tiny_llama, quantization=quantization)
    fast, _ = run.finish()
    said = capfd.readouterr().err
    assert ("records are packed" in said, "TRL computes" in said) == (True, False), said
    assert fast.activations == "kept"
    run.forget()
    PLAIN[plain](monkeypatch)
    slow, _ = run.finish()
    assert losses(fast) == pytest.approx(losses(slow), rel=ROUNDING)


def test_a_card_learns_what_a_cpu_learns(new_run: NewRun, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tiny_llama)
    on_card, _ = run.finish()
    run.forget()
    monkeypatch.setenv("DROPFORGE_DEVICE", "cpu")
    on_cpu, _ = run.finish()
    assert losses(on_card) == pytest.approx(losses(on_cpu), rel=DEVICE)


@pytest.mark.parametrize("method", ["lora", "dora", "galore", "spectrum", "full"])
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    new_run: NewRun, tiny_llama: Path, method: str
) -> None:
    run = new_run(tiny_llama, method=method, learning_rate=1e-3)
    whole, _ = run.finish()
    run.forget()
    run.stop_after(9)
    resumed, _ = run.finish()
    # Attention's backward pass adds in any order on a card, so not to the last bit.
    assert losses(resumed) == pytest.approx(losses(whole), rel=ROUNDING)


def test_an_attempt_without_memory_is_followed_by_one_that_recomputes_every_second_layer(
    new_run: NewRun, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = trainer.Trainer

    def limited(*given: Any) -> Any:
        made = make(*given)
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / whole)
        return made

    run = new_run(tiny_llama, batch_tokens=2048, batch_size=32)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Trainer", limited)
        try:
            with pytest.raises(StartAgain):
                train(run.attempt())
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    adapter, _ = run.finish()
    assert adapter.activations == "half recomputed"


def test_a_killed_training_leaves_no_memory_taken(new_run: NewRun, tiny_llama: Path) -> None:
    run = new_run(tiny_llama, epochs=1000)
    attempt = run.attempt()
    durable.write_json(attempt.folder / SPEC_NAME, attempt.spec.model_dump(mode="json"))
    argv = [sys.executable, "-P", "-m", "pipeline", "train", str(attempt.folder / SPEC_NAME)]
    before, soon = torch.cuda.mem_get_info()[0], threading.Event()
    with subprocess.Popen(argv, start_new_session=True) as step:
        try:
            while not list(run.checkpoints.glob("step-*")):
                assert step.poll() is None
                soon.wait(0.1)
            taken = torch.cuda.mem_get_info()[0]
        finally:
            step.kill()
    assert taken < before
    while torch.cuda.mem_get_info()[0] < before - (64 << 20):
        soon.wait(0.1)


@pytest.mark.skipif(CARDS < TWO, reason="one card here")
def test_two_cards_learn_what_one_learns(new_run: NewRun, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: CARDS)
    run = new_run(tiny_llama)
    two, _ = run.finish()
    run.forget()
    one, _ = run.finish(processes=1)
    assert losses(two) == pytest.approx(losses(one), rel=ROUNDING)
    run.forget()
    searched, _ = run.finish(search={"space": {"learning_rate": [1e-7, run.config().train.learning_rate]}})
    assert [trial.outcome for trial in searched.candidates] == ["finished"] * 2
    assert losses(searched) == pytest.approx(losses(one), rel=ROUNDING)
