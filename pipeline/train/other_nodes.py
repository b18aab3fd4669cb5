"""
The other nodes of a training in a Slurm job of several: `srun` starts a program on each, which runs its processes.

`python -m pipeline.train.other_nodes FILE` is that program. Records and settings reach it in a file of the training's
scratch folder, which all nodes see; stopping is a decision of all processes (see `checkpoints.keeper`).
"""

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.multiprocessing.spawn import start_processes

_WORK = "work.pickle"
_FIRST_PORT, _PORTS = 20_000, 12_000


def job_of_several_nodes(most: int) -> tuple[int, str]:
    """Return the number of the job's nodes, at most `most`, and the URL to meet at; (1, "") if there is one."""
    nodes = min(int(os.environ.get("SLURM_JOB_NUM_NODES", "1")), most)
    if nodes == 1:
        return 1, ""
    # Below the ports that Linux gives out by itself; another job may have the same, then torch says so.
    port = _FIRST_PORT + int(os.environ["SLURM_JOB_ID"]) % _PORTS
    return nodes, f"tcp://{socket.gethostname()}:{port}"


def start(work: Sequence[Any], count: int, scratch: Path) -> list[subprocess.Popen[bytes]]:
    """Run `work`, a function and its arguments from the second on, on `count` other nodes; return their `srun`."""
    if count == 0:
        return []
    path = scratch / _WORK
    path.write_bytes(pickle.dumps(work))
    # Not the first node's folder for temporary files; since 22.05 srun does not take the job's processors by itself.
    told = {name: value for name, value in os.environ.items() if name not in {"TMPDIR", "TRITON_CACHE_DIR"}}
    told["SRUN_CPUS_PER_TASK"] = told.get("SLURM_CPUS_PER_TASK", "1")
    step = ("srun", "--relative=1", f"--nodes={count}", f"--ntasks={count}", "--kill-on-bad-exit=1")
    return [subprocess.Popen((*step, sys.executable, "-P", "-m", __name__, str(path)), env=told)]  # noqa: S603 - our own


def end(others: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait up to `seconds` for the other nodes' processes, then have Slurm kill them."""
    for srun in others:
        with suppress(subprocess.TimeoutExpired):
            srun.wait(seconds)
        srun.terminate()
        srun.wait()


def main(path: Path) -> None:
    """Run this node's processes of the training in `path`; raise if one of them fails, which kills the others."""
    run, job, *rest = pickle.loads(path.read_bytes())  # noqa: S301 - the first node's, in this user's own folder
    process = job.process
    first = (int(os.environ["SLURM_PROCID"]) + 1) * process.per_node
    begin: Any = start_processes
    begin(run, (replace(job, process=replace(process, rank=first)), *rest), process.per_node)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
