"""A base that is divided among two processes: the same bytes, and the same training to the last bit."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.multiprocessing.spawn import start_processes
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.artifacts import Adapter, Dataset
from pipeline.config import MemoryPlan, RunConfig, TrainConfig
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.model_folder.manifest import model_id
from pipeline.qlora.loading import load_model
from pipeline.qlora.training.data_parallel.sharded_base import bytes_of, load_sharded, shard
from pipeline.qlora.training.data_parallel.sharing import Place
from pipeline.steps.merge import merge
from pipeline.steps.train import train
from tests.prepared_rows import write_rows

QUANTIZATIONS = ("nf4", "none")
LAYERS = 2


@pytest.fixture(scope="module")
def base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in bfloat16, which 4 bits need as much as the 16 that it is trained in as it is."""
    folder = tmp_path_factory.mktemp("models") / "bf16"
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(folder)
    return folder


def contents(module: Any) -> list[torch.Tensor]:
    """Return the bytes of a linear layer's weight, and of what says how to read them."""
    state = getattr(module.weight, "quant_state", None)
    said = [] if state is None else [one for one in state.as_dict(packed=True).values() if one is not None]
    return [bytes_of(one).clone() for one in (module.weight, *said)]


def linear_layers(model: Any) -> dict[str, Any]:
    return {name: one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and "head" not in name}


def look(rank: int, base: Path, quantization: Any, folder: Path) -> None:
    """Be one of two processes that hold a sharded base, and note each weight as its layer meets it."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    model = load_sharded(base, "cpu", quantization, None, Place(rank, 2))
    met: dict[str, list[torch.Tensor]] = {}
    layers = linear_layers(model)
    for name, module in layers.items():
        module.register_forward_pre_hook(lambda one, _, name=name: met.update({name: contents(one)}))
    with torch.no_grad():
        logits = model(input_ids=torch.arange(40)[None]).logits
    held = {module.weight.untyped_storage().data_ptr(): module.weight.untyped_storage() for module in layers.values()}
    torch.save({"met": met, "logits": logits, "held": sum(map(len, held.values()))}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_each_layer_meets_its_weights_bit_for_bit(base: Path, tmp_path: Path, quantization: Any) -> None:
    start: Any = start_processes
    start(look, (base, quantization, tmp_path), 2)
    whole: Any = load_model(base, "cpu", quantization)
    expected = {name: contents(module) for name, module in linear_layers(whole).items()}
    assert len(expected) == 7 * LAYERS
    if quantization == "nf4":
        packed = torch.cat([one[0] for one in expected.values()])
        assert packed.view(torch.bfloat16).isnan().sum() > 10, "as bf16 these bytes are no numbers"
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["met"].keys() == expected.keys()
        for name, tensors in expected.items():
            assert len(tensors) == (6 if quantization == "nf4" else 1)
            assert all(torch.equal(*pair) for pair in zip(found["met"][name], tensors, strict=True)), name
        with torch.no_grad():
            assert torch.equal(found["logits"], whole(input_ids=torch.arange(40)[None]).logits)
        assert found["held"] < 1.1 * sum(len(one[0]) for one in expected.values()) / LAYERS, "one layer at a time"


Order = Callable[..., Attempt]


@pytest.fixture
def order(base: Path, tiny: Any, tmp_path: Path, monkeypatch: Any, make_attempt: Callable[..., Attempt]) -> Order:
    """
    Make attempts of one run in two processes, sharded or not: 25 rows, 8 a step and one in the last.

    Passes are small, so the two have them in unequal numbers, and in the last step one process has none.
    """
    monkeypatch.setenv("DROPFORGE_DEVICE", "cpu")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    made = tiny.rows(46, seed=3)
    dataset = write_rows(tmp_path, made[:25], made[25:])

    def make(*, shards: int, quantization: Any = "none", activations: Any = "kept", **settings: Any) -> Attempt:
        chosen = {
            "rank": 4, "alpha": 8, "learning_rate": 3e-3, "epochs": 2, "batch_size": 8, "batch_tokens": 100,
            "checkpoint_minutes": 1e-6, "processes": 2, "quantization": quantization, **settings,
        }  # fmt: skip
        config = RunConfig(
            track="default", base_model=str(base), base_model_id=model_id(base), salt="s",
            train=TrainConfig.model_validate(chosen),
        )  # fmt: skip
        attempt = make_attempt("train", config=config, inputs={"prepare": dataset})
        plan = MemoryPlan(
            device="cpu", quantization=quantization, batch_tokens=100, activations=activations, shards=shards
        )
        attempt.spec = attempt.spec.model_copy(update={"memory": plan})
        return attempt

    return make


def trained(attempt: Attempt) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """Train from the beginning; return the adapter and its weights."""
    shutil.rmtree(attempt.path(attempt.spec.checkpoints), ignore_errors=True)
    adapter = train(attempt)
    return adapter, load_file(attempt.path(adapter.folder) / "adapter_model.safetensors")


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("quantization", "activations"),
    [
        ("nf4", "recomputed"),
        ("none", "kept"),
        *(pytest.param(*one, marks=pytest.mark.long) for one in [("nf4", "kept"), ("none", "recomputed")]),
    ],
)
def test_a_sharded_base_teaches_what_a_whole_one_does_and_the_result_merges(
    order: Order, make_attempt: Callable[..., Attempt], capsys: Any, quantization: Any, activations: Any
) -> None:
    whole, expected = trained(order(shards=1, quantization=quantization, activations=activations))
    attempt = order(shards=2, quantization=quantization, activations=activations)
    sharded, found = trained(attempt)
    assert "sharded over 2 processes" in capsys.readouterr().err
    assert (whole.shards, sharded.shards) == (1, 2)
    assert whole.optimizer_steps == sharded.optimizer_steps == 8
    assert sharded.loss_curve == whole.loss_curve
    assert sharded.dev_curve == whole.dev_curve
    assert len(whole.dev_curve) == 8
    assert same(found, expected)
    inputs = {"prepare": attempt.load(Dataset), "train": sharded}
    model = merge(make_attempt("merge", config=attempt.config, inputs=inputs))
    assert model.logits_difference <= model.logits_tolerance


def test_a_weight_that_two_places_use_stays_whole(base: Path) -> None:
    model: Any = load_model(base, "cpu")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    second.mlp.down_proj = first.mlp.down_proj
    before = [first.mlp.up_proj.weight.clone(), first.mlp.down_proj.weight.clone()]
    shard(model, "cpu", Place())
    assert torch.equal(first.mlp.up_proj.weight, before[0])
    assert torch.equal(first.mlp.down_proj.weight, before[1])
    storage = first.mlp.gate_proj.weight.untyped_storage().data_ptr()
    own = [name for name, one in linear_layers(model).items() if one.weight.untyped_storage().data_ptr() != storage]
    assert {name.rpartition(".")[2] for name in own} == {"up_proj", "down_proj"}


def test_a_weight_that_was_replaced_is_noticed_before_anything_is_computed(base: Path) -> None:
    model: Any = load_model(base, "cpu")
    shard(model, "cpu", Place())
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.clone())
    hidden = torch.zeros(1, 4, 96, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="weight of a sharded Linear was replaced"):
        model.model.layers[1](hidden)


def test_an_architecture_without_layers_to_divide_is_refused() -> None:
    with pytest.raises(CannotTrain, match="no layers that can be divided"):
        shard(torch.nn.Sequential(torch.nn.Linear(4, 4)), "cpu", Place())
