"""The intake's thread: watch the inbox, take complete files, pause after an error."""

import threading
import time
from collections.abc import Callable

import structlog
from sqlalchemy import Engine

from daemon.inbox.answers.folder_texts import keep_notes, write_readmes
from daemon.inbox.answers.verdict_notes import VerdictNotes
from daemon.inbox.intake import Intake
from daemon.inbox.watcher import Settled, Watcher
from daemon.settings.model import Settings
from daemon.state.database import open_reader
from daemon.state.layout import DATABASE_NAME, WATCHER_NOTE
from daemon.state.ownership import OwnFolder, StateFolderGone, require_share
from daemon.storage.disk import Disk, is_full
from daemon.system.clock import now_ms
from pipeline import durable
from pipeline.errors import DropforgeError

TROUBLE_SECONDS = 5.0
#: Texts are written after so many seconds without a new file, and at the latest after the second number.
_QUIET_SECONDS, _LONGEST_WAIT = 0.2, 10.0
log = structlog.get_logger()


class IntakeLoop:
    """The thread that records complete files of the inbox as drops, and writes README.txt and notes there."""

    def __init__(self, engine: Engine, settings: Settings, folder: OwnFolder, poke: Callable[[], None]) -> None:
        """
        Make an `Intake`, with its folders, and prepare to watch the inbox of `settings`.

        The thread calls `poke` after a scan that took files, if the state folder is gone, and when it ends by an error.
        """
        self._folder, self._poke = folder, poke
        self.wake = threading.Event()
        self.stop = threading.Event()
        self._settings = settings
        self._watcher = Watcher(settings, self.wake)
        self._intake = Intake(engine, settings)
        self._verdicts: VerdictNotes | None = None
        self._texts_due = 0.0
        self._disk = Disk(settings)
        self._note: object = None
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="intake")

    def start(self) -> None:
        """Lock and prepare the inbox and start the thread. Raises `InboxUnusable`, also if another daemon locked it."""
        self._watcher.inbox.lock()
        self._watcher.start()
        self._thread.start()

    def finish(self) -> None:
        """Stop the thread after the current file and wait for it; other files stay in the inbox."""
        self.stop.set()
        self.wake.set()
        self._thread.join()
        self._watcher.stop()

    def require_alive(self) -> None:
        """Raise `DropforgeError` if the thread has ended with an exception."""
        if self._ended is not None:
            message = f"the thread that takes files in has ended: {type(self._ended).__name__}: {self._ended}"
            raise DropforgeError(message, "start the daemon again; this is a defect, please report it") from self._ended

    def _run(self) -> None:
        try:
            while not self.stop.is_set():
                self.wake.wait(self._turn())
                self.wake.clear()
        except BaseException as error:
            self._ended = error
            log.exception("intake_ended")
            self._poke()

    def _turn(self) -> float:
        """Take settled files, then write texts; return the seconds until the next scan: 5 after an error, logged."""
        try:
            require_share(self._settings)
            if self._scan() and time.monotonic() < self._texts_due:
                return _QUIET_SECONDS
            if self._write_texts():
                return 0
            due = self._watcher.next_due(time.monotonic())
        except Exception as error:  # the thread must outlive whatever one file or a full disk does to it
            if self._is_ending():
                self._poke()
            elif isinstance(error, DropforgeError):
                log.warning("intake_trouble", error=error.message, hint=error.hint)
            elif is_full(error):
                log.warning("disk_full", error=str(error))
            else:
                log.exception("intake_trouble")
        else:
            pause = self._settings.reconcile_seconds
            return pause if due is None else min(pause, max(due, 0.05))
        return TROUBLE_SECONDS

    def _is_ending(self) -> bool:
        """Return whether the state folder is gone: the main loop then logs that and ends the daemon."""
        try:
            self._folder.require_there()
        except StateFolderGone:
            return True
        return False

    def _scan(self) -> bool:
        """Take settled files, or postpone them while disk space is short; return whether any was taken."""
        taken, shortage = False, ""
        # Files that need no approval first: anybody may drop any number of files that need it.
        for settled in sorted(self._watcher.scan(time.monotonic()), key=self._intake.limit.needs_approval):
            if self.stop.is_set():
                break
            shortage = shortage or self._disk.shortage()
            if shortage:
                self._watcher.postpone(settled, shortage, time.monotonic(), pauses=False)
            else:
                taken |= self._take(settled)
        if taken:
            # Once, not after each file: the main loop would take a fifth of the processor from a thousand files.
            self._poke()
        self._write_note()
        return taken

    def _take(self, settled: Settled) -> bool:
        """
        Take one file and return whether it was recorded and moved; otherwise it is postponed or found again.

        Raises only at a full disk, or if the state folder is gone.
        """
        try:
            outcome = self._intake.take(settled, now_ms())
        except Exception as error:
            if is_full(error) or self._is_ending():
                raise  # there was room for the file when it was checked: there is none for others now
            self._watcher.postpone(settled, f"it could not be taken: {error}", time.monotonic())
            log.warning("file_trouble", track=settled.track, name=settled.name, error=str(error), exc_info=True)
            return False
        if outcome.drop is not None:
            log.info("file_taken", **vars(outcome))
            return True
        log.debug("file_left", **vars(outcome))
        if outcome.kind not in {"changed", "gone"}:
            # The limit of waiting training drops is looked up without opening the file: at every scan.
            pauses = outcome.kind != "queue_full" or settled.role == "heldout"
            self._watcher.postpone(settled, outcome.message, time.monotonic(), pauses=pauses)
        return False

    def _write_texts(self) -> bool:
        """Write README.txt (once) and verdict notes, unless disk space is short; return whether notes are pending."""
        if self.stop.is_set() or self._disk.shortage():
            return False
        settings, inbox = self._settings, self._watcher.inbox
        if self._verdicts is None:
            write_readmes(settings, inbox)
            self._verdicts = VerdictNotes(open_reader(settings.state_folder / DATABASE_NAME), settings, inbox)
        more = self._verdicts.refresh()
        self._texts_due = time.monotonic() + _LONGEST_WAIT
        return more

    def _write_note(self) -> None:
        """Write the files that were not taken to the hint for `dropforge status` and to notes, if they changed."""
        note = {
            "waiting": self._watcher.waiting(),
            "unknown_folders": self._watcher.unknown_folders(),
            "full_tracks": self._intake.limit.full_tracks(),
            "left": self._watcher.left(),
        }
        if note != self._note:
            durable.write_hint(self._settings.state_folder / WATCHER_NOTE, note)
            for folders, left in self._watcher.left_by_folder().items():
                keep_notes(self._watcher.inbox, folders, left)
            self._note = note
