"""
Divide each optimizer step's records among processes, and sum their gradients.

A micro-batch divides its loss by the answer tokens of the whole step (see `packing`), so the processes' gradients add
up to those of one process, but for rounding, and all of them take the same step.

In a Slurm job of several nodes `srun` starts `python -m pipeline.train.data_parallel FILE` on each of the other nodes,
to run that node's processes. Records and settings reach it in a file of the training's scratch folder, which all nodes
see; stopping is a decision of all processes (see `watcher.Watcher`).
"""

import os
import pickle
import random
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes
from torch.nn.utils import parameters_to_vector, vector_to_parameters

_WORK = "work.pickle"
_FIRST_PORT, _PORTS = 20_000, 12_000


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
    Return `loss`, a scalar, summed over all processes, detached; sum the gradients of `weights` in place.

    Every process waits for the others and gets bitwise the same numbers, in float32; a missing gradient counts as 0.
    With a single process nothing is changed, and `loss` itself is returned.
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


def seed_step(process: ProcessRank, seed: int, step: int) -> None:
    """
    Seed torch's random numbers in this process for an optimizer step, differently for each rank.

    Nothing is seeded if there is one process. So checkpoints need the generator state of the first process only.
    """
    if process.count > 1:
        torch.manual_seed(random.Random(f"{seed}/{step}/{process.rank}").getrandbits(63))  # noqa: S311 - no secret


def job_of_several_nodes(most: int) -> tuple[int, str]:
    """Return the Slurm job's number of nodes, at most `most`, and the URL to meet at; without several, (1, "")."""
    nodes = min(int(os.environ.get("SLURM_JOB_NUM_NODES", "1")), most)
    if nodes == 1:
        return 1, ""
    # Below the ports that Linux gives out by itself; another job may have the same, then torch says so.
    port = _FIRST_PORT + int(os.environ["SLURM_JOB_ID"]) % _PORTS
    return nodes, f"tcp://{socket.gethostname()}:{port}"


def start_nodes(work: Sequence[Any], count: int, scratch: Path) -> list[subprocess.Popen[bytes]]:
    """
    Start the processes of the job's `count` other nodes by one `srun`; return it in a list, [] if `count` is 0.

    `work` is a function and its arguments after the process number on the node, first a `Job`, whose `process.rank` is
    set for each node. It is pickled into `scratch`.
    """
    if count == 0:
        return []
    path = scratch / _WORK
    path.write_bytes(pickle.dumps(work))
    # Not the first node's folder for temporary files; since 22.05 srun does not take the job's processors by itself.
    environment = {name: value for name, value in os.environ.items() if name not in {"TMPDIR", "TRITON_CACHE_DIR"}}
    environment["SRUN_CPUS_PER_TASK"] = environment.get("SLURM_CPUS_PER_TASK", "1")
    step = ("srun", "--relative=1", f"--nodes={count}", f"--ntasks={count}", "--kill-on-bad-exit=1")
    return [subprocess.Popen((*step, sys.executable, "-P", "-m", __name__, str(path)), env=environment)]  # noqa: S603 - our own


def end_nodes(others: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait up to `seconds` for each `srun` of `others`, then end it, so that Slurm kills its processes."""
    for srun in others:
        with suppress(subprocess.TimeoutExpired):
            srun.wait(seconds)
        srun.terminate()
        srun.wait()


def main(path: Path) -> None:
    """
    Run the processes of a node after the first, by the pickle file `path` that `start_nodes` wrote; needs SLURM_PROCID.

    Raises torch's `ProcessException` if one of them fails, which kills the others.
    """
    run, job, *rest = pickle.loads(path.read_bytes())  # noqa: S301 - the first node's, in this user's own folder
    process = job.process
    first = (int(os.environ["SLURM_PROCID"]) + 1) * process.per_node
    begin: Any = start_processes
    begin(run, (replace(job, process=replace(process, rank=first)), *rest), process.per_node)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
