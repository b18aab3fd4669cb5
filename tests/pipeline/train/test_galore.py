"""GaLore's step and the size of its state, held against the paper's formula by a dense decomposition."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.train import galore as module
from pipeline.train.galore import GaLore, first_singular_vectors

RATE, SCALE, RANK = 1e-2, 2.0, 3


def gradients(shape: tuple[int, int], count: int) -> list[torch.Tensor]:
    dice = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=dice) for _ in range(count)]


def by_the_paper(weight: np.ndarray, steps: list[np.ndarray], every: int) -> np.ndarray:
    """Return what algorithm 2 of arXiv:2403.03507 makes of a matrix (m, n), m <= n."""
    mean = square = np.zeros((RANK, weight.shape[1]))
    for step, gradient in enumerate(steps):
        if step % every == 0:
            projector = np.linalg.svd(gradient, full_matrices=False)[0][:, :RANK]
            # A singular vector has two signs, and the moments of the steps before know one of them.
            ours = first_singular_vectors(torch.tensor(gradient), RANK).numpy()
            projector *= np.sign((projector * ours).sum(axis=0))
        projected = projector.T @ gradient
        mean = 0.9 * mean + 0.1 * projected
        square = 0.999 * square + 0.001 * projected**2
        change = mean / (1 - 0.9 ** (step + 1)) / (np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8)
        weight = weight - RATE * SCALE * projector @ change
    return weight


def after(weight: torch.Tensor, steps: list[torch.Tensor], optimizer: Any) -> torch.Tensor:
    for gradient in steps:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (5, 5)])
def test_steps_are_the_papers(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS_BETWEEN", 3)
    first, *steps = gradients(shape, 8)
    weight = torch.nn.Parameter(first.clone())
    optimizer = GaLore([weight], RATE, RANK, SCALE)
    found = after(weight, steps, optimizer)
    short, long = sorted(shape)
    sizes = [value.numel() for name, value in optimizer.state[weight].items() if name != "step"]
    assert sorted(sizes) == sorted((short * RANK, RANK * long, RANK * long)), "projector and moments"
    stands = shape[0] > shape[1]
    lying = [(one.T if stands else one).double().numpy() for one in (first, *steps)]
    expected = by_the_paper(lying[0], lying[1:], 3)
    np.testing.assert_allclose((found.T if stands else found).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_not_finite_reaches_the_weights_where_it_is_seen() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 6))
    after(weight, [torch.full((4, 6), torch.nan)], GaLore([weight], RATE, 2, SCALE))
    assert not bool(weight.isfinite().any())
