"""
The inbox → files that have stopped changing.

Events of the kernel (or of polling) carry no data that matters: they only wake a scan, which lists the watched folders.
The same scan runs on a timer, so a file is found even if every event was lost.
"""

import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import structlog
from watchdog.events import FileClosedEvent, FileCreatedEvent, FileMovedEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers.api import BaseObserver, ObservedWatch
from watchdog.observers.inotify import InotifyFullEmitter, InotifyObserver
from watchdog.observers.inotify_c import InotifyConstants, Mask
from watchdog.observers.polling import PollingObserver

from daemon.incoming import opened_folder
from daemon.lease import has_writer
from daemon.settings import Settings, nearest
from pipeline.artifacts import Role
from pipeline.errors import DropforgeError
from pipeline.formats import printable

DONE = "done"
REJECTED = "rejected"
HELDOUT = "heldout"
#: Seconds between looks at a file that somebody still has open for writing.
WRITER_SECONDS = 1.0
#: Names of files that are being written (browsers, rsync and scp clients, editors), or that only desktops care for.
_IN_PROGRESS = (b".part", b".partial", b".tmp", b".crdownload", b".filepart", b".swp", b".kate-swp", b"~")
_DESKTOP = frozenset({b"thumbs.db", b"desktop.ini"})
_EVENTS: list[type[FileSystemEvent]] = [FileClosedEvent, FileMovedEvent, FileCreatedEvent]
log = structlog.get_logger()


class InboxUnusable(DropforgeError):
    """The inbox cannot be watched as it is."""


@dataclass(frozen=True)
class Settled:
    """A file that is complete, as far as can be seen from outside."""

    track: str
    role: Role
    folder: Path
    name: bytes


@dataclass(frozen=True)
class WatchedFolder:
    """A folder whose files are drops of one track and role."""

    path: Path
    track: str
    role: Role


class _Shape(NamedTuple):
    """What must stay as it is while a file settles."""

    ctime_ns: int
    mtime_ns: int
    size: int
    inode: int
    regular: bool


@dataclass
class _Candidate:
    """A file that was seen and may not be complete."""

    shape: _Shape
    since: float
    """When it was first seen like this, on the caller's monotonic clock."""
    has_writer: bool = False
    given: bool = False


def watched_folders(settings: Settings) -> tuple[WatchedFolder, ...]:
    """Return the folders that files may be dropped into: the inbox and `heldout` below it, for each track its own."""
    inbox = settings.inbox_folder
    found = []
    for track in settings.track_names:
        home = inbox if track == "default" else inbox / track
        found += [WatchedFolder(home, track, "train"), WatchedFolder(home / HELDOUT, track, "heldout")]
    return tuple(found)


def is_passed_over(name: bytes) -> bool:
    """
    Say whether a name in the inbox is that of a file in progress, or of a desktop's own: it is left alone, unread.

    Beginning with `.` (rsync's and macOS's among them) or `~`, or with an ending that writers use until they are done.
    """
    lower = name.lower()
    return lower.startswith((b".", b"~")) or lower.endswith(_IN_PROGRESS) or lower in _DESKTOP


def make_inbox(settings: Settings) -> None:
    """Create every folder of the inbox that is not there. Raises `InboxUnusable` if a file has its name."""
    own = [settings.inbox_folder / name for name in (DONE, REJECTED)]
    for path in (*(folder.path for folder in watched_folders(settings)), *own):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            message = f"{path} should be a folder of the inbox, but a file is in the way"
            raise InboxUnusable(message, "rename that file") from error


class Watcher:
    """Tells which files of the inbox may be taken; used by one thread, woken by others."""

    def __init__(self, settings: Settings, wake: threading.Event) -> None:
        """Watch the inbox of `settings`; `wake` is set whenever a scan is worth while."""
        self._settings = settings
        self._folders = watched_folders(settings)
        self._handler = _Waker(wake)
        self._observer: BaseObserver | None = None
        #: What is watched, each with a descriptor that keeps its inode number from being given to another folder.
        self._watches: dict[Path, tuple[int, ObservedWatch]] = {}
        self._candidates: dict[tuple[Path, bytes], _Candidate] = {}

    def start(self) -> None:
        """Create the inbox's folders and begin to listen for events. Raises `OSError` if the inbox cannot be made."""
        make_inbox(self._settings)
        self._observer = _observer(self._settings.observer)
        self._observer.start()
        self._listen()

    def stop(self) -> None:
        """Listen no more."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()
            self._observer = None
            for fd, _watch in self._watches.values():
                os.close(fd)
            self._watches.clear()

    def scan(self, now: float) -> list[Settled]:
        """
        List the inbox and return the files that are complete, in the order in which they came.

        `now` is monotonic, in seconds. A file is complete when it has not changed for the settle time, or was renamed
        into place, and no one has it open for writing. One that stays in the inbox is returned at every scan.
        """
        make_inbox(self._settings)
        self._listen()
        settled: list[tuple[_Shape, Settled]] = []
        seen: set[tuple[Path, bytes]] = set()
        for folder in self._folders:
            for name, shape in self._listing(folder):
                key = (folder.path, name)
                seen.add(key)
                if self._is_complete(key, shape, now):
                    settled.append((shape, Settled(folder.track, folder.role, folder.path, name)))
        for key in self._candidates.keys() - seen:
            del self._candidates[key]
        self._handler.forget_all_but(seen)
        return [file for _shape, file in sorted(settled, key=lambda pair: (pair[0].ctime_ns, pair[1].name))]

    def next_due(self, now: float) -> float | None:
        """Return the seconds after which some file may be complete; `None` if nothing is pending."""
        settle = self._settings.intake.settle_seconds
        waits = [
            WRITER_SECONDS if candidate.has_writer else max(candidate.since + settle - now, 0.0)
            for candidate in self._candidates.values()
            if not candidate.given
        ]
        return min(waits, default=None)

    def waiting(self) -> list[str]:
        """Return the files, relative to the inbox, that are quiet but still open for writing somewhere."""
        paths = [folder / os.fsdecode(name) for (folder, name), seen in self._candidates.items() if seen.has_writer]
        return sorted(printable(str(path.relative_to(self._settings.inbox_folder))) for path in paths)

    def unknown_folders(self) -> list[dict[str, str | None]]:
        """Return the inbox's folders that are no declared track, each {"name", "nearest"}; they are left alone."""
        known = {*self._settings.track_names, DONE, REJECTED, HELDOUT} - {"default"}
        try:
            with os.scandir(self._settings.inbox_folder) as entries:
                names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            return []
        unknown = [name for name in names if name not in known and not name.startswith(".")]
        return [{"name": printable(name), "nearest": nearest(name, self._settings.track_names)} for name in unknown]

    def _listen(self) -> None:
        """Schedule each folder, and again if another one is in its place than the one that is watched."""
        if self._observer is None:
            return
        for folder in self._folders:
            old = self._watches.get(folder.path)
            if old is not None:
                if os.path.samestat(os.fstat(old[0]), folder.path.stat()):
                    continue
                log.warning("inbox_folder_replaced", folder=str(folder.path))
                self._observer.unschedule(old[1])
                os.close(old[0])
                del self._watches[folder.path]
            fd = os.open(folder.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                watch = self._observer.schedule(self._handler, folder.path, event_filter=_EVENTS, follow_symlink=True)
            except OSError:
                os.close(fd)
                raise
            self._watches[folder.path] = (fd, watch)

    def _listing(self, folder: WatchedFolder) -> list[tuple[bytes, _Shape]]:
        found = []
        with opened_folder(folder.path) as fd:
            for text in os.listdir(fd):  # noqa: PTH208 - the folder is the descriptor
                name = os.fsencode(text)
                if is_passed_over(name):
                    continue
                try:
                    info = os.stat(name, dir_fd=fd, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if not stat.S_ISDIR(info.st_mode):
                    regular = stat.S_ISREG(info.st_mode)
                    shape = _Shape(info.st_ctime_ns, info.st_mtime_ns, info.st_size, info.st_ino, regular)
                    found.append((name, shape))
        return found

    def _is_complete(self, key: tuple[Path, bytes], shape: _Shape, now: float) -> bool:
        candidate = self._candidates.get(key)
        if candidate is None or candidate.shape != shape:
            candidate = self._candidates[key] = _Candidate(shape, now)
        quiet = now - candidate.since >= self._settings.intake.settle_seconds
        candidate.has_writer = candidate.given = False
        if not quiet and not self._handler.was_renamed(key):
            return False
        writer = self._has_writer(key) if shape.regular else None
        candidate.has_writer = quiet and writer is True
        # Without a sure answer about writers a rename proves nothing: the settle time decides.
        candidate.given = writer is False or (quiet and writer is None)
        return candidate.given

    def _has_writer(self, key: tuple[Path, bytes]) -> bool | None:
        """Say whether the file is open for writing; `None` if the file system or our rights give no answer."""
        if self._settings.observer == "polling":
            return None
        with opened_folder(key[0]) as fd:
            return has_writer(key[1], fd)


class _Waker(FileSystemEventHandler):
    """Wakes the scan and remembers which files were renamed into place."""

    def __init__(self, wake: threading.Event) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._renamed: set[tuple[Path, bytes]] = set()

    def on_any_event(self, event: FileSystemEvent) -> None:
        with self._lock:
            if isinstance(event, FileMovedEvent):
                if event.dest_path:
                    self._renamed.add(_key(event.dest_path))
            else:
                # It was made or written in place, whatever happened to that name before.
                self._renamed.discard(_key(event.src_path))
        self._wake.set()

    def was_renamed(self, key: tuple[Path, bytes]) -> bool:
        with self._lock:
            return key in self._renamed

    def forget_all_but(self, seen: set[tuple[Path, bytes]]) -> None:
        with self._lock:
            # An event may be ahead of the listing: what is there now is for the next scan.
            self._renamed = {
                key for key in self._renamed if key in seen or os.path.lexists(key[0] / os.fsdecode(key[1]))
            }


def _key(path: bytes | str) -> tuple[Path, bytes]:
    folder, name = os.path.split(os.fsencode(path))
    return Path(os.fsdecode(folder)), name


class _Arrivals(InotifyFullEmitter):
    """
    Tells what comes into a folder and not what leaves it; "full", so that a file moved in differs from one made there.

    The library holds each departure back for half a second, waiting for where it went, and every later event behind it:
    a file renamed in after another was filed away would be noticed that much later.
    """

    def get_event_mask_from_filter(self) -> Mask:
        return Mask(super().get_event_mask_from_filter() & ~InotifyConstants.IN_MOVED_FROM)


class _ArrivalsObserver(InotifyObserver):
    """The library's observer with our emitter."""

    def __init__(self) -> None:
        super().__init__()
        self._emitter_class = _Arrivals


def _observer(kind: str) -> BaseObserver:
    """Return the observer that the setting names."""
    return PollingObserver() if kind == "polling" else _ArrivalsObserver()
