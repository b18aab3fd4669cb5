"""A process that computes gets a thread for each processor that is free."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daemon.system import threads


@pytest.fixture(autouse=True)
def _no_choice_of_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("OMP_", "GOMP_"))]:
        monkeypatch.delenv(name)


@contextmanager
def busy(processes: int, *argv: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Let so many processes compute for the block, in which each has begun to."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass", *argv]) for _ in range(processes)]
    try:
        for process in started:
            while ticks(process.pid) < 20:
                pass
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def ticks(pid: int) -> int:
    return sum(map(int, Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[11:13]))


@pytest.mark.parametrize(
    ("allowed", "free", "count"),
    [
        (2, 2.0, 2),  # a quiet machine
        (2, 1.6, 2),  # a daemon that does little
        (2, 1.1, 1),  # beside a process that computes
        (2, 0.0, 1),  # beside two
        (2, -0.1, 1),
        (64, 61.0, 61),
        (4, 61.0, 4),  # a container with 4 of 64 processors
        (2.5, 64.0, 2),
        (0.5, 64.0, 1),
        (4 / 2, 4.0, 2),  # the first of two trainings
        (2 / 2, 2.0, 1),
    ],
)
def test_a_thread_per_free_processor_that_may_be_used(allowed: float, free: float, count: int) -> None:
    assert threads.thread_count(allowed, free) == count


def test_beside_others_that_compute_on_all_processors_there_is_one_thread() -> None:
    with busy(len(os.sched_getaffinity(0))):
        assert threads.thread_variables() == {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000"}


def test_alone_there_is_a_thread_per_processor_or_the_share_of_those_in_parallel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That nobody else computes is pretended: the machine of a test is never quiet."""
    monkeypatch.setattr(threads, "_busy_ticks", lambda _processors: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(12)))
    assert threads.thread_variables()["OMP_NUM_THREADS"] == "12"
    assert threads.thread_variables(3)["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "6")
    assert threads.thread_variables()["OMP_NUM_THREADS"] == "6"


def test_the_least_quota_of_a_cgroup_and_of_those_above_is_the_limit(tmp_path: Path) -> None:
    own = tmp_path / "system.slice" / "dropforge.service"
    own.mkdir(parents=True)
    assert threads._quota(own) == float("inf")
    (own / "cpu.max").write_text("max 100000\n")
    assert threads._quota(own) == float("inf")
    (own.parent / "cpu.max").write_text("250000 100000\n")
    assert threads._quota(own) == 2.5


def test_the_import_of_what_the_next_step_needs_is_no_work_of_others() -> None:
    with busy(1, "pipeline.preload") as (process,):
        assert sum(threads._own_ticks()) >= ticks(os.getpid()) + 20
        assert ticks(process.pid) >= 20


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_the_operators_choice_goes_first(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert threads.thread_variables() == {}
