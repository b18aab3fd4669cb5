"""
Run step attempts as jobs of a Slurm cluster, through Slurm's own commands.

An attempt's job is submitted held, its number is written to `job.json` in the attempt's folder, then it is released: a
job that is not written down never runs, whenever this process or Slurm's controller is killed. A job is known by its
name and comment, the attempt's key and fence, as a controller that was killed gives numbers out again. `result.json`
says how an attempt ended; what Slurm says is only used where there is none. An attempt that is given up is revoked
first, since its process may live on where nobody can reach it.

A thread calls the commands, as one may take minutes while the controller is dead; the main loop reads files only.
"""

import contextlib
import os
import shlex
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from daemon.dispatch.node import listed
from daemon.dispatch.spool import JobState, folder_of
from daemon.settings.model import ExecutorSettings
from daemon.state import run_files
from daemon.state.layout import WorkFolder
from daemon.state.troubles import Troubles
from pipeline import durable
from pipeline.contract import (
    CLAIM_NAME,
    JOB_NAME,
    LOG_NAME,
    RESULT_NAME,
    REVOKED_NAME,
    SPEC_NAME,
    StepError,
    StepResult,
    StepSpec,
)
from pipeline.errors import EXIT_BAD_DATA, EXIT_FAILED, EXIT_INTERRUPTED, DropforgeError

#: The steps that are run as jobs; the others take seconds, or use the network.
STEPS_ON_NODES = ("train", "merge", "evaluate")
_PROGRAM = (sys.executable, "-P", "-m", "daemon", "worker")
#: Longest wait for one command.
_SECONDS = 30.0
#: An attempt without a result is given up once Slurm has not known its job, or called it ended, for so many seconds: a
#: controller may be starting, and a file system shows a new name late.
GIVE_UP_SECONDS = 120.0
_AGAIN_SECONDS = 30.0
_WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
_RUNNING = frozenset({"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"})
#: Ends that are no failure of the step: the run goes on in another attempt.
_NOT_ITS_OWN = frozenset({"BOOT_FAIL", "CANCELLED", "NODE_FAIL", "PREEMPTED", "REVOKED", "GONE", "PUT BACK"})
#: Reasons of a waiting job that no time removes.
_NEVER = ("BadConstraints", "PartitionTimeLimit", "PartitionNodeLimit", "InvalidAccount", "InvalidQOS", "JobHeldAdmin")
_KILLED = 137
_INSTANCE = "instance"
#: Number, name, comment, state, reason and nodes of a job.
_FORMAT = "%A|%j|%k|%T|%r|%N"
log = structlog.get_logger()


class Job(NamedTuple):
    """A job as squeue shows it."""

    number: int
    name: str
    fence: str
    state: str
    reason: str
    nodes: str


class CannotAsk(DropforgeError):
    """Slurm gave no answer, or refused: nothing is known, least of all that a job is gone."""


class SlurmExecutor:
    """Submits attempts to Slurm."""

    def __init__(
        self, root: Path, settings: ExecutorSettings, troubles: Troubles, program: Sequence[str] = _PROGRAM
    ) -> None:
        """
        Use the runs below `root`, which the nodes see under the same path; problems go to `troubles`.

        A job runs `program --one KEY FENCE --state ROOT`.
        """
        self._root, self._settings, self._troubles, self._program = root, settings, troubles, program
        self._name = f"dropforge-{_instance(root)}."
        #: The attempts that were submitted or polled and have no result yet, by key.
        self._open: dict[str, StepSpec] = {}
        self._cancelled: dict[str, float] = {}
        #: Since when Slurm does not know an attempt's job, or says that it has ended, by key.
        self._missing: dict[str, float] = {}
        self._again: dict[str, float] = {}
        self._problems: dict[str, DropforgeError] = {}
        self._shown: set[str] = set()
        self._wake, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._serve, name="slurm", daemon=True)

    # --- called by the main loop; they read and write files only

    def submit(self, spec: StepSpec) -> None:
        """Write the attempt's spec.json and have its job submitted; do nothing if it has a result."""
        folder = Path(spec.root) / spec.folder
        folder.mkdir(parents=True, exist_ok=True)
        names = listed(folder)
        if RESULT_NAME in names:
            return
        if SPEC_NAME not in names:
            durable.write_json(folder / SPEC_NAME, spec.model_dump(mode="json"))
            durable.fsync_folder(folder.parent)
        self._watch(spec)

    def poll(self, spec: StepSpec) -> JobState:
        """Return an attempt's state: `ENDED` once its result is listed, else as Slurm last said; it is never `LOST`."""
        self._show_problems()
        names = listed(Path(spec.root) / spec.folder)
        if RESULT_NAME in names:
            self._open.pop(spec.key, None)
            return JobState.ENDED
        self._watch(spec)
        return JobState.RUNNING if CLAIM_NAME in names else JobState.QUEUED

    def cancel(self, key: str) -> None:
        """Revoke an attempt: its step is stopped wherever it runs, and its job cancelled after the time for that."""
        if key in self._cancelled:
            return
        self._cancelled[key] = time.monotonic()
        with contextlib.suppress(FileNotFoundError):
            _mark(self._root / folder_of(key) / REVOKED_NAME)
        self._wake.set()

    def outlives(self, _key: str) -> bool:
        """Return `True`: the next daemon finds the job."""
        return True

    def stop(self) -> None:
        """End the thread; the jobs go on, and the next process finds them."""
        self._over.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self, spec: StepSpec) -> None:
        if spec.key not in self._open:
            self._open[spec.key] = spec
            self._wake.set()
        if not self._thread.is_alive() and not self._over.is_set():
            self._thread.start()

    def _show_problems(self) -> None:
        """Note the thread's problems as troubles, and clear those that are over."""
        problems = dict(self._problems)
        for whose in self._shown - problems.keys():
            self._troubles.clear(whose)
        for whose, error in problems.items():
            self._troubles.note(whose, error)
        self._shown = set(problems)

    # --- the thread

    def _serve(self) -> None:
        while not self._over.is_set():
            self._wake.wait(self._settings.poll_seconds)
            self._wake.clear()
            try:
                self._turn()
            except Exception:  # the thread must outlive a full disk
                log.exception("slurm_trouble")

    def _turn(self) -> None:
        """Look at all jobs once, then bring each open attempt's job a step further."""
        specs = list(self._open.values())
        if not specs:
            return
        try:
            jobs = self._look()
        except CannotAsk as error:
            words = f"Slurm has not answered since {time.strftime('%H:%M')}, jobs go on: {error.message}"
            self._problems.setdefault("Slurm", CannotAsk(words, error.hint))
            return
        self._problems.pop("Slurm", None)
        for spec in specs:
            own = {job.number: job for job in jobs if (job.name, job.fence) == (self._name + spec.key, spec.fence)}
            whose = f"run {spec.run}"
            try:
                problem = self._bring_further(spec, own)
            except CannotAsk as error:
                problem = error
            if problem is None:
                self._problems.pop(whose, None)
            else:
                self._problems[whose] = problem

    def _bring_further(self, spec: StepSpec, own: Mapping[int, Job]) -> DropforgeError | None:
        """Submit, release, cancel or give up an attempt's job as is due; return why it will never begin, if so."""
        folder = Path(spec.root) / spec.folder
        names = listed(folder)
        note = durable.read_json(folder / JOB_NAME) if JOB_NAME in names else None
        mine = None if note is None else own.get(note["job"])
        for job in own.values():
            # A second one is of an answer that was lost; one of an attempt that has ended may outlive it.
            if (note is not None and job is not mine) or RESULT_NAME in names:
                self._scancel(job)
        if RESULT_NAME in names:
            return None
        if REVOKED_NAME in names:
            self._end_revoked(spec, names, mine)
            return None
        if note is None:
            if time.monotonic() >= self._again.get(spec.key, 0.0):
                self._again[spec.key] = time.monotonic() + _AGAIN_SECONDS
                note = {"job": min(own) if own else self._sbatch(spec), "fence": spec.fence, "released": False}
                durable.write_json(folder / JOB_NAME, note)
                self._release(folder, note)
            return self._problems.get(f"run {spec.run}")
        if not note["released"]:
            self._release(folder, note)
            return None
        return self._look_after(spec, note, names, mine)

    def _look_after(
        self, spec: StepSpec, note: dict[str, Any], names: set[str], job: Job | None
    ) -> DropforgeError | None:
        """Give up a released job that has ended without a result, or is gone; return why it never begins, if so."""
        state = "GONE" if job is None else job.state
        if state in _WAITING and CLAIM_NAME in names:
            state = "PUT BACK"  # the attempt is claimed, so the job would end at once
        if state in _WAITING | _RUNNING:
            self._missing.pop(spec.key, None)
            self._note_state(spec, note, job)
            if job is not None and state in _WAITING and job.reason == "JobHeldUser":
                self._ask("scontrol", "release", str(job.number))  # the first one was lost
            if job is not None and job.reason.startswith(_NEVER):
                return DropforgeError(
                    f"job {job.number} of step {spec.step} does not begin: {job.reason}",
                    f"change executor.slurm, or end the run: dropforge cancel {spec.run}",
                )
            return None
        since = self._missing.setdefault(spec.key, time.monotonic())
        if time.monotonic() - since >= GIVE_UP_SECONDS:
            self._give_up(spec, note["job"], state, job)
        return None

    def _give_up(self, spec: StepSpec, number: int, state: str, job: Job | None) -> None:
        """Revoke an attempt whose job ended in `state` without a result, and write the result."""
        folder = Path(spec.root) / spec.folder
        _mark(folder / REVOKED_NAME)
        where = f" on {job.nodes}" if job is not None and job.nodes else ""
        message, hint = f"Slurm ended job {number} of step {spec.step}{where}: {state}", ""
        status, code = "failed", EXIT_FAILED
        if state in _NOT_ITS_OWN or (state == "TIMEOUT" and self._has_new_checkpoint(spec)):
            status, code = "interrupted", EXIT_INTERRUPTED
        elif state == "TIMEOUT":
            code, hint = EXIT_BAD_DATA, f"raise executor.slurm.{spec.step}.time: it reached no checkpoint"
        elif state == "OUT_OF_MEMORY":
            code, hint = _KILLED, f"raise executor.slurm.{spec.step}.memory"
        else:
            hint = f"the whole story: dropforge logs {spec.run}"
        error = StepError(message=message, hint=hint)
        result = StepResult(key=spec.key, fence=spec.fence, status=status, exit_code=code, error=error)
        _write_first(folder / RESULT_NAME, result.model_dump())

    def _end_revoked(self, spec: StepSpec, names: set[str], job: Job | None) -> None:
        """Cancel a revoked attempt's job: at once if it has not begun, else after the time for a checkpoint."""
        since = self._cancelled.setdefault(spec.key, time.monotonic())
        begun = CLAIM_NAME in names
        if begun and time.monotonic() - since < spec.grace_seconds + _AGAIN_SECONDS:
            return
        if job is not None and job.state in _WAITING | _RUNNING:
            self._scancel(job)
        message = f"step {spec.step} was stopped before it could leave a result"
        error = StepError(message=message)
        result = StepResult(
            key=spec.key, fence=spec.fence, status="interrupted", exit_code=EXIT_INTERRUPTED, error=error
        )
        _write_first(Path(spec.root) / spec.folder / RESULT_NAME, result.model_dump())

    def _has_new_checkpoint(self, spec: StepSpec) -> bool:
        claim = durable.read_object(Path(spec.root) / spec.folder / CLAIM_NAME)
        return run_files.made_checkpoint(WorkFolder(Path(spec.root)), spec.run, int(claim.get("at", 0)))

    def _note_state(self, spec: StepSpec, note: dict[str, Any], job: Job | None) -> None:
        """Write the job's state, reason and nodes to its note, which `dropforge status` reads, if they changed."""
        if job is not None and (note.get("state"), note.get("reason"), note.get("nodes")) != job[3:]:
            told = {"state": job.state, "reason": job.reason, "nodes": job.nodes, "since": round(time.time() * 1000)}
            durable.write_hint(Path(spec.root) / spec.folder / JOB_NAME, {**note, **told})

    # --- Slurm's commands

    def _look(self) -> list[Job]:
        """Return this installation's jobs. Raises `CannotAsk`."""
        # Text, not JSON: its form has been the same for ten years, and it is a hundredth of the size.
        lines = self._ask("squeue", "--me", "--states=all", "--noheader", f"--format={_FORMAT}").splitlines()
        parts = [line.split("|") for line in lines]
        found = [(int(part[0]), *part[1:]) for part in parts if len(part) == len(Job._fields) and part[0].isdigit()]
        return [job for job in map(Job._make, found) if job.name.startswith(self._name)]

    def _sbatch(self, spec: StepSpec) -> int:
        """Submit the attempt's job, held, and return its number. Raises `CannotAsk`."""
        folder = Path(spec.root) / spec.folder
        argv = (*self._program, "--one", spec.key, spec.fence, "--state", spec.root)
        setup = f". {shlex.quote(self._settings.setup)}\n" if self._settings.setup else ""
        script = f"#!/bin/sh\n{setup}exec {shlex.join(argv)}\n"
        said = self._ask(
            *("sbatch", "--parsable", "--hold", "--no-requeue", "--export=NIL", "--open-mode=append"),
            *(f"--job-name={self._name}{spec.key}", f"--comment={spec.fence}", f"--chdir={folder}"),
            *(f"--output={LOG_NAME}", f"--signal=B:TERM@{round(spec.grace_seconds)}"),
            *self._settings.slurm.arguments(spec.step),
            stdin=script,
        )
        # "NUMBER" or "NUMBER;CLUSTER"; a site's wrapper may say more before it.
        number = said.strip().rpartition("\n")[2].partition(";")[0]
        if not number.isdigit():
            raise CannotAsk(f"sbatch said no job's number: {said.strip()[:200]}")
        log.info("job_submitted", key=spec.key, job=int(number))
        return int(number)

    def _release(self, folder: Path, note: dict[str, Any]) -> None:
        # Written first: from here on the job may run, and if it is gone it is lost, not to be submitted again.
        durable.write_json(folder / JOB_NAME, {**note, "released": True})
        self._ask("scontrol", "release", str(note["job"]))

    def _scancel(self, job: Job) -> None:
        if job.state in _WAITING | _RUNNING:
            with contextlib.suppress(CannotAsk):  # done at the next turn
                self._ask("scancel", "--me", f"--name={job.name}", str(job.number))

    def _ask(self, *command: str, stdin: str = "") -> str:
        """Return what a command of Slurm prints. Raises `CannotAsk` if it fails or takes more than 30 s."""
        try:
            done = subprocess.run(  # noqa: S603 - an argument list of our own, never a shell
                command, input=stdin, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotAsk(f"{command[0]}: {error}", "see whether Slurm runs: scontrol ping") from error
        if done.returncode:
            said = done.stderr.strip() or done.stdout.strip()
            raise CannotAsk(f"{command[0]}: {said[:500]}", "see whether Slurm runs: scontrol ping")
        return done.stdout


def _instance(root: Path) -> str:
    """Return the id of the installation in `root`, so that two of one user do not take each other's jobs."""
    path = root / _INSTANCE
    if not path.exists():
        durable.write_bytes(path, uuid.uuid4().hex[:8].encode())
    return path.read_text(encoding="ascii")


def _mark(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    durable.fsync_folder(path.parent)


def _write_first(path: Path, value: object) -> None:
    """Write a file unless it is there: the result of a process that was thought dead stays."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    durable.write_json(aside, value)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
            durable.fsync_folder(path.parent)
    finally:
        aside.unlink()
