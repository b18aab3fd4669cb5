"""
One attempt at a step, on whatever machine: its claim, its process, its revocation and its result.

Daemon, worker and jobs of a cluster agree by the files in the attempt's folder:

    spec.json      what is to be done
    claim.json     whoever creates it works on the attempt; it says where, and which process does the step
    revoked.json   nobody is to work on it any more: its step is stopped
    result.json    how it ended; the first one stays

The folder is listed before a file in it is opened: an NFS client caches for up to a minute that a file does not exist,
but not what a folder lists.
"""

import contextlib
import errno
import itertools
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import structlog
from pydantic import BaseModel

from daemon.dispatch.preloaded import fork_nothing
from daemon.dispatch.step_process import ForkStep, StepCommand, StepProcess, result_of_dead, step_command
from daemon.state import run_files
from daemon.state.ownership import OwnFolder
from daemon.system.processes import Identity, on_stop
from pipeline import durable
from pipeline.contract import CLAIM_NAME, RESULT_NAME, REVOKED_NAME, SPEC_NAME, StepSpec
from pipeline.errors import DropforgeError, is_disk_full

_KEY = re.compile(r"([1-9][0-9]*)-([a-z]+)-([1-9][0-9]*)")
_LOOK_SECONDS = 1.0
#: After so many tries without room a job of a cluster ends without a result, and gives its nodes back.
_TRIES = 30
#: No memory, process or descriptor is free just now.
_PASSING = frozenset({errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE})
_ENDED = frozenset({RESULT_NAME, REVOKED_NAME})
_T = TypeVar("_T")
log = structlog.get_logger()


class _Claim(BaseModel):
    """What is read of a claim: the step's process, once it was started."""

    process: Identity | None = None


def folder_of(key: str) -> str:
    """Return the folder of the attempt `key`, relative to the root. Raises `ValueError` if it is no attempt's key."""
    return run_files.attempt_folder(*_parts(key))


def run_of(key: str) -> int:
    """Return the run of the attempt `key`. Raises `ValueError` if it is no attempt's key."""
    return _parts(key)[0]


def _parts(key: str) -> tuple[int, str, int]:
    if (name := _KEY.fullmatch(key)) is None:
        raise ValueError(f"{key} is no attempt's key")
    return int(name[1]), name[2], int(name[3])


def write_spec(spec: StepSpec) -> bool:
    """Make an attempt's folder with its spec.json, unless it has that or a result; return whether it has no result."""
    folder = run_files.make_attempt_folder(spec)
    names = listed(folder)
    if RESULT_NAME in names:
        return False
    if SPEC_NAME not in names:
        durable.write_bytes(folder / SPEC_NAME, spec.model_dump_json().encode())
        durable.fsync_folder(folder.parent)
    return True


def read_spec(root: Path, key: str, fence: str) -> StepSpec:
    """Return the spec of the attempt `key`. Raises `OSError` or `ValueError` if it cannot be read or is another's."""
    path = root / folder_of(key) / SPEC_NAME
    spec = StepSpec.model_validate_json(durable.read_regular(path))
    if (spec.key, spec.fence) != (key, fence) or not Path(spec.root).samefile(root):
        raise ValueError(f"{path} has another key, fence or root")
    return spec


def end_revoked(spec: StepSpec) -> None:
    """
    Write the result of an attempt that nobody works on, as the caller knows; an earlier one stays.

    It is the result in the revocation, if that has one, else "interrupted".
    """
    folder = Path(spec.root) / spec.folder
    result = durable.read_object(folder / REVOKED_NAME) or result_of_dead(spec, 0, stopped=True).model_dump()
    durable.write_json(folder / RESULT_NAME, result, first=True)


def work_on(
    spec: StepSpec,
    command: StepCommand,
    stop: threading.Event,
    fork: ForkStep = fork_nothing,
    on_node: Mapping[str, str] | None = None,
) -> None:
    """
    Run an attempt once and leave a result, unless it is claimed, revoked or has one.

    `stop` and a revocation stop its step. While there is no room to begin it, or to write its result, it is tried again
    until `stop` is set, but on a node, whose variables for the step are `on_node`, for half a minute. An attempt that
    could not begin is not claimed then.

    Raises `OSError` if the attempt's files cannot be used.
    """
    folder = Path(spec.root) / spec.folder
    tries: Iterable[int] = itertools.count() if on_node is None else range(_TRIES)
    process = _with_room(partial(_begin, spec, folder, command, on_node or {}, fork), stop, tries)
    if process is None:
        log.warning("attempt_not_begun", key=spec.key)
        return
    result = process.go(_revocation(folder, stop)).model_dump()
    # On a node any error may pass: the shared folder's server may be away.
    write = partial(durable.write_json, folder / RESULT_NAME, result, first=True)
    _with_room(write, stop, tries, any_error=on_node is not None)


def _with_room(
    act: Callable[[], _T], stop: threading.Event, tries: Iterable[int], *, any_error: bool = False
) -> _T | None:
    """Return what `act` does, tried again at a full disk or `any_error`; `None` after `tries`, or if `stop` is set."""
    for _ in tries:
        try:
            return act()
        except OSError as error:
            if not any_error and not is_disk_full(error) and error.errno not in _PASSING:
                raise
            log.warning("no_room", error=str(error))
        if stop.wait(_LOOK_SECONDS):
            break
    return None


def _begin(
    spec: StepSpec, folder: Path, command: StepCommand, variables: Mapping[str, str], fork: ForkStep
) -> StepProcess | None:
    """Claim an attempt, start its process and write that down; return `None` if it was claimed or has ended."""
    if _ENDED & listed(folder) or not claim(folder, variables):
        return None
    process = None
    try:
        process = StepProcess(spec, folder, command(spec, folder / SPEC_NAME), variables, fork)
        identity = process.identity
        noted = {**_claimant(variables), "process": asdict(identity) if identity else None}
        durable.write_json(folder / CLAIM_NAME, noted)
    except BaseException:
        if process is not None:
            process.kill()  # it has done nothing yet
        (folder / CLAIM_NAME).unlink()
        raise
    return process


def _revocation(folder: Path, stop: threading.Event) -> Callable[[], bool]:
    """Return a function that says whether the step is to stop; it lists the folder once in `_LOOK_SECONDS`."""
    looked = -_LOOK_SECONDS

    def is_to_stop() -> bool:
        nonlocal looked
        if not stop.is_set() and time.monotonic() - looked >= _LOOK_SECONDS:
            looked = time.monotonic()
            with contextlib.suppress(OSError):  # the file system's server may be away for a while
                names = listed(folder)
                return REVOKED_NAME in names or SPEC_NAME not in names
        return stop.is_set()

    return is_to_stop


def serve_one(root: Path, key: str, fence: str, command: StepCommand = step_command) -> None:
    """
    Work on the attempt `key` in `root`, in a job of a cluster; SIGTERM, SIGINT and SIGUSR1 stop its step.

    Raises `DropforgeError` if the folder is not this user's own or the attempt cannot be read.
    """
    if not root.is_dir():
        raise DropforgeError(f"{root} is not there", f"mount it on {socket.gethostname()}")
    OwnFolder(root, "worker")
    stop = threading.Event()
    on_stop(lambda _number: stop.set(), signal.SIGUSR1)
    try:
        spec = read_spec(root, key, fence)
        with tempfile.TemporaryDirectory(prefix="dropforge-", ignore_cleanup_errors=True) as scratch:
            # Slurm's own variables: a training on several nodes asks for the others by them.
            slurm = {name: value for name, value in os.environ.items() if name.startswith(("SLURM_", "SLURMD_"))}
            variables = {**slurm, "TMPDIR": scratch, "TRITON_CACHE_DIR": f"{scratch}/triton"}
            work_on(spec, command, stop, on_node=variables)
    except OSError as error:
        if not is_disk_full(error):
            raise
        log.warning("attempt_not_begun", key=key, error=str(error))
    except ValueError as error:
        raise DropforgeError(f"attempt {key} cannot be run: {error}", "see the log of the daemon") from error


def listed(folder: Path) -> set[str]:
    """Return the names in `folder`, by listing it, which shows what other hosts just made; none if it is missing."""
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()


def claim(folder: Path, on_node: Mapping[str, str] = MappingProxyType({})) -> bool:
    """
    Create the claim of the attempt in `folder`; return `False` if somebody had claimed it.

    `on_node` are the variables of Slurm that say the job's number, node and time limit; none for this machine.
    """
    # Not by a second name, which a killed worker would leave in the folder.
    try:
        fd = os.open(folder / CLAIM_NAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return False
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(durable.json_bytes(_claimant(on_node)))
            file.flush()
            os.fsync(file.fileno())
        durable.fsync_folder(folder)
    except OSError:  # as on a full disk
        (folder / CLAIM_NAME).unlink()
        raise
    return True


def _claimant(on_node: Mapping[str, str]) -> dict[str, Any]:
    node, until = on_node.get("SLURMD_NODENAME", socket.gethostname()), int(on_node.get("SLURM_JOB_END_TIME", "0"))
    return {"job": on_node.get("SLURM_JOB_ID"), "node": node, "until": until}


def process_of(folder: Path) -> Identity | None:
    """Return an attempt's process, perhaps dead; `None` if it had not started, or its claim cannot be read now."""
    try:
        return _Claim.model_validate(durable.read_object(folder / CLAIM_NAME)).process
    except ValueError:
        return None
