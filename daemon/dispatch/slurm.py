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
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from daemon.dispatch.attempt import claim, end_revoked, folder_of, listed, write_spec
from daemon.dispatch.slurm_jobs import NEVER, RUNNING, WAITING, WORKER, Job, SlurmJobs, note_state, release
from daemon.dispatch.spool import JobState
from daemon.settings.sections import ExecutorSettings
from daemon.state.troubles import Troubles, in_words
from daemon.system.folders import WorkFolder
from daemon.system.slurm_commands import CannotAsk
from pipeline import durable
from pipeline.contract import (
    CLAIM_NAME,
    JOB_NAME,
    PROGRESS_NAME,
    RESULT_NAME,
    REVOKED_NAME,
    SPEC_NAME,
    StepError,
    StepResult,
    StepSpec,
)
from pipeline.errors import EXIT_FAILED, EXIT_INTERRUPTED, DropforgeError

#: An attempt without a result is given up once Slurm has not known its job, or called it ended, for so many seconds: a
#: controller may be starting, and a file system shows a new name late.
GIVE_UP_SECONDS = 120.0
_AGAIN_SECONDS = 30.0
#: A command that fails after so many seconds has waited for a controller that does not answer.
_NO_ANSWER_SECONDS = 5.0
#: The exit codes for the states of a job that count as failures of its step.
_EXIT_CODES = {"FAILED": EXIT_FAILED, "OUT_OF_MEMORY": 137}
log = structlog.get_logger()


@dataclass
class _Known:
    """What the thread remembers of an attempt in addition to its files; times are monotonic, in seconds."""

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
        program: Sequence[str] = WORKER,
    ) -> None:
        """
        Start the thread; the nodes see `work_folder` under the same path; problems go to `troubles`.

        `instance` and `program` are those of `SlurmJobs`.
        """
        self._root, self._troubles, self._poll_seconds = work_folder, troubles, settings.poll_seconds
        self._jobs = SlurmJobs(instance, settings, program)
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
        Return an attempt's state: `ENDED` once its result can be opened, else `RUNNING` if it is claimed, or `QUEUED`.

        The thread then advances its job until it ends. Raises `OSError` while the shared file system does not answer.
        """
        names = listed(Path(spec.root) / spec.folder)
        # A shared file system may list a name before it can be opened.
        if RESULT_NAME in names and (Path(spec.root) / spec.folder / RESULT_NAME).exists():
            self._known.pop(spec.key, None)
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
            self._known.pop(key, None)  # its job is cancelled all the same
            raise

    def stop(self) -> None:
        """End the thread, once its command has ended; the jobs go on, and the next process finds them."""
        self._over.set()
        self._wake.set()
        self._thread.join()

    def _watch(self, spec: StepSpec) -> None:
        if spec.key not in self._known:
            self._known[spec.key] = _Known(spec)
            self._wake.set()

    # --- the thread

    def _serve(self) -> None:
        while not self._over.is_set():
            self._wake.wait(self._poll_seconds)
            self._wake.clear()
            try:
                self._turn()
            except Exception as error:  # noqa: BLE001 - as when the log's disk is full: the thread must outlive it
                self._noted.add("Slurm")
                with contextlib.suppress(Exception):
                    self._troubles.note("Slurm", error)

    def _turn(self) -> None:
        """List the jobs, advance each open attempt's, note troubles; without an answer, only end revoked attempts."""
        problems: dict[str, Exception] = {}
        try:
            jobs = self._jobs.listed()
            self._silent_since = ""
            watched = tuple(self._known.values())
            for known in watched:
                if self._over.is_set():
                    return
                problem = self._problem_of(known, jobs)
                if problem is not None and known.spec.key in self._known:
                    problems[f"run {known.spec.run}"] = problem
            self._sweep(jobs, {known.spec.key for known in watched})
        except CannotAsk as error:
            for known in tuple(self._known.values()):
                known.missing_since = None  # it may be there again when Slurm answers
                with contextlib.suppress(OSError):
                    self._end_revoked(known, listed(Path(known.spec.root) / known.spec.folder), {})
            self._silent_since = self._silent_since or time.strftime("%H:%M")
            words = f"Slurm has not answered since {self._silent_since}, jobs go on: {error.message}"
            problems["Slurm"] = DropforgeError(f"{words}; see whether it runs: scontrol ping")
        noted, self._noted = self._noted, set(problems)
        for whose in noted | self._noted:
            self._troubles.note(whose, problems.get(whose), message=True)

    def _problem_of(self, known: _Known, jobs: Sequence[Job]) -> Exception | None:
        """Advance an attempt's job; return the error that blocks it, or `None`. Raises a `CannotAsk` that took 5 s."""
        of_attempt = {job.number: job for job in jobs if (job.key, job.fence) == (known.spec.key, known.spec.fence)}
        began = time.monotonic()
        try:
            problem: Exception | None = self._advance(known, of_attempt)
        except Exception as error:  # an attempt's trouble must not stop the others
            if isinstance(error, CannotAsk) and time.monotonic() - began > _NO_ANSWER_SECONDS:
                raise
            problem = error
        hint = problem.hint if isinstance(problem, DropforgeError) else ""
        return DropforgeError(f"{in_words(problem)}; {hint}") if problem is not None and hint else problem

    def _sweep(self, jobs: Sequence[Job], watched: Collection[str]) -> None:
        """Of jobs not `watched`, cancel those of cancelled attempts and waiting ones of ended ones; ignore errors."""
        for job in jobs:
            is_given_up = job.key in self._given_up
            if job.key not in watched and (is_given_up or job.state in WAITING):
                with contextlib.suppress(OSError, ValueError, CannotAsk):
                    if is_given_up or {RESULT_NAME, REVOKED_NAME} & listed(self._root / folder_of(job.key)):
                        self._jobs.cancel(job)

    def _advance(self, known: _Known, jobs: Mapping[int, Job]) -> DropforgeError | None:
        """Submit, release, cancel or give up an attempt's job as is due; return or raise why it waits, else `None`."""
        spec = known.spec
        folder = Path(spec.root) / spec.folder
        names = listed(folder)
        if SPEC_NAME not in names or self._end_revoked(known, names, jobs):
            return None
        note = durable.read_json(folder / JOB_NAME) if JOB_NAME in names else None
        for job in jobs.values():
            if note is not None and job.number != note["job"]:
                self._jobs.cancel(job)  # a second one, of an answer that was lost
        if RESULT_NAME in names:
            self._known.pop(spec.key, None)  # perhaps nobody polls it any more
            return None
        if note is not None and note["released"]:
            gone = Job(note["job"], spec.key, spec.fence, "GONE", "", "")
            return self._look_after(known, names, jobs.get(note["job"], gone))
        if note is None:
            if not jobs and time.monotonic() < known.retry_at:
                return known.refusal
            note = {"job": min(jobs) if jobs else self._submit_job(known), "released": False}
            durable.write_json(folder / JOB_NAME, note)
        # Written first: from here on the job may run, and if it is gone it is lost, not to be submitted again.
        durable.write_json(folder / JOB_NAME, {**note, "released": True})
        release(note["job"])
        return None

    def _submit_job(self, known: _Known) -> int:
        try:
            return self._jobs.submit(known.spec)
        except CannotAsk as error:
            known.retry_at, known.refusal = time.monotonic() + _AGAIN_SECONDS, error
            raise

    def _look_after(self, known: _Known, names: set[str], job: Job) -> DropforgeError | None:
        """Note a job's state, release it, or revoke it `GIVE_UP_SECONDS` after it went; return why it never begins."""
        spec, state = known.spec, job.state
        note_state(spec, job)
        if state in WAITING and CLAIM_NAME in names:
            state = "PUT BACK"  # the attempt is claimed, so the job would end at once
        if state in WAITING | RUNNING:
            known.missing_since = None
            if state in WAITING and job.reason == "JobHeldUser":
                release(job.number)  # the first one was lost
            if job.reason.startswith(NEVER):
                return DropforgeError(
                    f"job {job.number} of step {spec.step} does not begin: {job.reason}",
                    f"change executor.slurm, or end the run: dropforge cancel {spec.run}",
                )
            return None
        # Slurm may have launched the job twice: the copy that was refused has ended, the other one works.
        folder = Path(spec.root) / spec.folder
        progress = durable.read_regular(folder / PROGRESS_NAME) if PROGRESS_NAME in names else None
        if known.missing_since is None or progress != known.progress:
            known.missing_since, known.progress = time.monotonic(), progress
        if time.monotonic() - known.missing_since >= GIVE_UP_SECONDS:
            where = f" on {job.nodes}" if job.nodes else ""
            words = f"Slurm ended job {job.number} of step {spec.step}{where}: {state}"
            hint = f"the whole story: dropforge logs {spec.run}"
            if state == "OUT_OF_MEMORY":
                hint = f"raise executor.slurm.{spec.step}.memory"
            code, error = _EXIT_CODES.get(state, EXIT_INTERRUPTED), StepError(message=words, hint=hint)
            status: Literal["failed", "interrupted"] = "failed" if state in _EXIT_CODES else "interrupted"
            result = StepResult(key=spec.key, fence=spec.fence, status=status, exit_code=code, error=error)
            # Nobody is to work on it any more, and this is its result should it leave none.
            durable.write_json(folder / REVOKED_NAME, result.model_dump(), first=True)
        return None

    def _end_revoked(self, known: _Known, names: set[str], jobs: Mapping[int, Job]) -> bool:
        """
        Cancel a revoked attempt's jobs and write its result: at once if unclaimed, else 30 s after its grace time.

        Return `True`, perhaps before that time, if it is revoked and had no result; else `False`, with nothing done.
        """
        if REVOKED_NAME not in names or RESULT_NAME in names:
            return False
        spec = known.spec
        folder = Path(spec.root) / spec.folder
        known.revoked_at = known.revoked_at or time.monotonic()
        # Claimed here, it can be begun by nobody any more.
        begun = CLAIM_NAME in names or not claim(folder)
        if not begun or time.monotonic() - known.revoked_at >= spec.grace_seconds + _AGAIN_SECONDS:
            for job in jobs.values():
                self._jobs.cancel(job)
            end_revoked(spec)
        return True
