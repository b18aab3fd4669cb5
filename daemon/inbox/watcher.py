"""
Find the files in the inbox that have stopped changing.

Events of the kernel (or of polling) wake a scan, which lists the watched folders. The same scan runs on a timer, so a
file is found even if every event was lost.
"""

import contextlib
import os
import stat
import threading
from dataclasses import dataclass
from typing import NamedTuple

import structlog
from watchdog.events import FileClosedEvent, FileCreatedEvent, FileMovedEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers.api import ObservedWatch
from watchdog.observers.inotify import InotifyFullEmitter, InotifyObserver
from watchdog.observers.inotify_c import InotifyConstants, Mask
from watchdog.observers.polling import PollingObserver

from daemon.inbox.drop_folders import DONE, REJECTED, Folder, WatchedFolder, folder_names, is_skipped, watched_folders
from daemon.inbox.folders import InboxFolders, InboxUnusable
from daemon.inbox.safe_copy import identity
from daemon.settings.model import Settings
from daemon.settings.text import nearest
from daemon.system.processes import has_writer
from pipeline.artifacts import Role
from pipeline.words import printable

#: Seconds between checks of a file that a process still has open for writing.
WRITER_SECONDS = 1.0
_EVENTS: list[type[FileSystemEvent]] = [FileClosedEvent, FileMovedEvent, FileCreatedEvent]
#: Seconds before a file that could not be taken is tried again; doubled at each further failure of the same file.
_FIRST_PAUSE = 5.0
_LONGEST_PAUSE = 600.0
#: Most files listed for `dropforge status` that could not be taken.
_MOST_LEFT = 100
log = structlog.get_logger()


class Settled(NamedTuple):
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
    due: float | None = None
    """When it may be complete, or is tried again after a failure; `None` once it was given to be taken."""
    has_writer: bool = False
    failures: int = 0
    why: str = ""
    """Why it could not be taken."""


def make_inbox(settings: Settings) -> None:
    """Create the inbox, each declared track's folders for drops, `done` and `rejected`. Raises `InboxUnusable`."""
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
        self._observer: PollingObserver | InotifyObserver | None = None
        #: The usable folders, open, and their watches: a file is identified by its folder's descriptor and its name.
        self._open: dict[WatchedFolder, tuple[Folder, ObservedWatch | None]] = {}
        self._candidates: dict[Settled, _Candidate] = {}
        #: The folders that cannot be used, and why.
        self._unusable: dict[WatchedFolder, str] = {}

    def start(self) -> None:
        """Create the inbox's folders and watch them. Raises `InboxUnusable` for the inbox, `done` or `rejected`."""
        self._observer = PollingObserver() if self._settings.observer == "polling" else _ArrivalsObserver()
        self._observer.start()
        self._refresh()

    def stop(self) -> None:
        """Stop watching for events; do nothing if that was not started."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()
            self._observer = None

    def scan(self, now: float) -> list[Settled]:
        """
        List the inbox and return the files that are complete, in the order of their last change.

        `now` is monotonic, in seconds. A file is complete when scans saw it unchanged for `intake.settle_seconds`, or
        it was renamed into place, and no process has it open for writing; where open files cannot be checked, a rename
        does not count. Names that `is_skipped` ignores are left out. A file that stays in the inbox is returned by each
        scan except while it is postponed. Raises `InboxUnusable` if the inbox, `done/` or `rejected/` cannot be used.
        """
        self._refresh()
        settled: list[tuple[int, bytes, Settled]] = []
        candidates: dict[Settled, _Candidate] = {}
        for place, (folder, _) in self._open.items():
            for name, info in _listing(folder).items():
                file = Settled(place.track, place.role, name)
                seen = self._candidates.get(file)
                if seen is None or identity(seen.info) != identity(info):
                    seen = _Candidate(info, now)
                candidates[file] = seen
                is_paused = seen.failures and seen.due is not None and now < seen.due
                if not is_paused and self._is_complete(folder, name, seen, now):
                    settled.append((info.st_ctime_ns, name, file))
        self._candidates = candidates
        self._handler.forget_vanished()
        return [file for *_, file in sorted(settled)]

    def postpone(self, settled: Settled, why: str, now: float, *, pauses: bool = True) -> None:
        """
        Leave a file of the last scan out of scans for 5 s, doubled at each failure up to 10 minutes, or until changed.

        Meanwhile and until it changes, `left` gives the reason `why`. Unless it `pauses`, each scan returns it again.
        `now` is monotonic, in seconds. Raises `KeyError` for any other file.
        """
        seen = self._candidates[settled]
        seen.why = why
        if pauses:
            seen.due = now + min(_FIRST_PAUSE * 2**seen.failures, _LONGEST_PAUSE)
            seen.failures = min(seen.failures + 1, 10)

    def next_due(self, now: float) -> float | None:
        """Return the seconds until a file may be complete or is tried again; `None` if no file is pending."""
        due = min((seen.due for seen in self._candidates.values() if seen.due is not None), default=None)
        return None if due is None else max(due - now, 0.0)

    def waiting(self) -> list[str]:
        """Return files, relative to the inbox and sorted, that are quiet but open for writing; at most 100."""
        return sorted(_shown(file) for file, seen in self._candidates.items() if seen.has_writer)[:_MOST_LEFT]

    def left(self) -> list[dict[str, str]]:
        """Return up to 100 folders, then files, that could not be used or taken, by name, as {"name", "why"}."""
        files = sorted((_shown(file), seen.why) for file, seen in self._candidates.items() if seen.why)
        folders = sorted(("/".join(place.names) + "/", why) for place, why in self._unusable.items())
        return [{"name": name, "why": why} for name, why in (folders + files)[:_MOST_LEFT]]

    def left_by_folder(self) -> dict[tuple[str, ...], dict[str, str]]:
        """Map each usable folder, as names below the inbox, to {name: reason} of up to 100 files that are left."""
        reasons: dict[tuple[str, ...], dict[str, str]] = {place.names: {} for place in self._open}
        for file, seen in self._candidates.items():
            if seen.why and len(reasons[file.folders]) < _MOST_LEFT:
                reasons[file.folders][os.fsdecode(file.name)] = seen.why
        return reasons

    def unknown_folders(self) -> list[dict[str, str | None]]:
        """Return up to 100 visible folders without a track, sorted, as {"name", "nearest": similar track or `None`}."""
        known = {DONE, REJECTED, *(place.names[0] for place in watched_folders(self._settings) if place.names)}
        with os.scandir(self.inbox.root().fd) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        unknown = [name for name in names if name not in known and not name.startswith(".")][:_MOST_LEFT]
        return [{"name": printable(name), "nearest": nearest(name, self._settings.track_names)} for name in unknown]

    def _refresh(self) -> None:
        """Open and watch each folder, again if it was replaced; `_give_up` those that fail. Raises `InboxUnusable`."""
        for name in (DONE, REJECTED):
            self.inbox.closed(name)
        for place in watched_folders(self._settings):
            old, _ = self._open.get(place, (None, None))
            try:
                folder = self.inbox.shared(*place.names)
                if old is None or not os.path.samestat(os.fstat(folder.fd), os.fstat(old.fd)):
                    if old is not None:
                        log.warning("inbox_folder_replaced", folder=str(place.path))
                    self._forget(place)
                    self._open[place] = folder, self._watch(folder)
            except (InboxUnusable, OSError) as error:
                self._forget(place)
                self._give_up(place, error)
            else:
                self._unusable.pop(place, None)

    def _watch(self, folder: Folder) -> ObservedWatch | None:
        if self._observer is None:
            return None
        return self._observer.schedule(self._handler, folder.path, event_filter=_EVENTS, follow_symlink=True)

    def _forget(self, place: WatchedFolder) -> None:
        """Stop watching a folder that was replaced or cannot be used."""
        _, watch = self._open.pop(place, (None, None))
        if watch is not None and self._observer is not None:
            self._observer.unschedule(watch)

    def _give_up(self, place: WatchedFolder, error: InboxUnusable | OSError) -> None:
        """Record why a folder cannot be used. Raises `InboxUnusable` if it is the inbox itself."""
        if not place.names:
            raise error if isinstance(error, InboxUnusable) else InboxUnusable(f"{place.path}: {error.strerror}")
        why = f"{error.message}; {error.hint}" if isinstance(error, InboxUnusable) else str(error)
        if self._unusable.get(place) != why:
            log.warning("inbox_folder_unusable", folder=str(place.path), why=why)
        self._unusable[place] = why

    def _is_complete(self, folder: Folder, name: bytes, candidate: _Candidate, now: float) -> bool:
        """Return whether a file is complete; if it is not, set when it may be."""
        quiet_at = candidate.since + self._settings.intake.settle_seconds
        quiet, candidate.due, candidate.has_writer = now >= quiet_at, quiet_at, False
        if not quiet and not self._handler.was_renamed(os.fsencode(folder.path / os.fsdecode(name))):
            return False
        # `None` if not known: the file system has no leases, our rights allow none, or the file is not regular.
        asked = stat.S_ISREG(candidate.info.st_mode) and self._settings.observer == "native"
        writer = has_writer(name, folder.fd) if asked else None
        if quiet and writer is True:
            candidate.has_writer, candidate.due = True, now + WRITER_SECONDS
        # Without a sure answer about writers a rename proves nothing: the settle time decides.
        elif writer is False or quiet:
            candidate.due = None
        return candidate.due is None


def _listing(folder: Folder) -> dict[bytes, os.stat_result]:
    """Map each name in a folder to its `lstat` result, without ignored names, subfolders and what cannot be read."""
    files = {}
    with os.scandir(folder.fd) as entries:
        for entry in entries:
            name = os.fsencode(entry.name)
            # A mounted file system may refuse every call: such an entry is ignored.
            with contextlib.suppress(OSError):
                if not is_skipped(name) and not entry.is_dir(follow_symlinks=False):
                    files[name] = entry.stat(follow_symlinks=False)
    return files


def _shown(file: Settled) -> str:
    return printable("/".join((*file.folders, os.fsdecode(file.name))))


class _Waker(FileSystemEventHandler):
    """Wakes the scan and remembers which files were renamed into place."""

    def __init__(self, wake: threading.Event) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._renamed: set[bytes] = set()

    def on_any_event(self, event: FileSystemEvent) -> None:
        with self._lock:
            if isinstance(event, FileMovedEvent):
                if event.dest_path:
                    self._renamed.add(os.fsencode(event.dest_path))
            else:
                # It was made or written in place, whatever happened to that name before.
                self._renamed.discard(os.fsencode(event.src_path))
        self._wake.set()

    def was_renamed(self, path: bytes) -> bool:
        with self._lock:
            return path in self._renamed

    def forget_vanished(self) -> None:
        with self._lock:
            self._renamed = set(filter(os.path.lexists, self._renamed))


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
