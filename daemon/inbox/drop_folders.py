"""The inbox's folders for drops, and the file names in them that are ignored."""

from dataclasses import dataclass
from pathlib import Path

from daemon.settings.model import Settings
from pipeline.artifacts import Role

DONE = "done"
REJECTED = "rejected"
HELDOUT = "heldout"
#: Names of files that are being written (browsers, rsync and scp clients, editors), or that only desktops care for.
_IN_PROGRESS = (b".part", b".partial", b".tmp", b".crdownload", b".filepart", b".swp", b".kate-swp", b"~")
_DESKTOP = frozenset({b"thumbs.db", b"desktop.ini"})
#: What the daemon writes there itself, or a person in its place; compared in lower case.
_TEXTS = frozenset({b"readme.txt", b"wanted.md"})
#: Ends the name of the note beside a file that cannot be taken.
WAITS = ".waits.txt"
_NOTE = WAITS.encode()


@dataclass(frozen=True)
class WatchedFolder:
    """A folder whose files are drops of one track and role."""

    path: Path
    track: str
    role: Role

    @property
    def names(self) -> tuple[str, ...]:
        """Its path from the inbox, as names."""
        return folder_names(self.track, self.role)


def folder_names(track: str, role: Role) -> tuple[str, ...]:
    """Return the path from the inbox to the folder of a track and role, as names."""
    home = () if track == "default" else (track,)
    return (*home, HELDOUT) if role == "heldout" else home


def watched_folders(settings: Settings) -> tuple[WatchedFolder, ...]:
    """Return the folders that files may be dropped into: the inbox and `heldout` below it, for each track its own."""
    roles: tuple[Role, ...] = ("train", "heldout")
    return tuple(
        WatchedFolder(settings.inbox_folder.joinpath(*folder_names(track, role)), track, role)
        for track in settings.track_names
        for role in roles
    )


def is_skipped(name: bytes) -> bool:
    """
    Return whether a file of this name is ignored: partial uploads, desktop files, our own texts.

    Beginning with `.` (rsync's and macOS's among them) or `~`, or with an ending that writers use until they are done;
    README.txt, WANTED.md and notes, whoever wrote them.
    """
    lower = name.lower()
    return lower.startswith((b".", b"~")) or lower.endswith((*_IN_PROGRESS, _NOTE)) or lower in _DESKTOP | _TEXTS
