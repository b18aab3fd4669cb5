"""A training that does not fit: what it begins with, what the next attempt does, and that it learns the same."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file

from pipeline import durable
from pipeline.artifacts import Adapter, MemoryPlan
from pipeline.config import TrainConfig
from pipeline.contract import RESULT_NAME, SPEC_NAME, Attempt, StepResult
from pipeline.errors import EXIT_START_AGAIN, Interrupted, StartAgain, StepFailed
from pipeline.evaluate import inference
from pipeline.evaluate.inference import cache_bytes
from pipeline.models.loading import OutOfMemory, is_out_of_memory, load_tokenizer
from pipeline.models.memory_estimate import MARGIN, OVERHEAD, BaseSizes, base_sizes, estimate
from pipeline.train import memory, trainer
from pipeline.train.data_parallel import ProcessRank
from pipeline.train.job import TokenRow
from pipeline.train.memory import Sizes, go_on_with_less, plan_memory
from pipeline.train.packing import collate
from pipeline.train.step import train
from pipeline.train.trainer import Trainer
from tests.made_adapters import made_training
from tests.made_artifacts import memory_plan
from tests.training_runs import TrainingRun

#: What a training may take beyond what its trainer has, measured: eight records a pass take 520 MB, one takes 115.
ROOM = 330 << 20
#: Runs a step as `python -m pipeline` does, but with so little memory to train in that an allocation really fails.
LIMITED = f"""
import resource, sys
from pipeline.__main__ import main
from pipeline.train import trainer

def limited(*arguments):
    trainer = make(*arguments)
    data = int(open("/proc/self/status").read().partition("VmData:")[2].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (data + {ROOM}, resource.RLIM_INFINITY))
    return trainer

make, trainer.Trainer = trainer.Trainer, limited
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def wide_llama(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in float32 that is small, and whose activations are large: 0.2 MB a token."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    wide = {"hidden_size": 128, "intermediate_size": 4096, "num_hidden_layers": 3, "initializer_range": 0.02}
    tiny.make_model(folder, **wide)
    return folder


Order = Callable[..., Attempt]


@pytest.fixture
def order(new_run: Callable[..., TrainingRun]) -> Order:
    """Make attempts of one run at training on 16 records of about 250 tokens."""
    rows = [{"instruction": f"{n} a b" * 50, "input": "", "output": f"ok {n}"} for n in range(16)]
    usual = {"epochs": 1, "batch_tokens": 4096, "checkpoint_minutes": 10}
    return lambda base, **settings: new_run(base, rows, (), **{**usual, **settings}).attempt()


@pytest.mark.long
def test_an_attempt_that_runs_out_of_memory_is_followed_by_one_with_less_that_learns_the_same(
    order: Order, wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    free = train(attempt := order(wide_llama))
    expected = load_file(attempt.path(free.folder) / "adapter_model.safetensors")
    (attempt.path(attempt.spec.checkpoints) / memory.NOTE_NAME).unlink()

    results: list[StepResult] = []
    while not results or results[-1].status == "interrupted":
        attempt = order(wide_llama)
        spec = attempt.folder / SPEC_NAME
        durable.write_json(spec, attempt.spec.model_dump(mode="json"))
        argv = [sys.executable, str(script), "train", str(spec)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        results.append(StepResult.model_validate(durable.read_json(attempt.folder / RESULT_NAME)))
        assert done.returncode == results[-1].exit_code, done.stderr
    assert [result.exit_code for result in results] in ([EXIT_START_AGAIN, 0], [EXIT_START_AGAIN] * 2 + [0])
    assert "does not fit into memory" in str(results[0].error)
    adapter = Adapter.model_validate(results[-1].artifact)
    assert free.batch_tokens == 4096 > adapter.batch_tokens
    assert (adapter.activations, adapter.quantization) == ("kept", "none") == (free.activations, free.quantization)
    # The same records in each of as many steps.
    assert adapter.optimizer_steps == free.optimizer_steps == 2
    assert adapter.trained_tokens == free.trained_tokens
    for one, other in zip(adapter.loss_curve, free.loss_curve, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
    found = load_file(attempt.path(adapter.folder) / "adapter_model.safetensors")
    distance = sum(float((found[name] - expected[name]).square().sum()) for name in expected) ** 0.5
    change = sum(float(weight.square().sum()) for name, weight in expected.items() if "lora_B" in name) ** 0.5
    assert distance <= 1e-3 * change


def sizes(base: Path, free: int = 1 << 40, device: Any = "cpu", **settings: Any) -> Sizes:
    """Return the sizes of a training on records of 100 tokens, 8 in an optimizer step."""
    return Sizes(base_sizes(base), TrainConfig(rank=4, **settings), device, free, longest=100, most=800)


FEWER = [400, 200, 100]
HALF, ALL = "half recomputed", "recomputed"
ON_CPU = [*((tokens, "kept") for tokens in FEWER), (100, HALF), (100, ALL)]
ON_GPU = [(800, HALF), (800, ALL), *((tokens, ALL) for tokens in FEWER)]


@pytest.mark.parametrize(("device", "rungs"), [("cpu", ON_CPU), ("cuda", ON_GPU)])
def test_smaller_plans_come_in_the_order_of_a_steps_time_and_last_an_nf4_base(
    tiny_llama: Path, device: Any, rungs: list[tuple[int, str]]
) -> None:
    def smaller(**settings: Any) -> list[tuple[str, int, str]]:
        known, plan = sizes(tiny_llama, device=device, **settings), memory_plan()
        found: list[tuple[str, int, str]] = []
        while (less := known.smaller(plan)) is not None:
            found.append((less.quantization, known.tokens(less), less.activations))
            plan = less
        return found

    as_saved = [("none", *rung) for rung in rungs]
    in_nf4 = [("nf4", tokens, ALL) for tokens in (800, *FEWER)]
    assert smaller(batch_tokens=4096, quantization="none") == as_saved
    assert smaller(batch_tokens=4096) == as_saved + in_nf4


def test_each_attempt_begins_with_less_and_at_last_on_an_nf4_base_unless_the_settings_change_or_it_is_stopped(
    order: Order, tiny_llama: Path
) -> None:
    plans = []
    for _ in range(6):
        plan, known = plan_memory(attempt := order(tiny_llama), tiny_llama, "cpu", [100] * 8)
        plans.append(plan)
        with pytest.raises(StartAgain):
            go_on_with_less(attempt, plan, known, OutOfMemory("too much"))
    adapter = train(order(tiny_llama))
    assert [plan.quantization for plan in plans] == ["none"] * 6
    assert [plan.batch_tokens for plan in plans[:2]] == [4096, 400]
    assert (adapter.quantization, adapter.batch_tokens, adapter.optimizer_steps) == ("nf4", 4096, 2)
    assert plan_memory(order(tiny_llama), tiny_llama, "cpu", [100] * 8)[0].quantization == "nf4"
    assert plan_memory(order(tiny_llama, batch_tokens=700), tiny_llama, "cpu", [100] * 8)[0].batch_tokens == 700
    attempt.stop.set()
    with pytest.raises(Interrupted) as raised:
        go_on_with_less(attempt, plan, known, OutOfMemory("too much"))
    assert not isinstance(raised.value, StartAgain)


@pytest.mark.parametrize(("activations", "checkpointed"), [("kept", 0), (HALF, 2), (ALL, 3)])
def test_every_second_layer_is_recomputed_or_all_of_them_and_the_same_is_learned(
    wide_llama: Path, tmp_path: Path, activations: Any, checkpointed: int
) -> None:
    rows = [TokenRow([5 + place for place in range(40)], [0] * 39 + [1])]
    config = TrainConfig(quantization="none", rank=4)
    losses = []
    for folder, kind in (("plain", "kept"), ("other", activations)):
        job = made_training(wide_llama, tmp_path / folder, rows, config, activations=kind)
        trainer = Trainer(job, load_tokenizer(wide_llama))
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    layers = trainer.model.get_base_model().model.layers
    assert sum(layer.gradient_checkpointing for layer in layers) == checkpointed
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_where_nothing_takes_less_the_error_says_what_would_fit(order: Order, wide_llama: Path) -> None:
    last, known = memory_plan(batch_tokens=100, activations="recomputed"), sizes(wide_llama, quantization="none")
    four_bits = known.estimate(last.model_copy(update={"quantization": "nf4"}))
    needed = int(sum(four_bits.values()) / MARGIN) + 1
    with pytest.raises(
        StepFailed, match=r"too much: estimated \d+(\.\d)? [MG]B: base as saved, micro-batches of 100 tokens"
    ) as raised:
        go_on_with_less(order(wide_llama), last, replace(known, free=needed), OutOfMemory("too much"))
    assert 'train.quantization = "nf4"' in raised.value.hint
    with pytest.raises(StepFailed) as raised:
        go_on_with_less(order(wide_llama), last, replace(known, free=0), OutOfMemory("too much"))
    assert raised.value.hint.startswith("lower train.max_length")


def test_the_base_is_quantised_where_it_does_not_fit_as_it_is_and_stays_what_it_was(
    order: Order, wide_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(free: int, **settings: Any) -> MemoryPlan:
        monkeypatch.setattr(memory, "free_memory", lambda *_: free)
        return plan_memory(order(wide_llama, **settings), wide_llama, "cpu", [100] * 8)[0]

    wide, narrow = (
        sum(sizes(wide_llama).estimate(memory_plan(batch_tokens=800, quantization=name)).values())
        for name in ("none", "nf4")
    )
    assert narrow < wide
    enough = int(wide / MARGIN) + (10 << 20)
    assert chosen(enough).quantization == "none"
    assert chosen(0).quantization == "none", "the run has begun with it"
    little = chosen(int(wide * 0.5), rank=6)
    assert (little.quantization, little.batch_tokens < 800) == ("nf4", True)
    assert chosen(enough, rank=6).quantization == "nf4", "the run has begun with it"
    assert chosen(0, quantization="none").quantization == "none"


#: The sizes of Llama 3.1 8B.
LLAMA_8B = BaseSizes(
    weights=8_030_000_000,
    linear=6_980_000_000,
    inputs=32 * (6 * 4096 + 14336),
    outputs=32 * (3 * 4096 + 2 * 1024 + 2 * 14336),
    matrices=32 * 7,
    largest=4096 * 14336,
    width=2,
    layers=32,
    hidden=4096,
    inner=14336,
    attention=4096,
    vocabulary=128_256,
)


def test_on_a_gpu_the_fastest_plan_that_fits_is_chosen(
    order: Order, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(memory, "base_sizes", lambda _: LLAMA_8B)

    def planned(free: int, **settings: Any) -> tuple[str, str, int]:
        monkeypatch.setattr(memory, "free_memory", lambda *_: free)
        attempt = order(tiny_llama, **settings)
        found, _ = plan_memory(attempt, tiny_llama, "cuda", [100] * 8)
        (attempt.path(attempt.spec.checkpoints) / memory.NOTE_NAME).unlink()
        return found.quantization, found.activations, found.batch_tokens

    known = Sizes(LLAMA_8B, TrainConfig(rank=4), "cuda", 0, longest=100, most=800)
    fastest_first = [(base, activations) for base in ("none", "nf4") for activations in ("kept", HALF, ALL)]
    needed = [
        sum(known.estimate(memory_plan(quantization=base, activations=activations, batch_tokens=512)).values())
        for base, activations in fastest_first
    ]
    assert needed == sorted(needed, reverse=True)
    for (base, activations), bytes_ in zip(fastest_first, needed, strict=True):
        enough = int(bytes_ / MARGIN) + 1
        assert planned(enough, batch_tokens=512) == (base, activations, 512)
        assert planned(enough, batch_tokens=512, quantization=base)[:2] == (base, activations)
    too_little = int(needed[-1] / MARGIN) - 1000
    assert planned(too_little, batch_tokens=512) == ("nf4", "recomputed", 256)
    assert planned(too_little, batch_tokens=512, quantization="none") == ("none", "recomputed", 100)


def test_the_gpu_with_least_free_memory_counts_and_another_process_reads_it(
    order: Order, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: pytest.fail("it gets a context, which stays"))
    # What child processes get as torch.
    library = tmp_path / "torch.py"
    library.write_text(
        "class cuda:\n    device_count = lambda: 4\n"
        "    mem_get_info = lambda gpu: ((80 << 30, 70 << 30, 9 << 30, 1 << 30)[gpu], 80 << 30)\n"
    )
    processes = [ProcessRank(count=1), ProcessRank(count=2), ProcessRank(count=3), ProcessRank(count=2, gpu=1)]
    free = [plan_memory(order(tiny_llama), tiny_llama, "cuda", [100] * 8, one)[1].free >> 30 for one in processes]
    assert free == [80, 70, 9, 9]
    monkeypatch.setattr(inference, "chosen_device", lambda: "cuda")
    weights = (tiny_llama / "model.safetensors").stat().st_size
    assert cache_bytes(tiny_llama, 100, 1 << 40) == int(0.9 * (80 << 30)) - weights
    library.write_text("class cuda:\n    device_count = lambda: 1 / 0\n")
    with pytest.raises(StepFailed, match="cannot be read: ZeroDivisionError: division by zero") as raised:
        plan_memory(order(tiny_llama), tiny_llama, "cuda", [100] * 8)
    assert "nvidia-smi" in raised.value.hint


@pytest.mark.parametrize("method", ["lora", "dora", "spectrum", "full"])
def test_the_estimate_counts_what_the_optimizer_stores_on_a_gpu(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    config, arguments = TrainConfig(method=method, rank=32), trainer._arguments
    here = {"use_cpu": True, "dataloader_pin_memory": False}
    monkeypatch.setattr(
        trainer, "_arguments", lambda job, model, **named: arguments(replace(job, device="cuda"), model, **named) | here
    )
    job = made_training(tiny_llama, tmp_path, [TokenRow([5, 6, 7], [0, 0, 1])], config)
    made = Trainer(job, load_tokenizer(tiny_llama))
    assert "paged" not in made.args.optim
    adam: Any = made.create_optimizer()
    for weight in made.model.parameters():
        weight.grad = torch.randn_like(weight) if weight.requires_grad else None
    adam.step()
    adam = getattr(adam, "optimizer", adam)
    names = {"exp_avg", "exp_avg_sq", "state1", "state2"}
    stored = sum(one.nbytes for state in adam.state.values() for name, one in state.items() if name in names)
    expected = estimate(base_sizes(tiny_llama), memory_plan(), config, "cuda")["optimizer"]
    assert stored == pytest.approx(expected, rel=0.05)


def test_the_estimate_counts_the_copy_of_an_nf4_matrix_that_a_product_is_computed_from(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[torch.Tensor] = []
    dequantize = bitsandbytes.functional.dequantize_4bit

    def noted(*arguments: Any, **named: Any) -> torch.Tensor:
        copies.append(dequantize(*arguments, **named))
        return copies[-1]

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", noted)
    config, rows = TrainConfig(quantization="nf4", rank=4), [TokenRow([5, 6, 7], [0, 0, 1])]
    made = Trainer(made_training(tiny_llama, tmp_path, rows, config), load_tokenizer(tiny_llama))
    (inputs,) = made.divide_step(collate([dict(row) for row in made.train_dataset]))
    made.compute_loss(made.model.train(), inputs).backward()
    base, plan = base_sizes(tiny_llama), memory_plan(quantization="nf4")
    assert max(copy.numel() for copy in copies) == base.largest
    with_copy, without = (estimate(one, plan, config, "cuda")["weights"] for one in (base, replace(base, largest=0)))
    assert with_copy - without == 2 * base.largest


def test_a_gpu_holds_a_float32_base_in_16_bits() -> None:
    plan, config = memory_plan(batch_tokens=4096), TrainConfig(rank=4)
    assert estimate(replace(LLAMA_8B, width=4), plan, config, "cuda") == estimate(LLAMA_8B, plan, config, "cuda")


def test_a_torch_that_is_built_for_cuda_takes_more_of_a_cpus_memory(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def libraries(device: str, cuda: str | None) -> int:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        return sizes(tiny_llama, device=device).estimate(memory_plan())["libraries"]

    assert libraries("cpu", None) < 0.6 * libraries("cpu", "13.2")
    assert libraries("cuda", "13.2") == libraries("cuda", None)


def test_want_of_memory_is_told_from_other_errors() -> None:
    for ask in (lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: bytearray(1 << 60)):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            ask()
        assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("activations", ["kept", HALF])
def test_the_estimate_counts_what_torch_keeps_for_the_backward_pass(
    tiny_llama: Path, tmp_path: Path, activations: str
) -> None:
    plan = memory_plan(batch_tokens=1000, activations=activations)
    rows = [TokenRow([5 + place % 200 for place in range(250)], [0] * 249 + [1]) for _ in range(4)]
    job = made_training(tiny_llama, tmp_path, rows, TrainConfig(rank=4), batch_tokens=1000, activations=activations)
    trainer = Trainer(job, load_tokenizer(tiny_llama))
    model = trainer.model
    model.train()
    if activations == HALF:
        model.activation_checkpointing_enable(every_n_layers=2)
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
    assert sum(kept.values()) == pytest.approx(expected, rel=0.05)
