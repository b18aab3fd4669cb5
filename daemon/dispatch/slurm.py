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
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from daemon.dispatch.node import claim, listed, write_first
from daemon.dispatch.spool import JobState, folder_of
from daemon.settings.model import ExecutorSettings
from daemon.state import run_files
from daemon.state.troubles import Troubles, in_words
from daemon.system.folders import StateFolder, WorkFolder
from daemon.system.slurm_commands import CannotAsk, ask, job_number
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
    StepResult,
    StepSpec,
)
from pipeline.errors import EXIT_BAD_DATA, EXIT_FAILED, EXIT_INTERRUPTED, DropforgeError

_PROGRAM = (sys.executable, "-P", "-m", "daemon", "worker")
#: An attempt without a result is given up once Slurm has not known its job, or called it ended, for so many seconds: a
#: controller may be starting, and a file system shows a new name late.
GIVE_UP_SECONDS = 120.0
_AGAIN_SECONDS = 30.0
_WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"})
_RUNNING = frozenset(
    {"CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"}
)
#: Reasons of a waiting job that no time removes.
_NEVER = (
    *("BadConstraints", "PartitionTimeLimit", "PartitionNodeLimit", "InvalidAccount", "InvalidQOS", "JobHeldAdmin"),
    *("launch failed", "job requeued in held"),
)
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


class SlurmExecutor:
    """Submits attempts to Slurm."""

    def __init__(
        self,
        folders: tuple[StateFolder, WorkFolder],
        settings: ExecutorSettings,
        troubles: Troubles,
        program: Sequence[str] = _PROGRAM,
    ) -> None:
        """
        Use the runs in the work folder, which the nodes see under the same path; problems go to `troubles`.

        A job runs `program --one KEY FENCE --state ROOT`. Raises `DropforgeError` if the work folder is another
        installation's, or not mounted.
        """
        root = folders[1]
        self._root, self._settings, self._troubles, self._program = root, settings, troubles, program
        self._name = f"dropforge-{_instance(*folders)}."
        #: The attempts that were submitted or polled and have no result yet, by key.
        self._open: dict[str, StepSpec] = {}
        #: Since when the thread has known that an attempt is revoked, by key.
        self._revoked: dict[str, float] = {}
        #: Since when Slurm does not know an attempt's job, or says that it has ended, by key.
        self._missing: dict[str, float] = {}
        self._again: dict[str, float] = {}
        #: An attempt's progress when its job was last seen ended or missing, by key.
        self._progress: dict[str, bytes | None] = {}
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
        """Return an attempt's state: `ENDED` once its result is listed, else whether it was claimed; never `LOST`."""
        self._show_problems()
        try:
            names = listed(Path(spec.root) / spec.folder)
        except OSError as error:  # the file system's server may be away for a while
            self._problems["the shared folder"] = DropforgeError(in_words(error), "jobs go on meanwhile")
            return JobState.RUNNING
        self._problems.pop("the shared folder", None)
        # A shared file system may list a name before it can be opened.
        if RESULT_NAME in names and (Path(spec.root) / spec.folder / RESULT_NAME).exists():
            self._forget(spec)
            return JobState.ENDED
        self._watch(spec)
        return JobState.RUNNING if CLAIM_NAME in names else JobState.QUEUED

    def cancel(self, key: str) -> None:
        """Revoke an attempt: its step is stopped wherever it runs, and its job cancelled after the time for that."""
        spec = self._open.get(key)
        if spec is not None:
            step = f"step {spec.step} was stopped before it could leave a result"
            write_first(self._root / spec.folder / REVOKED_NAME, _ended(spec, "interrupted", EXIT_INTERRUPTED, step))
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

    def _forget(self, spec: StepSpec) -> None:
        for known in (self._open, self._missing, self._revoked, self._again, self._progress):
            known.pop(spec.key, None)
        self._problems.pop(f"run {spec.run}", None)

    def _show_problems(self) -> None:
        """Note the thread's problems as troubles, and clear those that are over."""
        problems = dict(self._problems)
        for whose in self._shown - problems.keys():
            self._troubles.clear(whose)
        for whose, error in problems.items():
            words = "; ".join(filter(None, (in_words(error), error.hint)))
            self._troubles.note(whose, DropforgeError(words), message=True)
        self._shown = set(problems)

    # --- the thread

    def _serve(self) -> None:
        while not self._over.is_set():
            self._wake.wait(self._settings.poll_seconds)
            self._wake.clear()
            self._turn()

    def _turn(self) -> None:
        """Look at all jobs once, then bring each open attempt's job a step further."""
        try:
            jobs = self._look()
        except CannotAsk as error:
            # What was missing may be there again when Slurm answers.
            self._missing.clear()
            words = f"Slurm has not answered since {time.strftime('%H:%M')}, jobs go on: {error.message}"
            self._problems.setdefault("Slurm", CannotAsk(words, "see whether it runs: scontrol ping"))
            return
        self._problems.pop("Slurm", None)
        specs = list(self._open.values())
        for spec in specs:
            if self._over.is_set():
                return
            own = {job.number: job for job in jobs if (job.name, job.fence) == (self._name + spec.key, spec.fence)}
            whose = f"run {spec.run}"
            try:
                problem = self._bring_further(spec, own)
            except Exception as error:  # noqa: BLE001 - an attempt's trouble must not stop the others
                problem = error if isinstance(error, DropforgeError) else DropforgeError(in_words(error))
            if problem is None:
                self._problems.pop(whose, None)
            elif spec.key in self._open:
                self._problems[whose] = problem
        self._sweep(jobs, {self._name + spec.key for spec in specs})

    def _sweep(self, jobs: Sequence[Job], open_names: Collection[str]) -> None:
        """Cancel the waiting jobs of attempts that have ended: nobody polls them any more."""
        for job in jobs:
            if job.name not in open_names and job.state in _WAITING:
                with contextlib.suppress(OSError, ValueError):
                    if {RESULT_NAME, REVOKED_NAME} & listed(self._root / folder_of(job.name.removeprefix(self._name))):
                        self._scancel(job)

    def _bring_further(self, spec: StepSpec, own: Mapping[int, Job]) -> DropforgeError | None:
        """Submit, release, cancel or give up an attempt's job as is due; return why it will never begin, if so."""
        folder = Path(spec.root) / spec.folder
        names = listed(folder)
        if SPEC_NAME not in names:
            return None  # the folder is gone
        note = durable.read_json(folder / JOB_NAME) if JOB_NAME in names else None
        if REVOKED_NAME in names and RESULT_NAME not in names:
            self._end_revoked(spec, names, own)
            return None
        for job in own.values():
            if note is not None and job.number != note["job"]:
                self._scancel(job)  # a second one, of an answer that was lost
        if RESULT_NAME in names:
            return None
        if note is not None and note["released"]:
            return self._look_after(spec, note, names, own.get(note["job"]))
        if note is None:
            if time.monotonic() < self._again.get(spec.key, 0.0):
                return self._problems.get(f"run {spec.run}")
            self._again[spec.key] = time.monotonic() + _AGAIN_SECONDS
            note = {"job": min(own) if own else self._sbatch(spec), "released": False}
            durable.write_json(folder / JOB_NAME, note)
        # Written first: from here on the job may run, and if it is gone it is lost, not to be submitted again.
        durable.write_json(folder / JOB_NAME, {**note, "released": True})
        self._ask("scontrol", "release", str(note["job"]))
        return None

    def _look_after(
        self, spec: StepSpec, note: dict[str, Any], names: set[str], job: Job | None
    ) -> DropforgeError | None:
        """Revoke a released attempt whose job has ended without a result, or is gone; return why it never begins."""
        state = "GONE" if job is None else job.state
        if state in _WAITING and CLAIM_NAME in names:
            state = "PUT BACK"  # the attempt is claimed, so the job would end at once
        if job is not None and state in _WAITING | _RUNNING:
            self._missing.pop(spec.key, None)
            self._note_state(spec, job)
            if state in _WAITING and job.reason == "JobHeldUser":
                self._ask("scontrol", "release", str(job.number))  # the first one was lost
            if job.reason.startswith(_NEVER):
                return DropforgeError(
                    f"job {job.number} of step {spec.step} does not begin: {job.reason}",
                    f"change executor.slurm, or end the run: dropforge cancel {spec.run}",
                )
            return None
        # Slurm may have launched the job twice: the copy that was refused has ended, the other one works.
        progress = None if PROGRESS_NAME not in names else (Path(spec.root) / spec.folder / PROGRESS_NAME).read_bytes()
        if progress != self._progress.get(spec.key):
            self._progress[spec.key] = progress
            self._missing.pop(spec.key, None)
        since = self._missing.setdefault(spec.key, time.monotonic())
        if time.monotonic() - since >= GIVE_UP_SECONDS:
            self._revoke(spec, note["job"], state, job)
        return None

    def _revoke(self, spec: StepSpec, number: int, state: str, job: Job | None) -> None:
        """Revoke an attempt whose job ended in `state` without a result."""
        where = f" on {job.nodes}" if job is not None and job.nodes else ""
        words = f"Slurm ended job {number} of step {spec.step}{where}: {state}"
        hint, status, code = f"the whole story: dropforge logs {spec.run}", "failed", EXIT_FAILED
        if state == "OUT_OF_MEMORY":
            code, hint = _KILLED, f"raise executor.slurm.{spec.step}.memory"
        elif state == "TIMEOUT" and spec.step == "train" and not self._has_new_checkpoint(spec):
            code, hint = EXIT_BAD_DATA, f"raise executor.slurm.{spec.step}.time: it reached no checkpoint"
        elif state != "FAILED":
            status, code = "interrupted", EXIT_INTERRUPTED
        write_first(Path(spec.root) / spec.folder / REVOKED_NAME, _ended(spec, status, code, words, hint))

    def _end_revoked(self, spec: StepSpec, names: set[str], own: Mapping[int, Job]) -> None:
        """Write a revoked attempt's result: at once if nobody has claimed it, else after the time for a checkpoint."""
        folder = Path(spec.root) / spec.folder
        since = self._revoked.setdefault(spec.key, time.monotonic())
        # Claimed here, it can be begun by nobody any more.
        begun = CLAIM_NAME in names or not claim(folder)
        if begun and time.monotonic() - since < spec.grace_seconds + _AGAIN_SECONDS:
            return
        for job in own.values():
            self._scancel(job)
        write_first(folder / RESULT_NAME, durable.read_json(folder / REVOKED_NAME))

    def _has_new_checkpoint(self, spec: StepSpec) -> bool:
        at = durable.read_object(Path(spec.root) / spec.folder / CLAIM_NAME).get("at")
        return isinstance(at, int) and run_files.made_checkpoint(WorkFolder(Path(spec.root)), spec.run, at)

    def _note_state(self, spec: StepSpec, job: Job) -> None:
        """Write the job's state, since when, reason and nodes to a hint for `dropforge status`, if they changed."""
        path = Path(spec.root) / spec.folder / JOB_STATE_NAME
        told = {"job": job.number, "state": job.state, "reason": job.reason, "nodes": job.nodes}
        known = durable.read_object(path)
        if {name: known.get(name) for name in told} != told:
            since = known["since"] if known.get("state") == job.state else round(time.time() * 1000)
            durable.write_hint(path, {**told, "since": since})

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
        number = job_number(said)
        log.info("job_submitted", key=spec.key, job=number)
        return number

    def _scancel(self, job: Job) -> None:
        if job.state in _WAITING | _RUNNING:
            with contextlib.suppress(CannotAsk):  # done at the next turn
                self._ask("scancel", "--me", f"--name={job.name}", str(job.number))

    def _ask(self, *command: str, stdin: str = "") -> str:
        return ask(*command, stdin=stdin)


def _instance(state_folder: StateFolder, work_folder: WorkFolder) -> str:
    """Return the installation's id, which is kept in both folders, so that no two take each other's jobs."""
    paths = [folder / _INSTANCE for folder in dict.fromkeys((state_folder, work_folder))]
    known = {path.read_text(encoding="ascii") for path in paths if path.exists()}
    if not known:
        known = {uuid.uuid4().hex[:8]}
        for path in paths:
            durable.write_bytes(path, next(iter(known)).encode())
    elif len(known) > 1 or not all(path.exists() for path in paths):
        message = f"the folder {work_folder} is not this installation's: {paths[-1]} is missing or has another id"
        raise DropforgeError(message, "mount the shared folder, or name the right one: executor.shared")
    return known.pop()


def _ended(spec: StepSpec, status: str, code: int, message: str, hint: str = "") -> dict[str, Any]:
    error = {"message": message, "hint": hint}
    told = {"key": spec.key, "fence": spec.fence, "status": status, "exit_code": code, "error": error}
    return StepResult.model_validate(told).model_dump()
