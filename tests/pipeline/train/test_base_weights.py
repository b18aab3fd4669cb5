"""Methods that train the base's own weights: which, in what precision, and that a run of each holds to its end."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.artifacts import Adapter, Dataset, Model
from pipeline.config import RunConfig, TrainConfig
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, Interrupted
from pipeline.merge.step import merge
from pipeline.models.loading import load_tokenizer
from pipeline.models.manifest import model_id, verify_manifest
from pipeline.records.heldout import dataset_hash
from pipeline.train.galore import STEPS_BETWEEN
from pipeline.train.step import train
from pipeline.train.trainer import TokenRow, Training, make_trainer
from tests.stopped_attempt import StoppedAfter

METHODS = ["galore", "spectrum", "full"]
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPFORGE_DEVICE", "cpu")


def in_dtype(base: Path, target: Path, dtype: torch.dtype) -> Path:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model.save_pretrained(target)
    load_tokenizer(base).save_pretrained(target)
    return target


# What is trained -----------------------------------------------------------------------------------------------------

Make = Callable[..., Any]


@pytest.fixture
def trainer(tiny_llama: Path, tmp_path: Path) -> Make:
    """Build the step's trainer of sixteen rows: trainer(base=folder, **train settings)."""

    def make(base: Path = tiny_llama, **settings: Any) -> Any:
        rows = [TokenRow([3 + number] * 8, [0] * 4 + [1] * 4) for number in range(16)]
        config = TrainConfig.model_validate({"rank": 4, "batch_size": 2, **settings})
        job = Training(base, "cpu", tmp_path / "adapter", tmp_path / "scratch", "mark")
        return make_trainer(job, load_tokenizer(tiny_llama), rows, [], config)

    return make


def trained(made: Any) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in made.model.named_parameters() if weight.requires_grad}


def test_each_method_trains_its_weights_and_no_others(trainer: Make) -> None:
    full = trained(trainer(method="full"))
    assert {"model.embed_tokens.weight", "model.norm.weight"} < full.keys()
    assert len(full) == 2 + 2 * 9
    galore = trained(trainer(method="galore"))
    assert {name.split(".")[-2] for name in galore} == LINEAR
    assert len(galore) == 14
    assert {name.split(".")[-2] for name in trained(trainer(method="galore", targets=["q_proj"]))} == {"q_proj"}
    spectrum = trained(trainer(method="spectrum", share=0.5))
    assert {name.split(".")[-2] for name in spectrum} == LINEAR
    assert len(spectrum) == 7, "one of two layers each"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trained_weights_are_float32_as_the_files_have_them_and_the_others_16_bits(
    trainer: Make, tiny_llama: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = in_dtype(tiny_llama, tmp_path / "base", dtype)
    stored = load_file(base / "model.safetensors")
    made = trainer(base, method="spectrum")
    for name, weight in trained(made).items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, stored[name].float())
    frozen = {weight.dtype for weight in made.model.parameters() if not weight.requires_grad}
    assert frozen <= {torch.bfloat16, torch.float32}, "float32 on a processor without 16-bit arithmetic"


def test_a_step_that_is_smaller_than_the_bases_rounding_is_not_lost(
    trainer: Make, tiny_llama: Path, tmp_path: Path
) -> None:
    made = trainer(
        in_dtype(tiny_llama, tmp_path / "base", torch.bfloat16), method="full", learning_rate=1e-6, warmup=0.0
    )
    before = {name: weight.detach().clone() for name, weight in trained(made).items()}
    made.train()
    weight, was = trained(made)["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"]
    assert float((weight != was).float().mean()) > 0.9
    assert float((weight.bfloat16() != was.bfloat16()).float().mean()) < 0.1


def test_a_rank_larger_than_a_matrix_is_refused(trainer: Make) -> None:
    trainer(method="galore", rank=48)
    with pytest.raises(CannotTrain, match=r"train\.rank is 49, and the smallest matrix .* has 48 rows") as caught:
        trainer(method="galore", rank=49)
    assert caught.value.hint == "set train.rank = 48 or less"


def test_a_base_whose_files_name_its_weights_otherwise_is_refused(
    trainer: Make, tiny_llama: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    stored = load_file(base / "model.safetensors")
    # As many bases are saved: transformers finds these all the same.
    save_file(
        {name.removeprefix("model."): one for name, one in stored.items()}, base / "model.safetensors", {"format": "pt"}
    )
    trainer(base, method="lora")
    with pytest.raises(CannotTrain, match="has another name or shape than in the model") as caught:
        trainer(base, method="full")
    assert 'train.method = "lora"' in caught.value.hint


def test_a_layer_that_is_not_there_is_refused_as_for_an_adapter(trainer: Make) -> None:
    with pytest.raises(CannotTrain, match="the base model has no such linear layer"):
        trainer(method="spectrum", targets=["query"])


def test_a_tied_head_gets_the_gradient_of_both_its_places(trainer: Make) -> None:
    made = trainer(method="full")
    (inputs, *_) = [made._micro_batches(batch)[0] for batch in made.get_train_dataloader()]
    made.model.eval()
    made.compute_loss(made.model, dict(inputs)).backward()
    found = made.model.get_input_embeddings().weight.grad.clone()
    made.model.zero_grad()
    labels = inputs.pop("labels")
    logits = made.model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    each = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none", ignore_index=-100)
    (each.sum() / (labels[:, 1:] != -100).sum()).backward()
    torch.testing.assert_close(found, made.model.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-6)
    assert made.model.get_output_embeddings().weight is made.model.get_input_embeddings().weight


# A run to its end ----------------------------------------------------------------------------------------------------


class Run:
    """One run of fifty rows in batches of 8, three epochs, 24 dev rows."""

    def __init__(
        self, root: Path, base: Path, rows: list[dict[str, str]], make_attempt: Callable[..., Attempt]
    ) -> None:
        (root / "data").mkdir()
        for name, part in (("train", rows[:50]), ("dev", rows[50:])):
            lines = (json.dumps({"id": f"{name}-{number}", **row}) + "\n" for number, row in enumerate(part))
            (root / "data" / f"{name}.jsonl").write_text("".join(lines))
        self.root, self.base, self.make_attempt = root, base, make_attempt
        self.dataset = Dataset(
            folder="data",
            train_rows=50,
            dev_rows=24,
            heldout_rows=0,
            heldout_groups=0,
            heldout_pinned=False,
            heldout_version="v",
            dataset_sha256=dataset_hash(root / "data"),
            duplicates=0,
            replaced=0,
            removed_heldout=0,
            metric="exact_match",
            max_new_tokens=8,
        )

    def config(self, **settings: Any) -> RunConfig:
        values = {"rank": 4, "learning_rate": 1e-3, "epochs": 3, "batch_size": 8, "batch_tokens": 200, **settings}
        return RunConfig(
            track="default",
            base_model=str(self.base),
            base_model_id=model_id(self.base),
            salt="s",
            train=TrainConfig.model_validate({"checkpoint_minutes": 1e-6, **values}),
        )

    def attempt(self, **settings: Any) -> Attempt:
        return self.make_attempt("train", config=self.config(**settings), inputs={"prepare": self.dataset})

    def stop_after(self, step: int, **settings: Any) -> None:
        attempt = StoppedAfter(self.attempt(**settings).spec)
        attempt.step = step
        with pytest.raises(Interrupted):
            train(attempt)

    def finish(self, **settings: Any) -> tuple[Adapter, dict[str, torch.Tensor]]:
        attempt = self.attempt(**settings)
        made = train(attempt)
        assert [path.name for path in attempt.path(made.folder).iterdir()] == ["weights.safetensors"]
        return made, load_file(attempt.path(made.folder) / "weights.safetensors")

    def merge(self, made: Adapter, **settings: Any) -> tuple[Model, Path]:
        inputs = {"prepare": self.dataset, "train": made}
        attempt = self.make_attempt("merge", config=self.config(**settings), inputs=inputs)
        model = merge(attempt)
        return model, attempt.path(model.folder)


@pytest.fixture
def run(tiny: Any, tmp_path: Path, make_attempt: Callable[..., Attempt]) -> Callable[[Path], Run]:
    return lambda base: Run(tmp_path, base, tiny.rows(74, seed=3), make_attempt)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_in_the_middle_ends_in_the_same_weights_and_merges(
    run: Callable[[Path], Run], tiny_llama: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert STEPS_BETWEEN > 10, "the projector of the first step has to come out of the checkpoint"
    own = run(in_dtype(tiny_llama, tmp_path / "base", torch.bfloat16))
    own.stop_after(10, method=method)
    kept = max((own.root / "runs/1/checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    assert "weights.safetensors" in {path.name for path in kept.iterdir()}
    assert "model.safetensors" not in {path.name for path in kept.iterdir()}, "not the base again"
    resumed, found = own.finish(method=method)
    assert resumed.resumed_from_step == 11
    shutil.rmtree(own.root / "runs/1/checkpoints")
    whole, expected = own.finish(method=method)

    assert found.keys() == expected.keys()
    assert [name for name, weight in found.items() if not torch.equal(weight, expected[name])] == []
    assert resumed.loss_curve == whole.loss_curve
    assert resumed.dev_curve == whole.dev_curve
    assert (whole.kind, whole.quantization, whole.optimizer_steps) == ("weights", "none", 21)
    assert whole.trainable_parameters == sum(weight.numel() for weight in expected.values())
    stored = load_file(own.base / "model.safetensors")
    squares = (float((weight.double() - stored[name].double()).square().sum()) for name, weight in expected.items())
    assert whole.adapter_change == pytest.approx(math.sqrt(sum(squares)))

    model, folder = own.merge(whole, method=method)
    assert "whole model in memory" not in capsys.readouterr().err
    assert verify_manifest(folder) == model.model_id
    merged = load_file(folder / "model.safetensors")
    assert merged.keys() == stored.keys()
    for name, weight in merged.items():
        assert torch.equal(weight, expected.get(name, stored[name]).bfloat16()), name
