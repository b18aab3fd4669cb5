"""
One attempt at a step, on whatever machine: its claim, its process, its revocation and its result.

Daemon, worker and jobs of a cluster agree by the files in the attempt's folder:

    spec.json      what is to be done
    claim.json     whoever creates it works on the attempt; it says where, and which process does the step
    revoked.json   nobody is to work on it any more: its step is stopped
    result.json    how it ended; the first one stays

The folder is listed before a file in it is opened: an NFS client caches for up to a minute that a file does not exist,
but not what a folder lists. Functions that use these files raise `OSError` if they cannot.
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
    """The part of claim.json that is read: the step's process, `None` before it was started."""

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
    """Return the spec of attempt `key`. Raises `OSError` or `ValueError` if unreadable, or of another fence or root."""
    path = root / folder_of(key) / SPEC_NAME
    spec = StepSpec.model_validate_json(durable.read_regular(path))
    if (spec.key, spec.fence) != (key, fence) or not Path(spec.root).samefile(root):
        raise ValueError(f"{path} has another key, fence or root")
    return spec


def end_revoked(spec: StepSpec) -> None:
    """
    Write the result of a stopped attempt, unless it has one: that in revoked.json, if there is one, else "interrupted".

    The caller has made sure that no process works on the attempt.
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
    Claim an attempt, run its step to the end and write its result; do nothing if it is claimed, revoked or has one.

    `stop` and a revocation stop its step. While disk, memory or descriptors do not suffice to begin the step or to
    write its result, that is tried again each second: here until `stop` is set, on a node 30 times. If the step could
    not begin, the attempt is not claimed and has no result. `on_node` are the variables for the step on a node of a
    cluster, `None` on this machine. Raises `OSError` if the attempt's files cannot be used.
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
    """
    Return what `act` returns; `None` after `tries` failed calls, a second apart, or a failed one with `stop` set.

    It is tried again after a full disk, a lack of memory, processes or descriptors, or with `any_error` any `OSError`;
    another `OSError` is raised.
    """
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
    """Claim an attempt, start its process, note that in the claim; `None` if claimed or ended. An error undoes it."""
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
    """
    Return a function that tells whether to stop; its caller asks no more once it is true.

    It is true if `stop` is set, or `folder`, listed once a second, holds a revocation or no spec.
    """
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

    Returns also if the attempt could not begin, or the disk is full. Raises `DropforgeError` if `root` is missing or is
    not this user's own, or if the attempt's spec is not valid; `OSError` if its files cannot be used.
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
    Create the claim of the attempt in `folder`; return `False` if it is claimed already.

    `on_node` are Slurm's variables with the job's number, node and end time; none for this machine. Raises `OSError`,
    with no claim left, if it cannot be written.
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
