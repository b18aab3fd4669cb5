"""Which layers have most signal to noise, held against a dense singular value decomposition by numpy."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import TrainConfig
from pipeline.errors import CannotTrain
from pipeline.train.base_weights import chosen_layers, signal_to_noise


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


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50)])
@pytest.mark.parametrize("signal", [0.0, 3.0])
def test_the_ratio_is_that_of_a_dense_decomposition(shape: tuple[int, int], signal: float) -> None:
    weight = noise(*shape, seed=3, signal=signal)
    assert signal_to_noise(weight) == pytest.approx(reference(weight.double().numpy()), rel=1e-4)


def test_a_matrix_without_noise_has_no_end_of_signal() -> None:
    assert signal_to_noise(torch.eye(6)) == float("inf")


LAYERS = [f"model.layers.{number}.{name}" for number in range(4) for name in ("mlp.up_proj", "self_attn.q_proj")]


def weights(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    made = {name: noise(24, 32, seed=number) for number, name in enumerate(LAYERS)}
    return made | {name.replace("__", "."): weight for name, weight in changed.items()}


def chosen(read: dict[str, torch.Tensor], **settings: Any) -> list[str]:
    return chosen_layers(LAYERS, read.__getitem__, TrainConfig(method="spectrum", **settings))


@pytest.mark.parametrize(("share", "expected"), [(0.01, 1), (0.25, 1), (0.26, 2), (0.5, 2), (1.0, 4)])
def test_of_each_name_the_best_layers_are_chosen(share: float, expected: int) -> None:
    read = weights()
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
        chosen(weights(model__layers__2__mlp__up_proj=broken))
