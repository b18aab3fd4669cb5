"""Maintain what all runs share: champions' links, base models, free disk space, garbage collection."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

import structlog
from sqlalchemy import Engine

from daemon.champions import promotion
from daemon.champions.base_models import Bases
from daemon.inbox.answers import rejected
from daemon.settings.model import Settings
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.troubles import Troubles
from daemon.storage import gc
from daemon.storage.disk import Disk
from daemon.system.sd_notify import notify

_MAINTENANCE_MS = 30_000
log = structlog.get_logger()


class Upkeep:
    """Repairs links, checks base models and disk space, and collects garbage, when the dispatcher calls it."""

    def __init__(self, engine: Engine, settings: Settings, troubles: Troubles) -> None:
        """Use the folders of `settings`; problems go to `troubles`."""
        self._engine, self._settings, self._troubles = engine, settings, troubles
        self._root = settings.work_folder
        self._maintained_at = -_MAINTENANCE_MS
        self.bases = Bases(engine, settings)
        self.disk = Disk(settings)
        self._was_low = False
        #: Whether there may be something to collect: after a start, after a run, when a night begins.
        self.may_collect = True
        self._collector = ThreadPoolExecutor(max_workers=1, thread_name_prefix="collector")
        self._collection: Future[None] = self._collector.submit(lambda: None)
        self._cleared: set[tuple[int, int]] = set()

    def is_disk_low(self, now: int) -> bool:
        """Return whether free disk space is below the low-water mark; record and log a change, and tell systemd."""
        words = self.disk.shortage()
        if bool(words) != self._was_low:
            with transaction(self._engine) as session:
                kind = "disk_low" if words else "disk_has_room"
                record_event(session, kind, now, free_bytes=self.disk.least_free_bytes())
            self._was_low = bool(words)
            log.warning("disk_low", why=words) if words else log.info("disk_has_room")
            notify(f"STATUS={words or 'the disk has room again'}")
        return self._was_low

    def maintain(self, now: int) -> None:
        """Repair champion links and check base models, at most every 30 seconds; problems become troubles."""
        # The clock may be set back: then the last look lies ahead.
        if abs(now - self._maintained_at) < _MAINTENANCE_MS:
            return
        self._maintained_at = now
        for track in promotion.tracks_with_champion(self._engine):
            with self._troubles.alone(f"track {track}"):
                promotion.mend_links(self._engine, self._root, track)
        self.bases.refresh(now)
        for name in self._settings.track_names:
            self._troubles.note(f"base model of track {name}", self.bases.problem(name))

    def collect_garbage(self, now: int) -> None:
        """Clear `may_collect` and begin a collection in a thread, if it and `gc.automatic` are set and none goes on."""
        if self.may_collect and self._settings.gc.automatic and self._collection.done():
            self.may_collect = False
            self._collection = self._collector.submit(self._collect, now)

    def finish(self) -> None:
        """Wait for the end of a running collection."""
        wait([self._collection])

    def _collect(self, now: int) -> None:
        """Remove models, run files and rejected files that nothing needs; the first error becomes a trouble."""
        error: Exception | None = None
        for collect in (partial(gc.collect, cleared=self._cleared), rejected.collect):
            try:
                collect(self._engine, self._settings, now)
            except Exception as refused:  # noqa: BLE001 - it is a trouble in `status`, and runs go on
                error = error or refused
        self._troubles.note("garbage collection", error)
