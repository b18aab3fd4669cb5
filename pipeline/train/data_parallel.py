"""
Divide each optimizer step's records among processes, and sum their gradients.

A micro-batch divides its loss by the answer tokens of the whole step (see `packing`), so the processes' gradients add
up to those of one process, but for rounding, and all of them take the same step.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters


@dataclass(frozen=True)
class ProcessRank:
    """A process's `rank`, from 0, among the `count` processes of a training. Only rank 0 writes files."""

    rank: int = 0
    count: int = 1
    gpu: int = 0
    """Number of the GPU of a node's first process among the visible ones; the others have the following."""
    nodes: int = 1
    """Number of hosts, each of which has as many of the processes."""
    meeting: str = ""
    """URL at which processes on several nodes join: rank 0 listens there."""

    @property
    def per_node(self) -> int:
        """The number of processes on each node."""
        return self.count // self.nodes

    @property
    def share(self) -> slice:
        """This process's records of an optimizer step: every `count`-th, as neighbours are of similar length."""
        return slice(self.rank, None, self.count)


def summed(process: ProcessRank, loss: "torch.Tensor", weights: Iterable["torch.Tensor"] = ()) -> "torch.Tensor":
    """
    Return `loss`, a scalar, summed over all processes; sum the gradients of `weights` in place.

    Every process waits for the others and gets bitwise the same numbers; a missing gradient counts as 0. With a single
    process `loss` itself is returned.
    """
    if process.count == 1:
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


def any_process(process: ProcessRank, flag: bool, device: "torch.device") -> bool:  # noqa: FBT001 - a value, no option
    """Return whether `flag` is true in any process; waits until all processes have called it."""
    return bool(summed(process, torch.tensor(float(flag), device=device)))


def seed_step(process: ProcessRank, seed: int, step: int) -> None:
    """
    Seed torch's random numbers in this process for an optimizer step, differently for each rank.

    Nothing is seeded if there is one process. So checkpoints need the generator state of the first process only.
    """
    if process.count > 1:
        torch.manual_seed(random.Random(f"{seed}/{step}/{process.rank}").getrandbits(63))  # noqa: S311 - no secret
