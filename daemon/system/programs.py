"""Users, and programs that settings name."""

import os
import pwd
import shutil
from pathlib import Path

from pipeline.errors import DropforgeError


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


class CannotUse(DropforgeError):
    """What a setting names is not there, or not for this user."""


def find_program(name: str) -> str:
    """Return the path of a command's program as a start would find it from here. Raises `CannotUse`."""
    found = shutil.which(name)
    if found is not None:
        return found
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
