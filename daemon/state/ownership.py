"""Keep other users out of the state folder, and detect that it or the work folder was moved or replaced."""

import contextlib
import os
import socket
import stat
import time
import uuid
from pathlib import Path

import structlog

from daemon.settings.model import Settings
from daemon.state.layout import FOLDERS, INSTANCE_NAME, LEASE_NAME, SHARE_GONE_NOTE
from daemon.system.programs import name_of, user
from pipeline import durable
from pipeline.errors import DropforgeError

#: Folders that the worker follows no link to.
_NO_LINK = frozenset({"runs", "spool"})
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_LEASE_SECONDS, _RENEW_SECONDS = 60.0, 10.0
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
log = structlog.get_logger()


class StateFolderGone(DropforgeError):
    """The state folder was moved, removed or replaced while a process used it."""


class ShareGone(DropforgeError):
    """The shared folder is not mounted, or another daemon works in it: nothing may be concluded from what is there."""


class OwnFolder:
    """A state folder, held open so that its replacement by another folder is detected."""

    def __init__(self, path: Path, command: str) -> None:
        """
        Create the folder if it is missing, and revoke other users' rights; `command` is the subcommand for hints.

        Raises `DropforgeError` if another user owns the folder or one of `FOLDERS` in it, or one of these is no folder
        or a link that is unsafe: to nothing, to a folder that others may write to, or for `runs` or `spool`.
        """
        self._path = path
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        info = os.fstat(self._fd)
        if info.st_uid != os.geteuid():
            owner = name_of(info.st_uid)
            message = f"the state folder {path} belongs to {owner}, and this is {user()}"
            raise DropforgeError(message, f"start it as its owner: sudo -u {owner} dropforge {command}")
        if info.st_mode & _OTHERS:
            os.fchmod(self._fd, stat.S_IMODE(info.st_mode) & ~_OTHERS)
            log.warning("state_folder_closed", folder=str(path), mode_was=f"{stat.S_IMODE(info.st_mode):04o}")
        for name in FOLDERS:
            _require_own(path / name)

    def require_there(self) -> None:
        """Raise `StateFolderGone` if the folder's path is gone or leads to another folder now."""
        try:
            there = self._path.stat()
        except OSError as error:
            raise self._gone(error.strerror or "it is not there") from error
        if not os.path.samestat(there, os.fstat(self._fd)):
            raise self._gone("another folder is in its place")

    def close(self) -> None:
        """Close the folder's descriptor; `require_there` must not be called afterwards."""
        os.close(self._fd)

    def _gone(self, why: str) -> StateFolderGone:
        message = f"the state folder {self._path} was moved or removed: {why}"
        return StateFolderGone(message, "put it back, or set state in dropforge.toml; then start again: dropforge run")


def installation_id(settings: Settings) -> str:
    """
    Return the id that the two folders of an installation share; at its first start, create it and write it into both.

    Raises `DropforgeError` if the shared folder alone has one, and as `require_share`.
    """
    state, work = (folder / INSTANCE_NAME for folder in (settings.state_folder, settings.work_folder))
    if not state.exists():
        if work.exists():
            message = f"the shared folder {work.parent} is another installation's: {state} is missing"
            hint = f"name the right one: executor.shared; if the host of this one was lost, copy {work}"
            raise DropforgeError(message, hint)
        made = uuid.uuid4().hex[:8].encode()
        for path in dict.fromkeys((work, state)):
            durable.write_bytes(path, made)
    require_share(settings)
    return state.read_text(encoding="ascii")


def require_share(settings: Settings, *, renew: bool = False) -> None:
    """
    Raise `ShareGone`, and write `share-gone`, unless the shared folder, if any, is mounted and no other daemon's.

    Nothing is checked before the first start (`installation_id`). A daemon calls it with `renew` at each beat, which
    keeps its lease there: another one with a copy of its state folder is refused until the lease is a minute old.
    """
    state, work = settings.state_folder, settings.work_folder
    if Path(work) == Path(state) or not (state / INSTANCE_NAME).exists():
        return
    lease, ours = work / LEASE_NAME, {"host": socket.gethostname(), "state": str(state.resolve())}
    hint = "mount it, or name the right one, executor.shared: the daemon then goes on by itself"
    try:
        is_own = (work / INSTANCE_NAME).read_bytes() == (state / INSTANCE_NAME).read_bytes()
        holder = durable.read_object(lease)
        age = time.time() - lease.stat().st_mtime if holder else _LEASE_SECONDS
    except OSError as error:
        words = f"the shared folder is not mounted: {error.filename}: {error.strerror}"
    else:
        if is_own and (holder == ours or age >= _LEASE_SECONDS):
            if renew and (holder != ours or age > _RENEW_SECONDS):
                with contextlib.suppress(OSError):  # it may be full
                    durable.write_hint(lease, ours)
            return
        words = f"the shared folder is not mounted: {work} is another installation's"
        if is_own:
            words = f"another daemon works in {work}: on {holder.get('host')}, with {holder.get('state')}"
            hint = f"stop that one; if its host was lost, wait {_LEASE_SECONDS:g} s"
    with contextlib.suppress(OSError):
        (state / SHARE_GONE_NOTE).touch()
    raise ShareGone(words, hint)


def _require_own(place: Path) -> None:
    """Raise `DropforgeError` if `place` exists and is not a folder that this user owns, or is an unsafe link."""
    try:
        info = place.lstat()
        linked = stat.S_ISLNK(info.st_mode)
        if linked:
            info = place.stat()
    except FileNotFoundError as error:
        if not place.is_symlink():
            return
        raise _not_own(place, "leads nowhere") from error
    if linked and place.name in _NO_LINK:
        raise _not_own(place, "is a link, which the worker does not follow")
    if not stat.S_ISDIR(info.st_mode):
        raise _not_own(place, "is no folder")
    if info.st_uid != os.geteuid():
        raise _not_own(place, f"belongs to {name_of(info.st_uid)}, and this is {user()}")
    if linked and info.st_mode & _OTHERS_WRITE:
        raise _not_own(place, "is a link to a folder that others may write to")


def _not_own(place: Path, what: str) -> DropforgeError:
    return DropforgeError(f"{place} {what}", f"let it be a folder that {user()} alone can write to, or move it away")
