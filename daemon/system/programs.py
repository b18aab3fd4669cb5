"""Names of users, owners and permissions of files, and programs that settings name."""

import getpass
import os
import pwd
import shutil
from pathlib import Path

from pipeline.errors import DropforgeError


def user() -> str:
    """Return the name of this process's effective user, as `name_of` does."""
    return name_of(os.geteuid())


def who() -> str:
    """Return who is at the command line, by LOGNAME or USER if set: "anna", "root, by sudo of anna" or "user 1000"."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = f"user {os.getuid()}"
    behind = os.environ.get("SUDO_USER", "")
    return f"{name}, by sudo of {behind}" if behind and behind != name else name


def name_of(uid: int) -> str:
    """Return the name of user `uid`, or the number as text if there is no such account here."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def act_as_owner(state_folder: Path) -> None:
    """
    Drop root's privileges for those of the state folder's owner, permanently, if root runs this process.

    Otherwise the daemon could not read what root writes there. Nothing changes for any other user, or if the folder is
    root's or does not exist yet, in which case it will belong to root. HOME becomes that of the owner's account.
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
    """Return the path of the program `name`, found on PATH unless it is a path. Raises `DropforgeError` without it."""
    path = shutil.which(name)
    if path is None:
        message = f"there is no program {name} that user {user()} may execute"
        raise DropforgeError(message, "install it, or name it by its whole path: the daemon's PATH may be another one")
    return path
