"""Copy a file into the inbox so that the daemon sees all of it or nothing, and no file there is replaced."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from daemon.inbox.drop_folders import FOLDER, Folder, folder_names, is_skipped
from daemon.settings.model import Settings
from pipeline.durable import open_regular
from pipeline.errors import DropforgeError
from pipeline.words import shell_path

#: Mode of a submitted file, whatever the umask: in the service's inbox the group is the daemon's.
_MODE = 0o640


def copy_in(source: Path, settings: Settings, track: str, *, heldout: bool) -> Path:
    """
    Copy the file `source` into the inbox of a declared track, complete or not at all; return the path of the copy.

    The copy has the mode 0640. Raises `DropforgeError` if the inbox ignores its name or has a file of that name, or
    there is no such folder; `OSError` if `source` is no regular file, or if reading or writing fails.
    """
    require_usable(source.name)
    with open_regular(source) as old, incoming(settings) as new:
        shutil.copyfileobj(old, new.file)
        return new.place(source.name, track, heldout=heldout)


def require_usable(name: str) -> None:
    """Raise `DropforgeError` for a name that the inbox ignores (`is_skipped`)."""
    if is_skipped(os.fsencode(name)):
        message = f"{name}: the inbox takes a file of such a name for one that is still being written"
        raise DropforgeError(message, "rename the file and submit it again")


@dataclass(frozen=True)
class Incoming:
    """A new file in the inbox under a hidden name, which the watcher ignores until `place` renames it."""

    inbox: Path
    folder: Folder
    aside: str
    file: BinaryIO

    def place(self, name: str, track: str, *, heldout: bool) -> Path:
        """
        Make the file durable under the name `name` in the folder of a declared `track`, or its held-out folder.

        Returns its path. Raises `DropforgeError` if a file of that name exists, the inbox ignores the name, or there is
        no such folder; `OSError` if the file cannot be written.
        """
        require_usable(name)
        below = folder_names(track, "heldout" if heldout else "train")
        target = self.inbox.joinpath(*below, name)
        self.file.flush()
        os.fsync(self.file.fileno())
        with _explained(target.parent):
            folder = _opened(self.inbox, *below)
            source = self.folder.fd
            try:
                os.link(self.aside, name, src_dir_fd=source, dst_dir_fd=folder.fd, follow_symlinks=False)
            except OSError as error:
                if os.path.lexists(folder.path / name):
                    hint = "wait until the daemon has taken it, or submit yours under another name"
                    raise DropforgeError(f"{target} is there already and has not been taken yet", hint) from error
                # A file system without hard links: a rename could replace a file that appears at the same moment.
                os.rename(self.aside, name, src_dir_fd=source, dst_dir_fd=folder.fd)
            os.fsync(folder.fd)
        return target


@contextlib.contextmanager
def incoming(settings: Settings) -> Iterator[Incoming]:
    """
    Yield a new empty file in the inbox under a hidden name; delete it at the end of the block unless it was placed.

    Raises `DropforgeError` if there is no inbox, `OSError` if it cannot be written.
    """
    # The watcher ignores names that begin with a dot.
    aside = f".{uuid.uuid4().hex}.part"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    inbox = settings.inbox_folder
    with _explained(inbox):
        folder = _opened(inbox)
        fd = os.open(aside, flags, _MODE, dir_fd=folder.fd)
    try:
        with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor
            os.fchmod(fd, _MODE)
            yield Incoming(inbox, folder, aside, file)
    finally:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.unlink(aside, dir_fd=folder.fd)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Replace a `PermissionError` of the block by one that names `folder`."""
    try:
        yield
    except PermissionError as error:
        raise PermissionError(error.errno, error.strerror, str(folder)) from error


def _opened(inbox: Path, *below: str) -> Folder:
    """Open the folder `below` in the inbox. Raises `DropforgeError` if it is missing or a link."""
    place = inbox
    try:
        folder = Folder(os.open(inbox, FOLDER))
        for name in below:
            place /= name
            folder = Folder(os.open(name, FOLDER | os.O_NOFOLLOW, dir_fd=folder.fd))
    except FileNotFoundError as error:
        message = f"there is no folder {place}"
        raise DropforgeError(message, "the daemon makes the folders of its inbox: dropforge run") from error
    except NotADirectoryError as error:
        message = f"{place} is not a folder"
        raise DropforgeError(message, f"remove it, the daemon makes one: ls -ld {shell_path(place)}") from error
    return folder
