"""
Find the files in the inbox that have stopped changing.

Events of the kernel (or of polling) wake a scan, which lists the watched folders. The same scan runs on a timer, so a
file is found even if every event was lost.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import signal
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog
from watchdog.events import FileClosedEvent, FileCreatedEvent, FileMovedEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers.api import BaseObserver, ObservedWatch
from watchdog.observers.inotify import InotifyFullEmitter, InotifyObserver
from watchdog.observers.inotify_c import InotifyConstants, Mask
from watchdog.observers.polling import PollingObserver

from daemon.inbox.drop_folders import DONE, HELDOUT, REJECTED, WatchedFolder, folder_names, is_skipped, watched_folders
from daemon.inbox.folders import Folder, InboxFolders, InboxUnusable
from daemon.inbox.safe_copy import identity
from daemon.settings.model import Settings
from daemon.settings.text import nearest
from pipeline.artifacts import Role
from pipeline.words import printable

#: Errors if no lease is possible: the file system has none, or we neither own the file nor have CAP_LEASE.
_NO_ANSWER = frozenset({errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP})
#: Seconds between checks of a file that a process still has open for writing.
WRITER_SECONDS = 1.0
_EVENTS: list[type[FileSystemEvent]] = [FileClosedEvent, FileMovedEvent, FileCreatedEvent]
#: Seconds before a file that could not be taken is tried again; doubled at each further failure of the same file.
_FIRST_PAUSE = 5.0
_LONGEST_PAUSE = 600.0
#: Most files listed for `dropforge status` that could not be taken.
_MOST_LEFT = 100
log = structlog.get_logger()


@dataclass(frozen=True)
class Settled:
    """A file that is complete: unchanged for the settle time or renamed into place, and not open for writing."""

    track: str
    role: Role
    name: bytes

    @property
    def folders(self) -> tuple[str, ...]:
        """The file's folder, as names below the inbox."""
        return folder_names(self.track, self.role)


@dataclass
class _Candidate:
    """A file in the inbox that may be incomplete."""

    info: os.stat_result
    since: float
    """When it was first seen like this, on the caller's monotonic clock."""
    has_writer: bool = False
    given: bool = False
    failures: int = 0
    not_before: float = 0.0
    """It is not given again before; on the caller's monotonic clock."""
    why: str = ""
    """Why it could not be taken."""


def make_inbox(settings: Settings) -> None:
    """Create the inbox and its missing folders: of each track, `done` and `rejected`. Raises `InboxUnusable`."""
    inbox = InboxFolders(settings.inbox_folder)
    for folder in watched_folders(settings):
        inbox.shared(*folder.names)
    for name in (DONE, REJECTED):
        inbox.closed(name)


class Watcher:
    """Finds the files of the inbox that are complete; used by one thread, which others wake."""

    def __init__(self, settings: Settings, wake: threading.Event) -> None:
        """Prepare to watch the inbox of `settings`; `wake` is set when a file is created, written or moved in."""
        self.inbox = InboxFolders(settings.inbox_folder)
        self._settings = settings
        self._handler = _Waker(wake)
        self._observer: BaseObserver | None = None
        #: The usable folders, open: a file is identified by its folder's descriptor and its name.
        self._open: dict[WatchedFolder, Folder] = {}
        self._watches: dict[WatchedFolder, ObservedWatch] = {}
        self._candidates: dict[WatchedFolder, dict[bytes, _Candidate]] = {}
        #: The folders that cannot be used, and why.
        self._unusable: dict[WatchedFolder, str] = {}

    def start(self) -> None:
        """Create the inbox's folders and watch them. Raises `InboxUnusable` for the inbox, `done` or `rejected`."""
        self._observer = _observer(self._settings.observer)
        self._observer.start()
        self._refresh()

    def stop(self) -> None:
        """Stop watching for events; do nothing if that was not started."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()
            self._observer = None
            self._watches.clear()

    def scan(self, now: float) -> list[Settled]:
        """
        List the inbox and return the files that are complete, in the order of their last change.

        `now` is monotonic, in seconds. A file is complete when scans saw it unchanged for `intake.settle_seconds`, or
        it was renamed into place, and no process has it open for writing; where open files cannot be checked, a rename
        does not count. Names that `is_skipped` ignores are left out. A file that stays in the inbox is returned by each
        scan except while it is put off. Raises `InboxUnusable` if the inbox, `done/` or `rejected/` cannot be used.
        """
        self._refresh()
        settled: list[tuple[int, bytes, Settled]] = []
        seen: set[tuple[Path, bytes]] = set()
        for place, folder in self._open.items():
            known = self._candidates.setdefault(place, {})
            listing = _listing(folder)
            for name in known.keys() - listing.keys():
                del known[name]
            seen.update(itertools.product([folder.path], listing))
            for name, info in listing.items():
                candidate = known.get(name)
                if candidate is None or _shape(candidate.info) != _shape(info):
                    candidate = known[name] = _Candidate(info, now)
                if now >= candidate.not_before and self._is_complete(folder, name, candidate, now):
                    settled.append((info.st_ctime_ns, name, Settled(place.track, place.role, name)))
        self._handler.forget_all_but(seen)
        return [file for *_, file in sorted(settled, key=lambda entry: entry[:2])]

    def postpone(self, settled: Settled, why: str, now: float) -> None:
        """
        Leave a failed file out of scans for 5 s, doubled at each failure up to 10 minutes, or until it changes.

        Meanwhile and until it changes, `left` gives the reason `why`. `now` is monotonic, in seconds.
        """
        place = next(place for place in self._candidates if (place.track, place.role) == (settled.track, settled.role))
        candidate = self._candidates[place].get(settled.name)
        if candidate is not None:
            pause = min(_FIRST_PAUSE * 2**candidate.failures, _LONGEST_PAUSE)
            candidate.failures = min(candidate.failures + 1, 10)
            candidate.not_before = now + pause
            candidate.why = why

    def next_due(self, now: float) -> float | None:
        """Return the seconds until a file may be complete or is tried again; `None` if no file is pending."""
        settle = self._settings.intake.settle_seconds
        candidates = [candidate for known in self._candidates.values() for candidate in known.values()]
        waits = [
            WRITER_SECONDS if candidate.has_writer else max(candidate.since + settle - now, 0.0)
            for candidate in candidates
            if not candidate.given
        ]
        waits += [candidate.not_before - now for candidate in candidates if candidate.not_before > now]
        return min(waits, default=None)

    def waiting(self) -> list[str]:
        """Return files, relative to the inbox, that stopped changing but are open for writing; at most 100."""
        return sorted(_shown(place, name) for place, name, seen in self._all() if seen.has_writer)[:_MOST_LEFT]

    def left(self) -> list[dict[str, str]]:
        """Return up to 100 files and folders below the inbox that could not be taken or used, as {"name", "why"}."""
        files = sorted((_shown(place, name), seen.why) for place, name, seen in self._all() if seen.why)
        folders = sorted(("/".join(place.names) + "/", why) for place, why in self._unusable.items())
        return [{"name": name, "why": why} for name, why in (folders + files)[:_MOST_LEFT]]

    def left_by_folder(self) -> Iterator[tuple[tuple[str, ...], dict[str, str]]]:
        """Yield each folder, as names below the inbox, and up to 100 files that could not be taken: {name: reason}."""
        for place, known in self._candidates.items():
            left = ((os.fsdecode(name), seen.why) for name, seen in known.items() if seen.why)
            yield place.names, dict(itertools.islice(left, _MOST_LEFT))

    def unknown_folders(self) -> list[dict[str, str | None]]:
        """Return up to 100 visible folders of the inbox that are not used, as {"name", "nearest": similar track}."""
        known = {*self._settings.track_names, DONE, REJECTED, HELDOUT} - {"default"}
        with os.scandir(self.inbox.root().fd) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        unknown = [name for name in names if name not in known and not name.startswith(".")][:_MOST_LEFT]
        return [{"name": printable(name), "nearest": nearest(name, self._settings.track_names)} for name in unknown]

    def _all(self) -> Iterator[tuple[WatchedFolder, bytes, _Candidate]]:
        for place, known in self._candidates.items():
            for name, candidate in known.items():
                yield place, name, candidate

    def _refresh(self) -> None:
        """Open and watch every usable folder; open it again if it was replaced. Raises `InboxUnusable`."""
        for name in (DONE, REJECTED):
            self.inbox.closed(name)
        for place in watched_folders(self._settings):
            old = self._open.get(place)
            try:
                folder = self.inbox.shared(*place.names)
                if old is None or not os.path.samestat(os.fstat(folder.fd), os.fstat(old.fd)):
                    self._forget(place)
                    self._open[place] = folder
                if self._observer is not None and place not in self._watches:
                    self._watches[place] = self._observer.schedule(
                        self._handler, self._open[place].path, event_filter=_EVENTS, follow_symlink=True
                    )
            except (InboxUnusable, OSError) as error:
                self._forget(place)
                self._give_up(place, error)
            else:
                self._unusable.pop(place, None)

    def _forget(self, place: WatchedFolder) -> None:
        """Stop watching a folder that was replaced or cannot be used."""
        if self._open.pop(place, None) is not None:
            log.warning("inbox_folder_replaced", folder=str(place.path))
        watch = self._watches.pop(place, None)
        if watch is not None and self._observer is not None:
            self._observer.unschedule(watch)
        self._candidates.pop(place, None)

    def _give_up(self, place: WatchedFolder, error: InboxUnusable | OSError) -> None:
        """Record why a folder cannot be used. Raises `InboxUnusable` if it is the inbox itself."""
        if not place.names:
            raise error if isinstance(error, InboxUnusable) else InboxUnusable(f"{place.path}: {error.strerror}")
        why = f"{error.message}; {error.hint}" if isinstance(error, InboxUnusable) else str(error)
        if self._unusable.get(place) != why:
            log.warning("inbox_folder_unusable", folder=str(place.path), why=why)
        self._unusable[place] = why

    def _is_complete(self, folder: Folder, name: bytes, candidate: _Candidate, now: float) -> bool:
        quiet = now - candidate.since >= self._settings.intake.settle_seconds
        candidate.has_writer = candidate.given = False
        if not quiet and not self._handler.was_renamed((folder.path, name)):
            return False
        # `None` if not known: the file system has no leases, our rights allow none, or the file is not regular.
        asked = stat.S_ISREG(candidate.info.st_mode) and self._settings.observer == "native"
        writer = has_writer(name, folder.fd) if asked else None
        candidate.has_writer = quiet and writer is True
        # Without a sure answer about writers a rename proves nothing: the settle time decides.
        candidate.given = writer is False or (quiet and writer is None)
        return candidate.given


def _shape(info: os.stat_result) -> tuple[str, int]:
    """Return what must not change while a file settles."""
    return identity(info), info.st_mtime_ns


def _listing(folder: Folder) -> dict[bytes, os.stat_result]:
    """Return name → stat result of the files in a folder, without ignored names and subfolders."""
    files = {}
    with os.scandir(folder.fd) as entries:
        for entry in entries:
            name = os.fsencode(entry.name)
            # A mounted file system may refuse every call: such an entry is ignored.
            with contextlib.suppress(OSError):
                if not is_skipped(name) and not entry.is_dir(follow_symlinks=False):
                    files[name] = entry.stat(follow_symlinks=False)
    return files


def _shown(place: WatchedFolder, name: bytes) -> str:
    return printable("/".join((*place.names, os.fsdecode(name))))


def has_writer(name: bytes, dir_fd: int) -> bool | None:
    """
    Return whether any process has the regular file `name` open or mapped for writing; `None` if not known.

    Not known: not allowed, not supported, not readable, or not a regular file. For local file systems only: a network
    file system may refuse a lease for other reasons.
    """
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, dir_fd=dir_fd)
    except OSError:
        return None
    try:
        return not take_read_lease(fd)
    except OSError as error:
        if error.errno in _NO_ANSWER:
            return None
        raise
    finally:
        # Closing gives the lease back.
        os.close(fd)


def take_read_lease(fd: int) -> bool:
    """
    Take a read lease on an open file, held until it is closed; return `False` if a process has it open for writing.

    A process that opens the file for writing while the lease is held would cause SIGIO here, which ends this process by
    default; the signal is changed to SIGURG, which is ignored. Raises `OSError` where leases do not work.
    """
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return False
    return True


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
            # An event may be newer than the listing: keep files that exist now for the next scan.
            self._renamed = {
                key for key in self._renamed if key in seen or os.path.lexists(key[0] / os.fsdecode(key[1]))
            }


def _key(path: bytes | str) -> tuple[Path, bytes]:
    folder, name = os.path.split(os.fsencode(path))
    return Path(os.fsdecode(folder)), name


class _Arrivals(InotifyFullEmitter):
    """
    Reports files that arrive, distinguishing moved ("full") from created ones, and none that leave.

    The library delays each departure by half a second to learn its target, and all later events with it: after a file
    was moved out of the inbox, a file renamed into it would be noticed that much later.
    """

    def get_event_mask_from_filter(self) -> Mask:
        return Mask(super().get_event_mask_from_filter() & ~InotifyConstants.IN_MOVED_FROM)


class _ArrivalsObserver(InotifyObserver):
    """The library's inotify observer with `_Arrivals` as its emitter."""

    def __init__(self) -> None:
        super().__init__()
        self._emitter_class = _Arrivals


def _observer(kind: str) -> BaseObserver:
    """Return a polling observer for "polling", otherwise the inotify observer."""
    return PollingObserver() if kind == "polling" else _ArrivalsObserver()
