"""The inbox's folders for drops, and the file names in them that are ignored."""

import os
import weakref
from dataclasses import dataclass
from pathlib import Path

from daemon.settings.model import Settings
from pipeline.artifacts import Role

#: Flags to open a folder.
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
DONE = "done"
REJECTED = "rejected"
HELDOUT = "heldout"
#: Endings of files that are being written (by browsers, rsync and scp clients, editors).
_IN_PROGRESS = (b".part", b".partial", b".tmp", b".crdownload", b".filepart", b".swp", b".kate-swp", b"~")
#: Files of desktops, and the one that the daemon itself writes there, or a person instead; compared in lower case.
_NO_DROPS = frozenset({b"thumbs.db", b"desktop.ini", b"readme.txt"})
#: Ending of the note next to a file that cannot be taken.
WAITS = ".waits.txt"
_NOTE = WAITS.encode()


class Folder:
    """An open folder; its descriptor is closed when the object is garbage-collected."""

    def __init__(self, fd: int) -> None:
        """Take over the descriptor `fd`."""
        self.fd = fd
        weakref.finalize(self, os.close, fd)

    @property
    def path(self) -> Path:
        """A path to this folder, even after it was moved, for functions that take a path; valid while it is open."""
        return Path(f"/proc/self/fd/{self.fd}")


@dataclass(frozen=True)
class WatchedFolder:
    """A folder whose files are drops of one track and role."""

    path: Path
    track: str
    role: Role

    @property
    def names(self) -> tuple[str, ...]:
        """The folder's path below the inbox, as names; empty for the inbox itself, the folder of track "default"."""
        return folder_names(self.track, self.role)


def folder_names(track: str, role: Role) -> tuple[str, ...]:
    """Return a folder for drops as names below the inbox: the track unless "default", "heldout" for held-out files."""
    home = () if track == "default" else (track,)
    return (*home, HELDOUT) if role == "heldout" else home


def watched_folders(settings: Settings) -> tuple[WatchedFolder, ...]:
    """Return the folders for drops of all declared tracks, existing or not: each its own and `heldout` below it."""
    roles: tuple[Role, ...] = ("train", "heldout")
    return tuple(
        WatchedFolder(settings.inbox_folder.joinpath(*folder_names(track, role)), track, role)
        for track in settings.track_names
        for role in roles
    )


def is_skipped(name: bytes) -> bool:
    """
    Return whether a file of this name is ignored: a partial upload, a file of a desktop, or a text of the daemon.

    Ignored are names that begin with `.` (as those of rsync and macOS) or `~`, or end in `.part`, `.tmp`, `~` and the
    like, and README.txt, thumbs.db, desktop.ini and NAME.waits.txt: in upper or lower case, whoever wrote the file.
    """
    lower = name.lower()
    return lower.startswith((b".", b"~")) or lower.endswith((*_IN_PROGRESS, _NOTE)) or lower in _NO_DROPS
