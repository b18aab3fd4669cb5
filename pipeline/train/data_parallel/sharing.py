"""
What the processes of one training share: each optimizer step's records, and the sum of its gradients.

A pass divides its loss by the answers of the whole step (see `packing`), so the processes' gradients add up to those of
one process, but for rounding, and all of them take the same step.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """A process's place in a training: its number `rank`, from 0, of `processes`. Number 0 alone writes files."""

    rank: int = 0
    processes: int = 1

    @property
    def share(self) -> slice:
        """Which of an optimizer step's records are its own: every so many, as neighbours are of like length."""
        return slice(self.rank, None, self.processes)


def summed(place: Place, loss: "torch.Tensor", weights: Iterable["torch.Tensor"] = ()) -> "torch.Tensor":
    """
    Return `loss`, a scalar, summed over all processes, and sum the gradients of `weights` in place.

    Every process gets the same numbers to the last bit. A process without a record of the step has gradients of 0.
    """
    import torch
    from torch.nn.utils import parameters_to_vector, vector_to_parameters

    if place.processes == 1:
        return loss
    trained = list(weights)
    for weight in trained:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    numbers = [weight.grad for weight in trained if weight.grad is not None] + [loss.detach().float().view(1)]
    total = parameters_to_vector(numbers)
    torch.distributed.all_reduce(total)
    vector_to_parameters(total, numbers)
    return total[-1]


def any_process(place: Place, flag: bool, device: "torch.device") -> bool:  # noqa: FBT001 - a value, no option
    """Say whether `flag` is true in any of the processes: what one alone is told becomes a decision of all."""
    import torch

    return bool(summed(place, torch.tensor(float(flag), device=device)))


def seed_step(place: Place, seed: int, step: int) -> None:
    """
    Give dropout and noise in this process numbers of their own for an optimizer step.

    A checkpoint holds the generators of the first process alone; with this none of them needs its own back.
    """
    import torch

    if place.processes > 1:
        torch.manual_seed(random.Random(f"{seed}/{step}/{place.rank}").getrandbits(63))  # noqa: S311 - no secret
