"""The jobs of this installation in Slurm: list them, submit one held, release it, cancel it, and note its state."""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import structlog

from daemon.settings.sections import ExecutorSettings
from daemon.system.slurm_commands import ask, is_number, job_number
from pipeline import durable
from pipeline.contract import JOB_STATE_NAME, LOG_NAME, StepSpec

#: The command that a job runs.
WORKER = (sys.executable, "-P", "-m", "daemon", "worker")
WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"})
RUNNING = frozenset(
    {"CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"}
)
#: Reasons of a waiting job that do not pass by themselves.
NEVER = (
    *("BadConstraints", "PartitionTimeLimit", "PartitionNodeLimit", "InvalidAccount", "InvalidQOS", "JobHeldAdmin"),
    *("launch failed", "job requeued in held"),
)
#: Number, name, comment, state, reason and nodes of a job.
_FORMAT = "%A|%j|%k|%T|%r|%N"
log = structlog.get_logger()


class Job(NamedTuple):
    """A job as squeue shows it."""

    number: int
    key: str
    """Its attempt's key; `fence` is its attempt's, too."""
    fence: str
    state: str
    reason: str
    nodes: str


class SlurmJobs:
    """The jobs of the attempts of one installation, which are known by name, comment and number."""

    def __init__(self, instance: str, settings: ExecutorSettings, program: Sequence[str]) -> None:
        """Name jobs after `instance`, the installation's id; each runs `program --one KEY FENCE --state ROOT`."""
        self._name, self._settings, self._program = f"dropforge-{instance}.", settings, program

    def listed(self) -> list[Job]:
        """Return this installation's jobs in squeue's order, also ended ones that it lists. Raises `CannotAsk`."""
        # Text, not JSON: its form has been the same for ten years, and it is a hundredth of the size.
        lines = ask("squeue", "--me", "--states=all", "--noheader", f"--format={_FORMAT}").splitlines()
        parts = [line.split("|") for line in lines]
        rows = [part for part in parts if len(part) == len(Job._fields) and is_number(part[0])]
        named = [part for part in rows if part[1].startswith(self._name)]
        return [Job(int(number), name.removeprefix(self._name), *more) for number, name, *more in named]

    def submit(self, spec: StepSpec) -> int:
        """Submit the attempt's job, held, and return its number. Raises `CannotAsk`."""
        folder = Path(spec.root) / spec.folder
        argv = (*self._program, "--one", spec.key, spec.fence, "--state", spec.root)
        setup = f". {shlex.quote(self._settings.setup)}\n" if self._settings.setup else ""
        # Slurm lets its own variables through, a token to authenticate by among them.
        script = f"#!/bin/sh\nunset SLURM_JWT\n{setup}exec {shlex.join(argv)}\n"
        # Those of the settings first: of an option that is given twice the last one counts.
        options = (
            *self._settings.slurm.arguments(spec.step),
            *("--parsable", "--hold", "--no-requeue", "--export=NIL", "--open-mode=append"),
            *(f"--job-name={self._name}{spec.key}", f"--comment={spec.fence}", f"--chdir={folder}"),
            *(f"--output={LOG_NAME}", f"--signal=B:TERM@{round(spec.grace_seconds)}"),
        )
        number = job_number(ask("sbatch", *options, stdin=script))
        log.info("job_submitted", key=spec.key, job=number)
        return number

    def cancel(self, job: Job) -> None:
        """Cancel a job; do nothing if its state says that it has ended. Raises `CannotAsk`."""
        if job.state in WAITING | RUNNING:
            ask("scancel", "--me", f"--name={self._name}{job.key}", str(job.number))


def release(number: int) -> None:
    """Let a held job begin. Raises `CannotAsk`."""
    ask("scontrol", "release", str(number))


def note_state(spec: StepSpec, job: Job) -> None:
    """Write a job's state, since when (Unix ms), reason and nodes to its attempt's job-state.json, if they changed."""
    path = Path(spec.root) / spec.folder / JOB_STATE_NAME
    fields = {"job": job.number, "state": job.state, "reason": job.reason, "nodes": job.nodes}
    known = durable.read_object(path)
    if {name: known.get(name) for name in fields} != fields:
        since = known["since"] if known.get("state") == job.state else round(time.time() * 1000)
        durable.write_hint(path, {**fields, "since": since})
