"""
GaLore: AdamW on gradients projected to a low rank (arXiv:2403.03507, algorithm 2).

It is written here because neither package survives a resume: galore-torch (1.0, 2024-03) and apollo-torch (1.0.3,
2025-02) keep an object in the optimizer's state, which `torch.load(weights_only=True)` refuses, and neither has had a
release since.
"""

from collections.abc import Iterable
from typing import Any

import torch

#: Optimizer steps between two projections: the paper finds 50 to 1000 best, and trainings here are short.
STEPS_BETWEEN = 50
_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


class GaLore(torch.optim.Optimizer):
    """
    AdamW without weight decay on gradients of matrices, projected to `rank`.

    P, (m, rank), holds the first left singular vectors of a gradient G, (m, n) with m <= n, or of its transpose,
    recomputed every `STEPS_BETWEEN` steps. M and V are Adam's moments of P^T G, (rank, n), corrected for their bias;
    each step subtracts `learning_rate * scale * P (M / (sqrt(V) + 1e-8))` from the weight. The state holds only
    tensors.
    """

    def __init__(self, weights: Iterable[torch.nn.Parameter], learning_rate: float, rank: int, scale: float) -> None:
        """Train the matrices `weights`."""
        super().__init__(weights, {"lr": learning_rate})
        self.rank, self.scale = rank, scale

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override, unused-ignore]
        """Change each weight that has a gradient; `closure` is ignored."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    _update(weight, self.state[weight], group["lr"], self.rank, self.scale)


def _update(weight: Any, state: dict[str, Any], learning_rate: float, rank: int, scale: float) -> None:
    is_tall = weight.shape[0] > weight.shape[1]
    gradient = weight.grad.T if is_tall else weight.grad
    done = int(state.get("step", 0))
    if done % STEPS_BETWEEN == 0:
        state["projector"] = first_singular_vectors(gradient, rank)
    projected = state["projector"].T @ gradient
    if not done:
        state |= {"mean": torch.zeros_like(projected), "square": torch.zeros_like(projected)}
    state["step"] = torch.tensor(done + 1)
    state["mean"].lerp_(projected, 1 - _BETAS[0])
    state["square"].lerp_(projected.square(), 1 - _BETAS[1])
    mean, square = (
        state[name] / (1 - beta ** (done + 1)) for name, beta in zip(("mean", "square"), _BETAS, strict=True)
    )
    change = state["projector"] @ (mean / (square.sqrt() + _EPSILON))
    weight.sub_(change.T if is_tall else change, alpha=learning_rate * scale)


def first_singular_vectors(gradient: "torch.Tensor", rank: int) -> "torch.Tensor":
    """
    Return the first left singular vectors of a matrix (m, n), m <= n, in columns: (m, rank).

    They are computed as eigenvectors of the matrix times its transpose, in a fraction of the time of a singular value
    decomposition. For a matrix that is not finite they are NaN: the watcher then stops the training.
    """
    product = gradient @ gradient.T
    if not bool(product.isfinite().all()):
        return product[:, :rank] * torch.nan
    vectors: torch.Tensor = torch.linalg.eigh(product).eigenvectors
    return vectors[:, -rank:].flip(-1)
