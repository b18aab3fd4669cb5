"""
Orders in the spool, at nobody's word: which attempt an entry means, and the spec that the daemon wrote for it.

An entry's name is the attempt's key (run, step, number) and its content the fence of the attempt's spec, so no entry
names a path. The attempt's folder follows from the key; it, its parents below the state folder and the spec have to be
what they seem and this user's own. So only who can read the specs can order one.
"""

import errno
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from daemon.state.run_files import attempt_folder
from daemon.system.processes import Identity
from pipeline.contract import SPEC_NAME, StepSpec
from pipeline.errors import DropforgeError
from pipeline.steps import BY_NAME

#: What of a spec's environment a step is given: the program sets no other.
STEP_VARIABLES = ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "OMP_WAIT_POLICY", "DROPFORGE_DEVICE")
_NAME = re.compile(r"([1-9][0-9]{0,17})-([a-z]+)-([1-9][0-9]{0,17})\.json")
_ENTRY_BYTES = 1 << 12
#: A spec names every drop of its run.
_SPEC_BYTES = 1 << 28
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
#: What the kernel says where something else lies than should; other errors say nothing about the entry.
_AMISS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO, errno.EISDIR})


class OrderRefused(DropforgeError):
    """An entry of the spool is not the daemon's word."""


@dataclass(frozen=True)
class Order:
    """An attempt that the daemon ordered, and its process if the worker wrote one down."""

    spec: StepSpec
    process: Identity | None


def read_order(root: Path, entry: Path) -> Order:
    """Return the order that an entry in the spool of `root` stands for. Raises `OrderRefused`."""
    found = _NAME.fullmatch(entry.name)
    if found is None or found[2] not in BY_NAME:
        raise _refused("its name is no attempt's")
    with _amiss():
        content = _content(entry)
        folder = attempt_folder(int(found[1]), found[2], int(found[3]))
        with _own_folder(root, folder) as fd:
            data = _read_own(Path(SPEC_NAME), _SPEC_BYTES, fd)
    try:
        spec = StepSpec.model_validate_json(data)
    except ValueError as error:
        raise _refused(f"{folder}/{SPEC_NAME} is no spec") from error
    if (spec.key, spec.folder) != (entry.name.removesuffix(".json"), folder) or not _is_same(spec.root, root):
        raise _refused(f"{folder}/{SPEC_NAME} is another attempt's")
    if content.get("fence") != spec.fence:
        raise _refused(f"it has another fence than {folder}/{SPEC_NAME}")
    return Order(spec, _process(content))


def process_of(entry: Path) -> Identity | None:
    """Return the process that the worker wrote into an entry; `None` if it did not, or the entry is not its own."""
    try:
        with _amiss():
            return _process(_content(entry))
    except OrderRefused:
        return None


def step_command(step: str, spec: Path) -> tuple[str, ...]:
    """Return the argument list that does a step; `spec` is the absolute path of its spec."""
    # -P: the folder that it is started in must not be looked through for modules.
    return (sys.executable, "-P", "-m", "pipeline", step, str(spec))


def _content(entry: Path) -> dict[str, object]:
    try:
        value = json.loads(_read_own(entry, _ENTRY_BYTES))
    except (ValueError, RecursionError) as error:
        raise _refused("it is no JSON") from error
    if not isinstance(value, dict):
        raise _refused("it is no JSON object")
    return value


def _process(content: dict[str, object]) -> Identity | None:
    value = content.get("process")
    if value is None:
        return None
    match value:
        case {"pid": int(pid), "started": int(started), "boot": str(boot)} if pid > 1:
            return Identity(pid, started, boot)
    raise _refused("it names no process")


@contextmanager
def _own_folder(root: Path, folder: str) -> Iterator[int]:
    """Open a folder below `root`, each part by the one above: no link is followed, and all are this user's own."""
    fd = os.open(root, _FOLDER)
    try:
        _require_own(fd, str(root))
        for part in Path(folder).parts:
            below = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = below
            _require_own(fd, part)
        yield fd
    finally:
        os.close(fd)


def _read_own(path: Path, most: int, dir_fd: int | None = None) -> bytes:
    """Read a regular file of this user's own of at most `most` bytes."""
    name = path.name
    # A directory opens, too; a pipe is not waited for.
    with os.fdopen(os.open(path, _FILE | os.O_NOFOLLOW, dir_fd=dir_fd), "rb") as file:
        info = _require_own(file.fileno(), name)
        if not stat.S_ISREG(info.st_mode):
            raise _refused(f"{name} is no file")
        if info.st_size > most:
            raise _refused(f"{name} has {info.st_size:,} bytes, at most {most:,} are read")
        return file.read(most)


def _require_own(fd: int, name: str) -> os.stat_result:
    info = os.fstat(fd)
    if info.st_uid != os.geteuid():
        raise _refused(f"{name} belongs to user {info.st_uid}, not to {os.geteuid()}")
    return info


@contextmanager
def _amiss() -> Iterator[None]:
    """Turn what the kernel says of a thing that is not what it should be into a refusal."""
    try:
        yield
    except OSError as error:
        if error.errno not in _AMISS:
            raise
        raise _refused(f"{error.filename or 'it'}: {error.strerror}") from error


def _is_same(one: str, other: Path) -> bool:
    try:
        return Path(one).samefile(other)
    except (OSError, ValueError):
        return False


def _refused(why: str) -> OrderRefused:
    return OrderRefused(why, "the daemon orders again what it still wants done")
