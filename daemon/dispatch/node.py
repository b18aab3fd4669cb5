"""
One attempt on a node of a cluster: `dropforge worker --one KEY FENCE`, which a job of the cluster runs.

Several hosts share the attempt's folder. The process that creates `claim.json` in it works on the attempt, and every
other process for this attempt ends. Once `revoked.json` is there, the step is stopped. The folder is listed before a
file in it is opened: an NFS client caches for up to a minute that a file does not exist, but not what a folder lists.
"""

import contextlib
import os
import signal
import socket
import tempfile
import threading
import time
import uuid
from pathlib import Path

import structlog

from daemon.dispatch.spool import read_spec
from daemon.dispatch.step_process import StepCommand, StepProcess, result_of_dead, step_command
from daemon.state.ownership import OwnFolder
from daemon.system.processes import on_stop
from pipeline import durable
from pipeline.contract import CLAIM_NAME, RESULT_NAME, REVOKED_NAME, SPEC_NAME, StepResult
from pipeline.errors import EXIT_DISK_FULL, DropforgeError, is_disk_full

_LOOK_SECONDS = 2.0
#: After so many tries to write a result the job ends without one, and gives its nodes back.
_TRIES = 15
log = structlog.get_logger()


def run_one(root: Path, key: str, fence: str, stop: threading.Event, command: StepCommand) -> None:
    """
    Run the attempt `key` once and leave a result, unless it is claimed, revoked or has one; `stop` stops the step.

    A result that cannot be written for half a minute is given up: without it the attempt counts as interrupted.

    Raises `OSError` or `ValueError` if its spec cannot be read or has another fence.
    """
    spec = read_spec(root, key, fence)
    folder = root / spec.folder
    ended = {RESULT_NAME, REVOKED_NAME}
    if ended & listed(folder) or not claim(folder) or ended & listed(folder):
        log.warning("attempt_not_begun", key=key)
        return
    looked = time.monotonic()

    def is_to_stop() -> bool:
        nonlocal looked
        if not stop.is_set() and time.monotonic() - looked >= _LOOK_SECONDS:
            looked = time.monotonic()
            with contextlib.suppress(OSError):  # the file system's server may be away for a while
                names = listed(folder)
                if REVOKED_NAME in names or SPEC_NAME not in names:
                    stop.set()
        return stop.is_set()

    try:
        with tempfile.TemporaryDirectory(prefix="dropforge-", ignore_cleanup_errors=True) as scratch:
            # Slurm's own variables: a training on several nodes asks for the others by them.
            slurm = {name: value for name, value in os.environ.items() if name.startswith("SLURM_")}
            told = {**slurm, "TMPDIR": scratch, "TRITON_CACHE_DIR": f"{scratch}/triton"}
            result = StepProcess(spec, folder, command(spec, folder / SPEC_NAME), told).go(is_to_stop)
    except OSError as error:
        if not is_disk_full(error):
            raise
        result = result_of_dead(spec, EXIT_DISK_FULL, stopped=False)
    _leave(folder, result, stop)


def _leave(folder: Path, result: StepResult, stop: threading.Event) -> None:
    """Write the result; give up after `_TRIES` tries, or once `stop` is set."""
    for _ in range(_TRIES):
        try:
            write_first(folder / RESULT_NAME, result.model_dump())
        except OSError as error:  # the folder is full, or its server away
            log.warning("result_not_written", key=result.key, error=str(error))
            if stop.wait(_LOOK_SECONDS):
                return
        else:
            return


def serve_one(root: Path, key: str, fence: str, command: StepCommand = step_command) -> None:
    """
    Run the attempt `key` in `root`, as `run_one` does; SIGTERM, SIGINT and SIGUSR1 stop its step.

    Raises `DropforgeError` if the folder is not this user's own or the attempt cannot be read.
    """
    if not root.is_dir():
        raise DropforgeError(f"{root} is not there", f"mount it on {socket.gethostname()}")
    OwnFolder(root, "worker")
    stop = threading.Event()
    on_stop(lambda _number: stop.set(), signal.SIGUSR1)
    try:
        run_one(root, key, fence, stop, command)
    except OSError as error:
        if not is_disk_full(error):
            raise
        log.warning("attempt_not_begun", key=key, error=str(error))
    except ValueError as error:
        raise DropforgeError(f"attempt {key} cannot be run: {error}", "see the log of the daemon") from error


def listed(folder: Path) -> set[str]:
    """Return the names in `folder`, those that other hosts have just made included; none if it is missing."""
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()


def write_first(path: Path, value: object) -> None:
    """Write a file unless it is there: the result of a process that was thought dead stays."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    durable.write_json(aside, value)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
            durable.fsync_folder(path.parent)
    finally:
        aside.unlink()


def claim(folder: Path) -> bool:
    """Create the attempt's claim with this job's number, node and time limit; return whether nobody had."""
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    until = int(os.environ.get("SLURM_JOB_END_TIME", "0"))
    told = {"job": os.environ.get("SLURM_JOB_ID"), "node": node, "until": until}
    try:
        fd = os.open(folder / CLAIM_NAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(fd, "wb") as file:
        file.write(durable.json_bytes(told))
        file.flush()
        os.fsync(file.fileno())
    durable.fsync_folder(folder)
    return True
