"""A training that does not fit: what it begins with, what it goes on with, and that it learns the same."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline import durable
from pipeline.artifacts import Adapter
from pipeline.config import MemoryPlan, RunConfig, TrainConfig
from pipeline.contract import LIFELINE, LOG_NAME, RESULT_NAME, SPEC_NAME, Attempt, StepResult
from pipeline.errors import Interrupted, StartAgain, StepFailed
from pipeline.models.loading import OutOfMemory, is_out_of_memory, load_tokenizer
from pipeline.models.manifest import model_id
from pipeline.models.memory_estimate import LOGITS_BYTES, MARGIN, OVERHEAD, base_sizes, estimate
from pipeline.train import memory
from pipeline.train.memory import PlannedMemory, go_on_with_less, plan_memory, smaller
from pipeline.train.passes import answer_loss
from pipeline.train.passes.packing import collate
from pipeline.train.step import train
from pipeline.train.trainer import TokenRow, Training, make_trainer
from tests.prepared_rows import write_rows

#: What a training may take beyond what its trainer has, measured: eight records a pass take 520 MB, one takes 115.
ROOM = 330 << 20
#: Runs a step as `python -m pipeline` does, but with so little memory to train in that an allocation really fails.
LIMITED = f"""
import resource, sys
from pipeline.__main__ import main
from pipeline.train import training

def limited(*arguments):
    trainer = make(*arguments)
    data = int(open("/proc/self/status").read().partition("VmData:")[2].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (data + {ROOM}, resource.RLIM_INFINITY))
    return trainer

make, training.make_trainer = training.make_trainer, limited
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPFORGE_DEVICE", "cpu")
    # A thread has a stack, which counts.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def wide_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in float32 that is small, and whose activations are large: 0.2 MB a token."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=4096,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("models") / "wide"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


Order = Callable[..., Attempt]


@pytest.fixture
def order(tmp_path: Path, make_attempt: Callable[..., Attempt]) -> Order:
    """Make attempts of one run at training on 16 records of about 250 tokens."""

    def make(base: Path, earlier: MemoryPlan | None = None, **settings: Any) -> Attempt:
        rows = [{"instruction": f"{n} a b" * 50, "input": "", "output": f"ok {n}"} for n in range(16)]
        dataset = write_rows(tmp_path, rows)
        train = TrainConfig(**{"rank": 4, "batch_size": 8, "batch_tokens": 4096, **settings})
        config = RunConfig(track="default", base_model=str(base), base_model_id=model_id(base), salt="s", train=train)
        attempt = make_attempt("train", config=config, inputs={"prepare": dataset})
        attempt.spec = attempt.spec.model_copy(update={"memory": earlier})
        return attempt

    return make


def run(attempt: Attempt, *command: str) -> tuple[StepResult, str]:
    """Do a step in a process, as the worker does; return its result and what it printed."""
    spec = attempt.folder / SPEC_NAME
    durable.write_json(spec, attempt.spec.model_dump(mode="json"))
    reader, writer = os.pipe()
    os.write(writer, b"1")
    environment = {**os.environ, LIFELINE: str(reader)}
    with (attempt.folder / LOG_NAME).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *command, "train", str(spec)],
            env=environment,
            cwd=attempt.folder,
            pass_fds=(reader,),
            stdout=log,
            stderr=log,
        )
    os.close(reader)
    process.wait()
    os.close(writer)
    printed = (attempt.folder / LOG_NAME).read_text()
    assert (attempt.folder / RESULT_NAME).exists(), printed
    return StepResult.model_validate(durable.read_json(attempt.folder / RESULT_NAME)), printed


@pytest.mark.long
def test_a_training_that_runs_out_of_memory_learns_the_same_with_less_a_pass(
    order: Order, wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    free = train(attempt := order(wide_llama))
    expected = load_file(attempt.path(free.folder) / "adapter_model.safetensors")
    (attempt.path(attempt.spec.checkpoints) / memory.NOTE_NAME).unlink()

    result, printed = run(attempt := order(wide_llama), str(script))
    assert result.status == "ok", printed
    adapter = Adapter.model_validate(result.artifact)
    assert "does not fit into memory" in printed
    assert printed.count("continues in a fresh process") in {1, 2}
    assert free.batch_tokens == 4096 > adapter.batch_tokens
    assert (adapter.activations, adapter.quantization) == ("kept", "none") == (free.activations, free.quantization)
    # The same records in each of as many steps.
    assert adapter.optimizer_steps == free.optimizer_steps == 2
    assert adapter.trained_tokens == free.trained_tokens
    for one, other in zip(adapter.loss_curve, free.loss_curve, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
    found = load_file(attempt.path(adapter.folder) / "adapter_model.safetensors")
    distance = sum(float((found[name] - expected[name]).square().sum()) for name in expected) ** 0.5
    assert distance <= 1e-3 * free.adapter_change

    # The next attempt of the run begins there.
    assert plan_memory(order(wide_llama), wide_llama, "cpu", [250] * 16).plan.batch_tokens == adapter.batch_tokens


def planned(base: Path, device: Any = "cpu", free: int = 1 << 40, **plan: Any) -> PlannedMemory:
    """Return how records of 100 tokens, 8 in an optimizer step, would be trained on."""
    values = {"device": "it", "quantization": "none", "batch_tokens": 4096, "activations": "kept", **plan}
    return PlannedMemory(
        MemoryPlan.model_validate(values), base_sizes(base), TrainConfig(rank=4), device, free, longest=100, most=800
    )


def plans_after(known: PlannedMemory) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    plan = smaller(known, known.plan)
    while plan is not None:
        found.append((plan.batch_tokens, plan.activations))
        plan = smaller(known, plan)
    return found


def test_less_is_half_the_tokens_down_to_a_record_then_recomputed_then_offloaded_on_a_card(tiny_llama: Path) -> None:
    halves = [(400, "kept"), (200, "kept"), (100, "kept")]
    assert plans_after(planned(tiny_llama)) == [*halves, (100, "recomputed")]
    assert plans_after(planned(tiny_llama, "cuda")) == [*halves, (100, "recomputed"), (100, "offloaded")]
    assert plans_after(planned(tiny_llama, activations="recomputed", batch_tokens=150)) == [(100, "recomputed")]


def test_what_ran_out_is_noted_before_the_process_begins_again(order: Order, tiny_llama: Path) -> None:
    attempt = order(tiny_llama)
    known = plan_memory(attempt, tiny_llama, "cpu", [100] * 8)
    with pytest.raises(StartAgain):
        go_on_with_less(attempt, known, OutOfMemory("too much"))
    assert plan_memory(order(tiny_llama), tiny_llama, "cpu", [100] * 8).plan.batch_tokens == 400
    # Other settings are another question.
    assert plan_memory(order(tiny_llama, batch_tokens=700), tiny_llama, "cpu", [100] * 8).plan.batch_tokens == 700


def test_a_stop_is_obeyed_before_the_process_begins_again(order: Order, tiny_llama: Path) -> None:
    attempt = order(tiny_llama)
    attempt.stop.set()
    with pytest.raises(Interrupted):
        go_on_with_less(attempt, plan_memory(attempt, tiny_llama, "cpu", [100]), OutOfMemory("too much"))


def test_where_nothing_takes_less_the_error_says_what_would_fit(order: Order, wide_llama: Path) -> None:
    last = planned(wide_llama, batch_tokens=100, activations="recomputed")
    four_bits = last.bytes_of(last.plan.model_copy(update={"quantization": "nf4"}))
    needed = int(sum(four_bits.values()) / MARGIN) + 1
    with pytest.raises(
        StepFailed, match=r"too much: estimated \d+(\.\d)? MB: base as saved, micro-batches of 100 tokens"
    ) as raised:
        go_on_with_less(order(wide_llama), replace(last, free=needed), OutOfMemory("too much"))
    assert 'train.quantization = "nf4"' in raised.value.hint
    with pytest.raises(StepFailed) as raised:
        go_on_with_less(order(wide_llama), replace(last, free=0), OutOfMemory("too much"))
    assert "a smaller base model or a device with more memory" in raised.value.hint
    quantised = replace(last, plan=last.plan.model_copy(update={"quantization": "nf4"}))
    half = replace(quantised, longest=50, most=50).bytes_of(quantised.plan)
    longer = replace(quantised, free=int(sum(half.values()) / MARGIN) + 1)
    with pytest.raises(StepFailed) as raised:
        go_on_with_less(order(wide_llama), longer, OutOfMemory("too much"))
    assert "train.max_length = 50" in raised.value.hint


def test_the_base_is_quantised_where_it_does_not_fit_as_it_is_and_stays_what_it_was(
    order: Order, wide_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(free: int, **settings: Any) -> MemoryPlan:
        monkeypatch.setattr(memory, "free_memory", lambda _device: free)
        return plan_memory(order(wide_llama, **settings), wide_llama, "cpu", [100] * 8).plan

    base = base_sizes(wide_llama)
    whole = MemoryPlan(device="cpu", quantization="none", batch_tokens=800, activations="kept")
    wide, narrow = (
        sum(estimate(base, whole.model_copy(update={"quantization": name}), TrainConfig(rank=4), "cpu").values())
        for name in ("none", "nf4")
    )
    assert narrow < wide
    enough = int(wide / MARGIN) + (10 << 20)
    assert chosen(enough).quantization == "none"
    assert chosen(0).quantization == "none", "the run has begun with it"
    assert chosen(enough, seed=1, rank=5).quantization == "none"
    little = chosen(int(wide * 0.5), rank=6)
    assert (little.quantization, little.batch_tokens < 800) == ("nf4", True)
    assert chosen(enough, rank=6).quantization == "nf4", "the run has begun with it"
    assert chosen(0, quantization="none").quantization == "none"


def test_a_training_begins_where_an_earlier_one_on_the_same_device_came_to(
    order: Order, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = MemoryPlan(device="cpu", quantization="nf4", batch_tokens=512, activations="recomputed")
    assert plan_memory(order(tiny_llama, earlier), tiny_llama, "cpu", [100] * 8).plan == earlier
    assert "plan of an earlier training, used until train.batch_tokens changes" in capsys.readouterr().err
    for n, other in enumerate((earlier.model_copy(update={"device": "card"}), None)):
        plan = plan_memory(order(tiny_llama, other, rank=5 + n), tiny_llama, "cpu", [100] * 8).plan
        assert (plan.quantization, plan.batch_tokens, plan.activations) == ("none", 4096, "kept")
        assert "found before" not in capsys.readouterr().err


def test_want_of_memory_is_told_from_other_errors() -> None:
    for ask in (lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: bytearray(1 << 60)):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            ask()
        assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("activations", ["kept", "recomputed"])
def test_the_estimate_counts_what_torch_keeps_for_the_backward_pass(
    tiny_llama: Path, tmp_path: Path, activations: Any
) -> None:
    plan = MemoryPlan(device="cpu", quantization="none", batch_tokens=1000, activations=activations)
    job = Training(tiny_llama, "cpu", tmp_path / "adapter", tmp_path / "scratch", "mark", plan)
    rows = [TokenRow([5 + place % 200 for place in range(250)], [0] * 249 + [1]) for _ in range(4)]
    trainer = make_trainer(job, load_tokenizer(tiny_llama), rows, [], TrainConfig(quantization="none", rank=4))
    model = trainer.model
    if activations == "recomputed":
        model.activation_checkpointing_enable()
    model.train()
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    (inputs,) = trainer.divide_step(collate([dict(row) for row in trainer.train_dataset]))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.compute_loss(model, inputs)
    expected = estimate(base_sizes(tiny_llama), plan, TrainConfig(rank=4), "cpu")["activations"] / OVERHEAD["cpu"]
    if activations == "recomputed":
        # A layer that is computed again is in memory once, and the others' inputs all the time.
        kept_all = estimate(
            base_sizes(tiny_llama), plan.model_copy(update={"activations": "kept"}), TrainConfig(rank=4), "cpu"
        )
        expected -= (kept_all["activations"] / OVERHEAD["cpu"] - 1000 * 96 * 4) / 2
    assert sum(kept.values()) == pytest.approx(expected, rel=0.05)


def test_the_estimate_takes_the_chunks_of_the_loss() -> None:
    assert answer_loss._LOGITS_BYTES == LOGITS_BYTES
