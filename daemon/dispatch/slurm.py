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
import shlex
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from daemon.dispatch.attempt import claim, end_revoked, folder_of, listed, write_spec
from daemon.dispatch.spool import JobState
from daemon.settings.model import ExecutorSettings
from daemon.state.troubles import Troubles, in_words
from daemon.system.folders import WorkFolder
from daemon.system.slurm_commands import CannotAsk, ask, is_number, job_number
from pipeline import durable
from pipeline.contract import (
    CLAIM_NAME,
    JOB_NAME,
    JOB_STATE_NAME,
    LOG_NAME,
    PROGRESS_NAME,
    RESULT_NAME,
    REVOKED_NAME,
    SPEC_NAME,
    StepError,
    StepResult,
    StepSpec,
)
from pipeline.errors import EXIT_FAILED, EXIT_INTERRUPTED, DropforgeError

_PROGRAM = (sys.executable, "-P", "-m", "daemon", "worker")
#: An attempt without a result is given up once Slurm has not known its job, or called it ended, for so many seconds: a
#: controller may be starting, and a file system shows a new name late.
GIVE_UP_SECONDS = 120.0
_AGAIN_SECONDS = 30.0
#: A command that fails after so many seconds has waited for the controller in vain.
_NO_ANSWER_SECONDS = 5.0
_WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"})
_RUNNING = frozenset(
    {"CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"}
)
#: Reasons of a waiting job that do not pass by themselves.
_NEVER = (
    *("BadConstraints", "PartitionTimeLimit", "PartitionNodeLimit", "InvalidAccount", "InvalidQOS", "JobHeldAdmin"),
    *("launch failed", "job requeued in held"),
)
_KILLED = 137
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


@dataclass
class _Known:
    """What is known of an attempt beside its files; times are on the monotonic clock, in seconds."""

    spec: StepSpec
    #: Since when the thread has known that it is revoked.
    revoked_at: float | None = None
    #: Since when Slurm does not know its job or says that it has ended, and its progress then.
    missing_since: float | None = None
    progress: bytes | None = None
    #: When sbatch is tried again, and why it refused.
    retry_at: float = 0.0
    refusal: CannotAsk | None = None


class SlurmExecutor:
    """Submits attempts to Slurm."""

    def __init__(
        self,
        instance: str,
        work_folder: WorkFolder,
        settings: ExecutorSettings,
        troubles: Troubles,
        program: Sequence[str] = _PROGRAM,
    ) -> None:
        """
        Use the runs in `work_folder`, which the nodes see under the same path; problems go to `troubles`.

        `instance` is the installation's id. A job runs `program --one KEY FENCE --state ROOT`.
        """
        self._root, self._settings, self._troubles, self._program = work_folder, settings, troubles, program
        self._name = f"dropforge-{instance}."
        #: The attempts that were submitted or polled and have no result yet, by key.
        self._known: dict[str, _Known] = {}
        #: The keys of cancelled attempts: a job of theirs is cancelled once nobody polls the attempt.
        self._given_up: set[str] = set()
        #: The troubles that the thread has noted.
        self._noted: set[str] = set()
        self._silent_since = ""
        self._wake, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._serve, name="slurm", daemon=True)
        self._thread.start()

    # --- called by the main loop; they read and write files only

    def submit(self, spec: StepSpec) -> None:
        """Write the attempt's spec.json and have its job submitted; do nothing if it has a result."""
        if write_spec(spec):
            self._watch(spec)

    def poll(self, spec: StepSpec) -> JobState:
        """
        Return an attempt's state: `ENDED` once its result is listed, else whether it was claimed; never `LOST`.

        Raises `OSError` while the shared file system does not answer.
        """
        names = listed(Path(spec.root) / spec.folder)
        # A shared file system may list a name before it can be opened.
        if RESULT_NAME in names and (Path(spec.root) / spec.folder / RESULT_NAME).exists():
            self._forget(spec.key)
            return JobState.ENDED
        self._watch(spec)
        return JobState.RUNNING if CLAIM_NAME in names else JobState.QUEUED

    def cancel(self, key: str) -> None:
        """
        Revoke an attempt: its step is stopped wherever it runs, and its job cancelled after the time for that.

        An attempt that is not claimed ends at once. Without a usable spec only the job is cancelled. Raises `OSError`
        or `ValueError` if its files cannot be read or written.
        """
        folder = self._root / folder_of(key)
        self._given_up.add(key)
        self._wake.set()
        try:
            if {REVOKED_NAME, RESULT_NAME} & listed(folder):
                return
            durable.write_json(folder / REVOKED_NAME, {}, first=True)
            known = self._known.get(key)
            spec = known.spec if known else StepSpec.model_validate_json(durable.read_regular(folder / SPEC_NAME))
            if claim(folder):  # nobody can begin it any more
                end_revoked(spec)
            self._watch(spec)
        except (OSError, ValueError):
            self._forget(key)  # its job is cancelled all the same
            raise

    def stop(self) -> None:
        """End the thread; the jobs go on, and the next process finds them."""
        self._over.set()
        self._wake.set()
        self._thread.join()

    def _watch(self, spec: StepSpec) -> None:
        if spec.key not in self._known:
            self._known[spec.key] = _Known(spec)
            self._wake.set()

    def _forget(self, key: str) -> None:
        self._known.pop(key, None)

    # --- the thread

    def _serve(self) -> None:
        while not self._over.is_set():
            self._wake.wait(self._settings.poll_seconds)
            self._wake.clear()
            try:
                self._turn()
            except Exception as error:  # noqa: BLE001 - as when the log's disk is full: the thread must outlive it
                self._noted.add("Slurm")
                with contextlib.suppress(Exception):
                    self._troubles.note("Slurm", error)

    def _turn(self) -> None:
        """Look at all jobs once, advance each open attempt's job, and note what is wrong as troubles."""
        problems: dict[str, Exception] = {}
        try:
            jobs = self._look()
            self._silent_since = ""
            watched = tuple(self._known.values())
            for known in watched:
                if self._over.is_set():
                    return
                problem = self._problem_of(known, jobs)
                if problem is not None and known.spec.key in self._known:
                    problems[f"run {known.spec.run}"] = problem
            self._sweep(jobs, {self._name + known.spec.key for known in watched})
        except CannotAsk as error:
            for known in tuple(self._known.values()):
                known.missing_since = None  # it may be there again when Slurm answers
                with contextlib.suppress(OSError):
                    self._end_revoked(known, listed(Path(known.spec.root) / known.spec.folder), {})
            self._silent_since = self._silent_since or time.strftime("%H:%M")
            words = f"Slurm has not answered since {self._silent_since}, jobs go on: {error.message}"
            problems["Slurm"] = DropforgeError(f"{words}; see whether it runs: scontrol ping")
        over, self._noted = self._noted - problems.keys(), set(problems)
        for whose in over:
            self._troubles.clear(whose)
        for whose, problem in problems.items():
            self._troubles.note(whose, problem, message=True)

    def _problem_of(self, known: _Known, jobs: Sequence[Job]) -> Exception | None:
        """Advance an attempt's job and return what keeps it. Raises `CannotAsk` if Slurm does not answer any more."""
        spec = known.spec
        own_jobs = {job.number: job for job in jobs if (job.name, job.fence) == (self._name + spec.key, spec.fence)}
        began = time.monotonic()
        try:
            problem: Exception | None = self._advance(known, own_jobs)
        except Exception as error:  # an attempt's trouble must not stop the others
            if isinstance(error, CannotAsk) and time.monotonic() - began > _NO_ANSWER_SECONDS:
                raise
            problem = error
        hint = problem.hint if isinstance(problem, DropforgeError) else ""
        return DropforgeError(f"{in_words(problem)}; {hint}") if problem is not None and hint else problem

    def _sweep(self, jobs: Sequence[Job], open_names: Collection[str]) -> None:
        """Cancel the jobs of cancelled attempts, and the waiting ones of others that have ended: nobody polls them."""
        for job in jobs:
            key = job.name.removeprefix(self._name)
            if job.name not in open_names and (key in self._given_up or job.state in _WAITING):
                with contextlib.suppress(OSError, ValueError, CannotAsk):
                    if key in self._given_up or {RESULT_NAME, REVOKED_NAME} & listed(self._root / folder_of(key)):
                        self._scancel(job)

    def _advance(self, known: _Known, own_jobs: Mapping[int, Job]) -> DropforgeError | None:
        """Submit, release, cancel or give up an attempt's job as is due; return why it will never begin, if so."""
        spec = known.spec
        folder = Path(spec.root) / spec.folder
        names = listed(folder)
        if SPEC_NAME not in names or self._end_revoked(known, names, own_jobs):
            return None
        note = durable.read_json(folder / JOB_NAME) if JOB_NAME in names else None
        for job in own_jobs.values():
            if note is not None and job.number != note["job"]:
                self._scancel(job)  # a second one, of an answer that was lost
        if RESULT_NAME in names:
            if REVOKED_NAME in names:
                self._forget(spec.key)  # perhaps nobody polls it any more
            return None
        if note is not None and note["released"]:
            return self._look_after(known, note, names, own_jobs.get(note["job"]))
        if note is None:
            if not own_jobs and time.monotonic() < known.retry_at:
                return known.refusal
            note = {"job": min(own_jobs) if own_jobs else self._sbatch(known), "released": False}
            durable.write_json(folder / JOB_NAME, note)
        # Written first: from here on the job may run, and if it is gone it is lost, not to be submitted again.
        durable.write_json(folder / JOB_NAME, {**note, "released": True})
        ask("scontrol", "release", str(note["job"]))
        return None

    def _look_after(
        self, known: _Known, note: dict[str, Any], names: set[str], job: Job | None
    ) -> DropforgeError | None:
        """Revoke a released attempt whose job has ended without a result, or is gone; return why it never begins."""
        spec, state = known.spec, "GONE" if job is None else job.state
        if state in _WAITING and CLAIM_NAME in names:
            state = "PUT BACK"  # the attempt is claimed, so the job would end at once
        if job is not None and state in _WAITING | _RUNNING:
            known.missing_since = None
            self._note_state(spec, job)
            if state in _WAITING and job.reason == "JobHeldUser":
                ask("scontrol", "release", str(job.number))  # the first one was lost
            if job.reason.startswith(_NEVER):
                return DropforgeError(
                    f"job {job.number} of step {spec.step} does not begin: {job.reason}",
                    f"change executor.slurm, or end the run: dropforge cancel {spec.run}",
                )
            return None
        self._note_state(spec, job or Job(note["job"], "", "", state, "", ""))
        # Slurm may have launched the job twice: the copy that was refused has ended, the other one works.
        progress = (
            None if PROGRESS_NAME not in names else durable.read_regular(Path(spec.root) / spec.folder / PROGRESS_NAME)
        )
        if known.missing_since is None or progress != known.progress:
            known.missing_since, known.progress = time.monotonic(), progress
        if time.monotonic() - known.missing_since >= GIVE_UP_SECONDS:
            where = f" on {job.nodes}" if job is not None and job.nodes else ""
            words = f"Slurm ended job {note['job']} of step {spec.step}{where}: {state}"
            hint = f"the whole story: dropforge logs {spec.run}"
            status, code = "interrupted", EXIT_INTERRUPTED
            if state == "FAILED":
                status, code = "failed", EXIT_FAILED
            elif state == "OUT_OF_MEMORY":
                status, code, hint = "failed", _KILLED, f"raise executor.slurm.{spec.step}.memory"
            _revoke(spec, status, code, StepError(message=words, hint=hint))
        return None

    def _end_revoked(self, known: _Known, names: set[str], own_jobs: Mapping[int, Job]) -> bool:
        """
        Write a revoked attempt's result: at once if nobody has claimed it, else after the time for a checkpoint.

        Return whether it is revoked and had none.
        """
        if REVOKED_NAME not in names or RESULT_NAME in names:
            return False
        spec = known.spec
        folder = Path(spec.root) / spec.folder
        known.revoked_at = known.revoked_at or time.monotonic()
        # Claimed here, it can be begun by nobody any more.
        begun = CLAIM_NAME in names or not claim(folder)
        if not begun or time.monotonic() - known.revoked_at >= spec.grace_seconds + _AGAIN_SECONDS:
            for job in own_jobs.values():
                self._scancel(job)
            end_revoked(spec)
        return True

    def _note_state(self, spec: StepSpec, job: Job) -> None:
        """Write the job's state, since when, reason and nodes to a hint for `dropforge status`, if they changed."""
        path = Path(spec.root) / spec.folder / JOB_STATE_NAME
        fields = {"job": job.number, "state": job.state, "reason": job.reason, "nodes": job.nodes}
        known = durable.read_object(path)
        if {name: known.get(name) for name in fields} != fields:
            since = known["since"] if known.get("state") == job.state else round(time.time() * 1000)
            durable.write_hint(path, {**fields, "since": since})

    # --- Slurm's commands

    def _look(self) -> list[Job]:
        """Return this installation's jobs. Raises `CannotAsk`."""
        # Text, not JSON: its form has been the same for ten years, and it is a hundredth of the size.
        lines = ask("squeue", "--me", "--states=all", "--noheader", f"--format={_FORMAT}").splitlines()
        parts = [line.split("|") for line in lines]
        rows = [(int(part[0]), *part[1:]) for part in parts if len(part) == len(Job._fields) and is_number(part[0])]
        return [job for job in map(Job._make, rows) if job.name.startswith(self._name)]

    def _sbatch(self, known: _Known) -> int:
        """Submit the attempt's job, held, and return its number. Raises `CannotAsk`."""
        spec = known.spec
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
        try:
            number = job_number(ask("sbatch", *options, stdin=script))
        except CannotAsk as error:
            known.retry_at, known.refusal = time.monotonic() + _AGAIN_SECONDS, error
            raise
        log.info("job_submitted", key=spec.key, job=number)
        return number

    def _scancel(self, job: Job) -> None:
        """Cancel a job that has not ended. Raises `CannotAsk`."""
        if job.state in _WAITING | _RUNNING:
            ask("scancel", "--me", f"--name={job.name}", str(job.number))


def _revoke(spec: StepSpec, status: str, code: int, error: StepError) -> None:
    """Write that nobody is to work on the attempt any more, and its result should it leave none."""
    fields = {"key": spec.key, "fence": spec.fence, "status": status, "exit_code": code, "error": error}
    durable.write_json(
        Path(spec.root) / spec.folder / REVOKED_NAME, StepResult.model_validate(fields).model_dump(), first=True
    )
