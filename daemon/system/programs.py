"""Users, and programs that settings name."""

import os
import pwd
import shutil
from pathlib import Path

from pipeline.errors import DropforgeError
from pipeline.wording import shown


def user() -> str:
    """Return who this process is for the kernel, whatever the environment says."""
    return name_of(os.geteuid())


def name_of(uid: int) -> str:
    """Return a user's name, or the number of one that has none here."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def owner_of(path: Path) -> tuple[str, ...]:
    """Return the name of the user whose file this is; nobody if it is not there."""
    return (name_of(path.stat().st_uid),) if path.exists() else ()


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
