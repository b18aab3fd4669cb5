"""How many threads a process that computes gets: one for each processor that is free when it starts."""

import math
import os
import threading
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

#: A waiting thread spins this often, some 10 µs, before it sleeps: nearly as fast as spinning without an end, and not
#: as ruinous once others compute, too (dispatch/README.md has the numbers).
SPIN_COUNT = 10_000
_MEASURE_SECONDS = 0.2
#: Fields of a line of /proc/stat, in clock ticks: user, nice, system, irq, softirq and steal; not idle and iowait.
_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
#: It imports what a run's next step needs, and waits while that computes.
_PRELOAD = b"pipeline.preload"


def thread_variables(parallel: int = 1) -> dict[str, str]:
    """
    Return the variables of OpenMP for a process that is about to compute, one of at most `parallel` on this machine.

    In a Slurm job it may use the job's processors. Empty if this process's environment has such a variable: the
    operator's choice goes first. Takes 0.2 s.
    """
    if any(name.startswith(("OMP_", "GOMP_")) for name in os.environ):
        return {}
    processors = os.sched_getaffinity(0)
    before = _busy_ticks(processors)
    threading.Event().wait(_MEASURE_SECONDS)
    busy = (_busy_ticks(processors) - before) / os.sysconf("SC_CLK_TCK") / _MEASURE_SECONDS
    of_job = os.environ.get("SLURM_CPUS_ON_NODE")
    allowed = int(of_job) if of_job else min(len(processors), _quota(_cgroup())) / parallel
    return {
        "OMP_NUM_THREADS": str(thread_count(allowed, len(processors) - busy)),
        "GOMP_SPINCOUNT": str(SPIN_COUNT),
    }


def thread_count(allowed: float, free: float) -> int:
    """Return the threads for a process that may use `allowed` processors, where `free` ones are used by nobody else."""
    return max(1, min(math.floor(allowed), round(free)))


def _cgroup() -> Path:
    """Return the folder of this process's cgroup (version 2)."""
    lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    return Path("/sys/fs/cgroup", *(line.removeprefix("0::/") for line in lines if line.startswith("0::")))


def _quota(cgroup: Path) -> float:
    """Return the number of processors that the `cpu.max` of a cgroup and of those above allows, or infinity."""
    quota = math.inf
    for folder in (cgroup, *cgroup.parents):
        with suppress(OSError):  # the root has none
            most, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            quota = min(quota, math.inf if most == "max" else int(most) / int(period))
    return quota


def _busy_ticks(processors: Collection[int]) -> int:
    """Return the clock ticks in which `processors` were busy, without those of this process and of its preloading."""
    lines = (line.split() for line in Path("/proc/stat").read_text(encoding="ascii").splitlines())
    names = {f"cpu{processor}" for processor in processors}
    busy = sum(int(line[1 + field]) for line in lines if line[0] in names for field in _BUSY_FIELDS)
    return busy - sum(_own_ticks())


def _own_ticks() -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if folder.name == str(os.getpid()) or _PRELOAD in (folder / "cmdline").read_bytes().split(b"\0"):
                fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
                yield int(fields[11]) + int(fields[12])
