"""Methods that train the base's own weights: which, in what precision, and that a run of each holds to its end."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.config import TrainConfig
from pipeline.errors import CannotTrain
from pipeline.merge.step import merge
from pipeline.models.loading import load_tokenizer
from pipeline.models.manifest import verify_manifest
from pipeline.train.galore import STEPS_BETWEEN
from pipeline.train.trained_weights import chosen_layers, signal_to_noise
from tests.training_runs import TrainingRun, same

METHODS = ["galore", "spectrum", "full"]
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def in_dtype(base: Path, target: Path, dtype: torch.dtype) -> Path:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model.save_pretrained(target)
    load_tokenizer(base).save_pretrained(target)
    return target


# What is trained -----------------------------------------------------------------------------------------------------

Make = Callable[..., Any]


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


def test_trained_weights_are_float32_as_the_files_have_them_and_the_others_16_bits(
    trainer: Make, tiny_llama: Path, tmp_path: Path
) -> None:
    base = in_dtype(tiny_llama, tmp_path / "base", torch.float16)
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


def test_a_tied_head_gets_the_gradient_of_both_its_places(trainer: Make) -> None:
    made = trainer(method="full")
    (inputs, *_) = [made._micro_batches(batch)[0] for batch in made.get_train_dataloader()]
    made.model.eval()
    made.compute_loss(made.model, dict(inputs)).backward()
    found = made.model.get_input_embeddings().weight.grad.clone()
    made.model.zero_grad()
    labels, _ = inputs.pop("labels"), inputs.pop("answers")
    logits = made.model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    each = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none", ignore_index=-100)
    (each.sum() / (labels[:, 1:] != -100).sum()).backward()
    torch.testing.assert_close(found, made.model.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-6)
    assert made.model.get_output_embeddings().weight is made.model.get_input_embeddings().weight


# A run to its end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_in_the_middle_ends_in_the_same_weights_and_merges(
    new_run: Callable[..., TrainingRun],
    tiny_llama: Path,
    tmp_path: Path,
    method: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert STEPS_BETWEEN > 10, "the projector of the first step has to come out of the checkpoint"
    base = in_dtype(tiny_llama, tmp_path / "base", torch.bfloat16)
    run = new_run(base, method=method, learning_rate=1e-3, epochs=2)
    run.stop_after(5)
    kept = {path.name for path in (run.checkpoints / "step-6-1").iterdir()}
    assert "weights.safetensors" in kept
    assert "model.safetensors" not in kept, "not the base again"
    resumed, found = run.finish()
    assert resumed.resumed_from_step == 6
    run.forget()
    whole, expected = run.finish()

    assert same(found, expected)
    assert (resumed.loss_curve, resumed.dev_curve) == (whole.loss_curve, whole.dev_curve)
    assert (whole.kind, whole.quantization, whole.optimizer_steps) == ("weights", "none", 14)
    assert [path.name for path in (tmp_path / whole.folder).iterdir()] == ["weights.safetensors"]
    assert whole.trainable_parameters == sum(weight.numel() for weight in expected.values())
    stored = load_file(base / "model.safetensors")

    attempt = run.make_attempt("merge", config=run.config(), inputs={"prepare": run.dataset, "train": whole})
    model = merge(attempt)
    assert "whole model in memory" not in capsys.readouterr().err
    assert verify_manifest(attempt.path(model.folder)) == model.model_id
    merged = load_file(attempt.path(model.folder) / "model.safetensors")
    assert merged.keys() == stored.keys()
    for name, weight in merged.items():
        assert torch.equal(weight, expected.get(name, stored[name]).bfloat16()), name


# Spectrum: held against a dense singular value decomposition by numpy -------------------------------------------------


def noise(rows: int, columns: int, seed: int, signal: float = 0.0) -> torch.Tensor:
    """Return a matrix of random numbers, with a pattern of rank one in it."""
    dice = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, 1, generator=dice), torch.randn(1, columns, generator=dice)
    return torch.randn(rows, columns, generator=dice) + signal * left @ right


def reference(weight: np.ndarray) -> float:
    """Return the ratio by the words of arXiv:2406.06623."""
    values = np.linalg.svd(weight, compute_uv=False)
    low, high = np.percentile(values, [25, 75])
    beta = min(weight.shape) / max(weight.shape)
    edge = (high - low) / 1.349 * np.sqrt((1 + np.sqrt(beta)) ** 2)
    return float(values[values > edge].sum() / values[values <= edge].sum() / values.max())


@pytest.mark.parametrize(("shape", "signal"), [((40, 60), 0.0), ((60, 40), 3.0)])
def test_the_ratio_is_that_of_a_dense_decomposition(shape: tuple[int, int], signal: float) -> None:
    weight = noise(*shape, seed=3, signal=signal)
    assert signal_to_noise(weight) == pytest.approx(reference(weight.double().numpy()), rel=1e-4)


def test_a_matrix_without_noise_has_no_end_of_signal() -> None:
    assert signal_to_noise(torch.eye(6)) == float("inf")


LAYERS = [f"model.layers.{number}.{name}" for number in range(4) for name in ("mlp.up_proj", "self_attn.q_proj")]


def layer_weights(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    made = {name: noise(24, 32, seed=number) for number, name in enumerate(LAYERS)}
    return made | {name.replace("__", "."): weight for name, weight in changed.items()}


def chosen(read: dict[str, torch.Tensor], **settings: Any) -> list[str]:
    return chosen_layers(LAYERS, read.__getitem__, TrainConfig(method="spectrum", **settings))


@pytest.mark.parametrize(("share", "expected"), [(0.01, 1), (0.25, 1), (0.26, 2), (1.0, 4)])
def test_of_each_name_the_best_layers_are_chosen(share: float, expected: int) -> None:
    read = layer_weights()
    found = chosen(read, share=share)
    for name in ("up_proj", "q_proj"):
        own = [layer for layer in LAYERS if layer.endswith(name)]
        best = sorted(own, key=lambda layer: reference(read[layer].double().numpy()), reverse=True)[:expected]
        assert {layer for layer in found if layer.endswith(name)} == set(best)
    assert len(found) == 2 * expected


def test_a_base_that_holds_no_numbers_is_refused_by_the_layers_name() -> None:
    broken = noise(24, 32, seed=1)
    broken[3, 5] = torch.inf
    with pytest.raises(CannotTrain, match=r"model\.layers\.2\.mlp\.up_proj holds numbers that are not finite"):
        chosen(layer_weights(model__layers__2__mlp__up_proj=broken))
