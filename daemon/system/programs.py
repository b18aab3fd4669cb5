"""Users, and programs that settings name."""

import getpass
import os
import pwd
import shutil
from pathlib import Path

from pipeline.errors import DropforgeError


def user() -> str:
    """Return the name of this process's effective user."""
    return name_of(os.geteuid())


def who() -> str:
    """Return the name of the person at the command line, and behind which other one if sudo says so."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = f"user {os.getuid()}"
    behind = os.environ.get("SUDO_USER", "")
    return f"{name}, by sudo of {behind}" if behind and behind != name else name


def name_of(uid: int) -> str:
    """Return a user's name, or the number of one that has none here."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def owner_of(path: Path) -> tuple[str, ...]:
    """Return the name of the user whose file this is; nobody if it is not there."""
    return (name_of(path.stat().st_uid),) if path.exists() else ()


def is_closed(path: Path) -> bool:
    """Say whether this user may not read a file or folder; one that is not there is not closed."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def act_as_owner(state_folder: Path) -> None:
    """
    Become the owner of the state folder, for good, if this is root's process and the folder is another user's.

    Otherwise what root writes there would be closed to the daemon. A folder that is not there yet will belong to root.
    """
    if os.geteuid() != 0 or not state_folder.exists() or (info := state_folder.stat()).st_uid == 0:
        return
    try:
        account = pwd.getpwuid(info.st_uid)
    except KeyError:  # an owner without an account
        os.setgroups([])
        os.setgid(info.st_gid)
    else:
        os.initgroups(account.pw_name, account.pw_gid)
        os.setgid(account.pw_gid)
        os.environ["HOME"] = account.pw_dir  # root's is closed to it
    os.setuid(info.st_uid)


def find_program(name: str) -> str:
    """Return the path of a command's program as a start would find it from here. Raises `DropforgeError`."""
    found = shutil.which(name)
    if found is not None:
        return found
    if "/" not in name:
        message = f"there is no program {name} that user {user()} may execute in PATH"
        raise DropforgeError(message, "install it, or name it by its whole path: the daemon's PATH may be another one")
    path = Path(name)
    if path.is_file():
        message = f"user {user()} may not execute {name}"
        raise DropforgeError(message, f"let the daemon's user do so: chmod +x {name}; ls -l {name}")
    message = f"there is no program {name}"
    relative = "" if path.is_absolute() else "; a relative path counts from where the daemon is started"
    raise DropforgeError(message, f"mend its path, or put the program there{relative}")
