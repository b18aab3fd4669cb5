"""Whether what the settings name can be used by this user: the programs of hooks, the suites of general abilities."""

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from daemon.state.permissions import user
from pipeline.errors import DropforgeError
from pipeline.evaluation.suite_items import BUILTIN, HARNESS, read_items
from pipeline.validation.file_formats import shown

#: Bytes of a script's first line that the kernel reads.
_FIRST_LINE = 255


class CannotUse(DropforgeError):
    """What a setting names is not there, or not for this user."""


def find_program(name: str) -> str:
    """Return the path of a command's program as a start would find it from here. Raises `CannotUse`."""
    found = shutil.which(name)
    if found is not None:
        reason = why_not_started(found)
        if reason is None:
            return found
        message = f"{found} cannot be started: {reason}"
        raise CannotUse(message, "write an interpreter's whole path into its #! line, which a line feed alone ends")
    if "/" not in name:
        message = f"there is no program {name} that user {user()} may execute in PATH"
        raise CannotUse(message, "install it, or name it by its whole path: the daemon's PATH may be another one")
    path = Path(name)
    if path.is_file():
        message = f"user {user()} may not execute {name}"
        raise CannotUse(message, f"let the daemon's user do so: chmod +x {name}; ls -l {name}")
    message = f"there is no program {name}"
    relative = "" if path.is_absolute() else "; a relative path counts from where the daemon is started"
    raise CannotUse(message, f"mend its path, or put the program there{relative}")


def why_not_started(path: str) -> str | None:
    """
    Return why a start of a script fails though it is there and may be executed; `None` if nothing speaks against it.

    The system's own word is "No such file or directory" for an interpreter that is missing.
    """
    if not Path(path).is_file():
        return None  # to open a pipe would wait for who writes into it
    try:
        with Path(path).open("rb") as file:
            head = file.read(_FIRST_LINE)
    except OSError:
        return None
    if not head.startswith(b"#!"):
        return None if b"\0" in head else "it is a script without a #! line"
    # The kernel ends the name at a blank, and takes a carriage return for a part of it.
    words = head[2:].partition(b"\n")[0].partition(b"\0")[0].replace(b"\t", b" ").strip(b" ").split(b" ")
    name = os.fsdecode(words[0])
    if os.access(name, os.X_OK):
        return None
    return f"its #! line names {shown(name)}, which user {user()} cannot execute"


def try_suite(name: str) -> str:
    """
    Return in words what a name in `evaluate.general` stands for, read as a run reads it.

    A task of lm-eval is not loaded, which takes the training stack. Raises `DropforgeError` if it cannot be used.
    """
    if not name.startswith(HARNESS):
        if Path(name).exists() and not Path(name).is_file() and not Path(name).is_dir():
            message = f"{name} is not a file"  # who opens a FIFO, waits
            raise CannotUse(message, "name a file of items in evaluate.general")
        try:
            items = read_items(name)
        except OSError as error:
            message = f"user {user()} cannot read the suite {name}: {error.strerror}"
            raise CannotUse(message, f"let the daemon's user read it: ls -l {name}") from error
        return f"{'built in' if name == BUILTIN else name}: {len(items)} items"
    task = name.removeprefix(HARNESS)
    try:
        package = f"lm-eval {version('lm-eval')}"
    except PackageNotFoundError as error:
        message = f"evaluate.general names {name}, and the package lm-eval is not installed"
        raise CannotUse(message, "pip install 'lm-eval>=0.4.13,<0.5', or take it out of evaluate.general") from error
    if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
        message = f"there is no task {task}"
        raise CannotUse(message, "mend its path in evaluate.general, or put the file there")
    return f"{name}: {package}; whether it loads, a run says"
