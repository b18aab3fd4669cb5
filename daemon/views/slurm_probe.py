"""Check that jobs can run on the Slurm cluster of the settings, by its commands and by a job on a node."""

import contextlib
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from daemon.settings.model import Settings
from daemon.settings.sections import ExecutorSettings
from daemon.system.slurm_commands import CannotAsk, ask, job_number
from daemon.views.preflight import Finding, bad, ok, warn
from pipeline.contract import GRACE_SECONDS
from pipeline.durable import read_object
from pipeline.words import count

_COMMANDS = ("sbatch", "squeue", "scancel", "scontrol")
_MOST_SECONDS, _LOOK_SECONDS, _MOST_SKEW_SECONDS = 60.0, 0.5, 5.0
_GOES_ON = frozenset({"", "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "COMPLETED"})
#: What the job runs, in the probe's folder; by a hard link, as results are written.
_PROGRAM = """
import importlib, json, os, time
answer = {"uid": os.getuid(), "token": open("token").read(), "missing": {}}
for name in ("daemon", "torch"):
    try:
        module = importlib.import_module(name)
    except Exception as error:
        answer["missing"][name] = f"{type(error).__name__}: {error}"
if "torch" not in answer["missing"]:
    answer |= {"torch": module.__version__, "cards": module.cuda.device_count()}
answer["time"] = time.time()
json.dump(answer, open("answer.tmp", "w"))
os.link("answer.tmp", "answer.json")
"""


def slurm(settings: Settings) -> Iterator[Finding]:
    """Yield findings from Slurm's commands and from a job, a minute at most; none unless the settings use Slurm."""
    if settings.executor.kind != "slurm":
        return
    missing = [name for name in _COMMANDS if shutil.which(name) is None]
    if missing:
        yield bad("Slurm", f"its commands are not there: {', '.join(missing)}", "install Slurm's client commands here")
        return
    try:
        ask("scontrol", "ping")
        config = ask("scontrol", "show", "config")
    except CannotAsk as error:
        yield bad("Slurm", error.message, "see whether slurmctld and munged run, and SLURM_CONF if it is set")
        return
    yield ok("Slurm", "its controller answers")
    wait = re.search(r"KillWait\s*=\s*(\d+)", config)
    if wait is not None and int(wait[1]) < GRACE_SECONDS:
        yield warn(
            "KillWait",
            f"Slurm kills a job {wait[1]} s after its signal to stop; a step may take {GRACE_SECONDS:g} s to save",
            f"set KillWait={GRACE_SECONDS:g} in slurm.conf, or a step may lose what it did since its last checkpoint",
        )
    if not settings.work_folder.is_dir():
        yield warn("probe job", f"{settings.work_folder} is not there yet", "start the daemon: dropforge run")
        return
    # A name that gc removes, should this process be killed.
    with tempfile.TemporaryDirectory(
        prefix=".probe-", suffix=".tmp", dir=settings.work_folder, ignore_cleanup_errors=True
    ) as folder:
        yield from _probe(settings.executor, Path(folder))


def _probe(settings: ExecutorSettings, folder: Path) -> Iterator[Finding]:
    """Submit a job that answers in `folder`, wait for it, cancel it, and yield findings; "warn" if it still waits."""
    (folder / "token").write_text(folder.name)
    setup = f". {shlex.quote(settings.setup)}\n" if settings.setup else ""
    begun = time.time()
    try:
        options = ("--parsable", "--no-requeue", "--export=NIL", f"--chdir={folder}", "--output=log.txt")
        script = f"#!/bin/sh\n{setup}exec {shlex.join((sys.executable, '-P', '-c', _PROGRAM))}\n"
        output = ask("sbatch", *options, f"--job-name={folder.name}", *settings.slurm.arguments("train"), stdin=script)
        number = job_number(output)
        seen, (state, reason, node) = _wait(folder)
    except CannotAsk as error:
        yield bad("probe job", error.message, "change executor.slurm: a training would be refused, too")
        return
    finally:
        with contextlib.suppress(CannotAsk):
            ask("scancel", "--me", f"--name={folder.name}")
    answer = read_object(folder / "answer.json")
    if answer.get("token") == folder.name:
        yield from _compare(answer, f"job {number} on {node or 'its node'}", (begun, seen), settings.slurm.train.gpus)
    elif state == "PENDING":
        remedy = "ask again when it can begin: dropforge doctor"
        yield warn("probe job", f"job {number} waits in Slurm ({reason}) and was cancelled", remedy)
    else:
        log = folder / "log.txt"
        last = log.read_text(errors="replace").strip().rpartition("\n")[2] if log.exists() else ""
        text = f"job {number} on {node or 'no node'} gave no answer: {state or 'Slurm does not know it'}"
        remedy = f"see whether the node has {folder.parent} and {sys.executable}, and what executor.setup does there"
        yield bad("probe job", f"{text}: {last[:300]}" if last else text, remedy)


def _wait(folder: Path) -> tuple[float, tuple[str, ...]]:
    """
    Wait until the job has answered or failed, a minute at most; return the time (s) of the last look and Slurm's words.

    These are the job's state, reason and node: each empty if Slurm does not list it.
    """
    end, job = time.monotonic() + _MOST_SECONDS, ("", "", "")
    while True:
        # Listed, as NFS keeps for a while that a name was not there.
        is_there = folder / "answer.json" in folder.iterdir()
        seen = time.time()
        with contextlib.suppress(CannotAsk):
            output = ask("squeue", "--me", "--states=all", "--noheader", f"--name={folder.name}", "--format=%T|%r|%N")
            state, _, rest = output.strip().partition("|")
            job = (state, *rest.rpartition("|")[::2]) if state else job
        if is_there or job[0] not in _GOES_ON or time.monotonic() >= end:
            return seen, job
        time.sleep(_LOOK_SECONDS)


def _compare(answer: dict[str, Any], job: str, times: tuple[float, float], gpus: int) -> Iterator[Finding]:
    """
    Yield a finding per problem of a node: user, imports, clock, GPUs; a single "ok" if there is none.

    `times` are those of submitting the job and of seeing its answer; `gpus` is the number that a training requests.
    """
    begun, seen = times
    problems = []
    if answer["uid"] != os.getuid():
        text = f"{job} runs as user {answer['uid']}, the daemon as {os.getuid()}"
        problems.append(bad("probe job", text, "give the user the same number on all hosts"))
    for name, error in answer["missing"].items():
        remedy = f"let {sys.executable} import it on the nodes, or set PYTHONPATH in the file of executor.setup"
        problems.append(bad("probe job", f"{job} cannot import {name}: {error}", remedy))
    skew = max(begun - answer["time"], answer["time"] - seen)
    if skew > _MOST_SKEW_SECONDS:
        text = f"the clock of {job} is {skew:.0f} s or more {'behind' if answer['time'] < begun else 'ahead'}"
        problems.append(warn("probe job", text, "let all hosts have the same time, as by NTP"))
    cards = answer.get("cards", 0)
    if cards < gpus and not answer["missing"]:
        text = f"{job} sees {cards} of the {gpus} GPUs that executor.slurm.train asks for"
        problems.append(bad("probe job", text, "see the cluster's gres.conf, and CUDA in the torch of the nodes"))
    yield from problems
    if not problems:
        lag = f"its file was seen here after {max(0.0, seen - answer['time']):.1f} s"
        yield ok("probe job", f"{job} has torch {answer.get('torch')} and {count(cards, 'GPU')}; {lag}")
