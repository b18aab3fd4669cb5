"""
Open the folders of the inbox by descriptor: each name is looked up once, and no link is followed.

Whoever may write into the inbox can put anything under any name in it, at any moment. So the inbox is opened once and
every folder below it from there, name by name; links, other files and folders of another user are refused. Folders
for drops have the same rights as the inbox, and the sticky bit where others may write: nobody can move the files of
another user. Only the daemon writes to `done/` and `rejected/`; files of another user are moved there into a folder
that only this user and the daemon can read.

The daemon's own files in folders where others may write are recognised by owner and first line, `MARK`: other files
with the same names, and links, are left alone.
"""

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import structlog

from daemon.inbox.drop_folders import DONE, FOLDER, Folder
from daemon.system.processes import FileLock, lock_holder
from daemon.system.programs import name_of
from pipeline import durable
from pipeline.errors import DropforgeError, is_disk_full
from pipeline.words import printable

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_ACL = "system.posix_acl_access"
_NO_ID = 0xFFFFFFFF
#: First line of each of the daemon's own files in folders where others may write.
MARK = "Dropforge keeps this file up to date; one of your own by this name stays as it is."
_READ_OWN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
#: More than any file written here has.
_MOST_OWN_BYTES = 1 << 20
log = structlog.get_logger()


class InboxUnusable(DropforgeError):
    """The inbox or a folder in it cannot be used: wrong kind, owner or rights, or another daemon uses it."""


class InboxFolders:
    """The inbox and the folders below it; methods create missing folders and raise `InboxUnusable`."""

    def __init__(self, path: Path) -> None:
        """Use the inbox at `path`; open and create nothing yet."""
        self.path = path
        self._root: Folder | None = None
        self._lock: FileLock | None = None

    def root(self) -> Folder:
        """
        Return the open inbox, created if missing; open it again if its path leads to another folder now.

        If the daemon owns it and others may write there, it gets the sticky bit where that is permitted. Raises
        `InboxUnusable`.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._root is None or not os.path.samestat(os.fstat(self._root.fd), self.path.stat()):
                if self._root is not None:
                    log.warning("inbox_replaced", inbox=str(self.path))
                self._root = Folder(os.open(self.path, FOLDER))
                info = os.fstat(self._root.fd)
                if info.st_uid == os.geteuid() and info.st_mode & _OTHERS_WRITE and not info.st_mode & stat.S_ISVTX:
                    with contextlib.suppress(OSError):  # a unit may forbid it if the set-group-id bit is set
                        os.fchmod(self._root.fd, stat.S_IMODE(info.st_mode) | stat.S_ISVTX)
        except OSError as error:
            raise _unusable(self.path, error) from error
        return self._root

    def why_movable(self) -> str | None:
        """Return why users can move each other's files in the inbox, by its mode; `None` if they cannot."""
        mode = os.fstat(self.root().fd).st_mode
        if not mode & _OTHERS_WRITE or mode & stat.S_ISVTX:
            return None
        return f"others may move files in the inbox (chmod +t {self.path})"

    def shared(self, *names: str) -> Folder:
        """
        Open the folder for drops at `names` below the inbox; without names the inbox itself.

        Missing folders are created, with the inbox's mode; each gets the sticky bit if others may write there. Raises
        `InboxUnusable` if one cannot be opened or get the sticky bit, is a link or a file, or has another owner than
        the daemon's user and root.
        """
        return self._below(names, is_closed=False)

    def closed(self, *names: str) -> Folder:
        """Open, or create, the folders at `names`; others lose the right to write to each. Raises `InboxUnusable`."""
        return self._below(names, is_closed=True)

    def _below(self, names: tuple[str, ...], *, is_closed: bool) -> Folder:
        def mended(rights: int) -> int:
            if is_closed:
                return rights & ~_OTHERS_WRITE
            return rights | (stat.S_ISVTX if rights & _OTHERS_WRITE else 0)

        folder = self.root()
        rights = mended(stat.S_IMODE(os.fstat(folder.fd).st_mode)) & ~(stat.S_ISVTX if is_closed else 0)
        for depth, name in enumerate(names, 1):
            path = self.path.joinpath(*names[:depth])
            folder, is_new = _entered(folder, name, rights, path)
            has = stat.S_IMODE(os.fstat(folder.fd).st_mode)
            wants = rights | has if is_new else mended(has)
            try:
                if wants != has:
                    os.fchmod(folder.fd, wants)
            except OSError as error:
                if not is_new:
                    message = f"others may move or replace what lies in {printable(str(path))}"
                    hint = f"{'chmod go-w' if is_closed else 'chmod +t'} {printable(str(path))}"
                    raise InboxUnusable(message, hint) from error
        return folder

    def answers(self, *names: str, owner: int) -> Folder:
        """
        Open the folder, created if missing, for receipts and errors of files that the user with id `owner` dropped.

        For the daemon's user it is the `closed` folder at `names`; for any other user, `~USER` in it, which only this
        user and the daemon can read: on a file system without access lists only the daemon. Raises `InboxUnusable`.
        """
        folder = self.closed(*names)
        if owner == os.geteuid():
            return folder
        name = f"~{name_of(owner)}"
        private, is_new = _entered(folder, name, 0o700, self.path.joinpath(*names, name))
        try:
            os.getxattr(private.fd, _ACL)
        except OSError:
            try:
                os.setxattr(private.fd, _ACL, _readable_for(owner))
            except OSError as error:
                if is_new:
                    log.warning("answers_closed", folder=printable(name), owner=owner, why=error.strerror)
        return private

    def answers_there(self, *names: str, user: str | None) -> Folder | None:
        """
        Open the folder that `answers` made for the user named `user`, or, for `None`, the daemon's own.

        Returns `None` if it is missing, a link or another user's. Raises `InboxUnusable` or `OSError`.
        """
        folder = self.closed(*names)
        if user in {None, name_of(os.geteuid())}:
            return folder
        fd = _open_own(f"~{user}", FOLDER | os.O_NOFOLLOW, folder)
        private = None if fd is None else Folder(fd)
        return private if private and os.fstat(private.fd).st_uid in {os.geteuid(), 0} else None

    def lock(self) -> None:
        """
        Lock the inbox against other daemons, by a file in `done/`, until the process ends.

        Raises `InboxUnusable` if it cannot be locked within 0.2 s.
        """
        # In done/, where no other user can open a file: in the inbox any user with write access could hold the lock.
        folder = self.closed(DONE)
        path = folder.path / ".daemon.lock"
        self._lock = FileLock(path)
        try:
            locked = self._lock.acquire()
        except OSError as error:
            raise _unusable(self.path / DONE / path.name, error) from error
        if not locked:
            message = f"another daemon (process {lock_holder(path)}) takes the files of {self.path}"
            raise InboxUnusable(message, "stop that one, or give this one an inbox of its own: inbox in dropforge.toml")


def read_own(folder: Folder, name: str | bytes) -> bytes | None:
    """Return a file's first megabyte; `None` if missing, a link, not regular or not the daemon's. Raises `OSError`."""
    fd = _open_own(name, _READ_OWN, folder)
    if fd is None:
        return None
    with os.fdopen(fd, "rb") as file:
        info = os.fstat(fd)
        is_ours = stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid()
        return file.read(_MOST_OWN_BYTES) if is_ours else None


def _open_own(name: str | bytes, flags: int, folder: Folder) -> int | None:
    """Return a descriptor of a name in a folder; `None` if there is no such name or it is a link. Raises `OSError`."""
    try:
        return os.open(name, flags, dir_fd=folder.fd)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG}:
            return None
        raise


def keep_own(folder: Folder, aside: Folder, name: str, text: str | None) -> None:
    """
    Write the line `MARK` and `text` to the file `name` in `folder`, or delete the file if `text` is `None`.

    Nothing happens if the file has this text already, or if it is a link, another user's or begins with another line.
    The text is written to the folder `aside`, which only the daemon may write to, and then moved. Raises `OSError`.
    """
    data, old = None if text is None else f"{MARK}\n\n{text}".encode(), None
    with contextlib.suppress(OSError):  # another user's, which may not be read
        old = read_own(folder, name)
    ours = old is not None and old.startswith(MARK.encode())
    if old == data or (not ours and (data is None or os.path.lexists(folder.path / name))):
        return
    if data is None:
        os.unlink(name, dir_fd=folder.fd)
        return
    # `first` never replaces a file that somebody creates at the same moment.
    durable.write_bytes(folder.path / name, data, first=not ours, folder=aside.path)


@contextlib.contextmanager
def writing(event: str, **about: object) -> Iterator[None]:
    """Log and suppress an `InboxUnusable` or `OSError` of the block, as `event` with `about`; a full disk is raised."""
    try:
        yield
    except (InboxUnusable, OSError) as error:
        if isinstance(error, OSError) and is_disk_full(error):
            raise
        log.warning(event, **about, error=str(error))


def _entered(parent: Folder, name: str, rights: int, shown: Path) -> tuple[Folder, bool]:
    """
    Open a folder that the daemon or root owns, or create it with `rights`; return it and whether it is new.

    Raises `InboxUnusable`, which names it `shown`, if it is a link, a file or another user's.
    """
    is_new = True
    try:
        try:
            # With the sticky bit from the beginning; a set-group-id bit is inherited, and a unit may forbid to set one.
            os.mkdir(name, rights & 0o1777, dir_fd=parent.fd)
        except FileExistsError:
            is_new = False
        folder = Folder(os.open(name, FOLDER | os.O_NOFOLLOW, dir_fd=parent.fd))
    except OSError as error:
        raise _unusable(shown, error) from error
    owner = os.fstat(folder.fd).st_uid
    if owner not in {os.geteuid(), 0}:
        message = (
            f"{printable(str(shown))} belongs to {name_of(owner)} and not to the daemon's user, {name_of(os.geteuid())}"
        )
        raise InboxUnusable(message, "move it away: the daemon makes the folder itself")
    return folder, is_new


def _unusable(path: Path, error: OSError) -> InboxUnusable:
    shown = printable(str(path))
    if error.errno in {errno.ELOOP, errno.ENOTDIR, errno.EEXIST}:
        message = f"{shown} should be a folder of the inbox, but a link or a file is in the way"
        return InboxUnusable(message, "rename that file: the daemon makes the folder itself")
    message = f"{shown} cannot be used: {error.strerror}"
    return InboxUnusable(message, f"give the daemon's user, {name_of(os.geteuid())}, the right to write there")


def _readable_for(user: int) -> bytes:
    """Return a POSIX access list as a Linux xattr value: all for the owner, read and enter for user id `user`."""
    read, all_rights = 5, 7
    entries = (
        (0x01, all_rights, _NO_ID),
        (0x02, read, user),
        (0x04, 0, _NO_ID),
        (0x10, read, _NO_ID),
        (0x20, 0, _NO_ID),
    )
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
