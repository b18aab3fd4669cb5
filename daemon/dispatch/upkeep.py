"""Maintain what all runs share: champions' links, base models, free disk space, garbage collection."""

import structlog
from sqlalchemy import Engine

from daemon.champions import promotion
from daemon.champions.base_models import Bases
from daemon.inbox.answers import rejected
from daemon.inbox.folders import InboxUnusable
from daemon.settings.model import Settings
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.troubles import Troubles
from daemon.storage import gc
from daemon.storage.disk import Disk
from daemon.system.sd_notify import notify, showing_life

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

    def is_disk_low(self, now: int) -> bool:
        """Return whether free disk space is below the low-water mark; record an event when that changes."""
        words = self.disk.shortage()
        if bool(words) != self._was_low:
            with transaction(self._engine) as session:
                kind = "disk_low" if words else "disk_has_room"
                record_event(session, kind, now, free_bytes=self.disk.free_bytes())
            self._was_low = bool(words)
            log.warning("disk_low", why=words) if words else log.info("disk_has_room")
            notify(f"STATUS={words or 'the disk has room again'}")
        return self._was_low

    def maintain(self, now: int) -> None:
        """Every 30 seconds: repair champion links and check base models."""
        # The clock may be set back: then the last look lies ahead.
        if abs(now - self._maintained_at) < _MAINTENANCE_MS:
            return
        self._maintained_at = now
        for track, error in promotion.sync_links(self._engine, self._root).items():
            self._tell(f"track {track}", error)
        self.bases.refresh(now)
        for name in self._settings.track_names:
            self._tell(f"base model of track {name}", self.bases.problem(name))

    def collect_garbage(self, now: int) -> None:
        """Remove models, run files and rejected files that nothing needs; skipped unless `may_collect` is set."""
        if not self.may_collect or not self._settings.gc.automatic:
            return
        self.may_collect = False
        error: Exception | None = None
        for collect in (gc.collect, rejected.collect):
            try:
                showing_life(collect, self._engine, self._settings, now)
            except (OSError, InboxUnusable) as refused:
                error = error or refused
        self._tell("garbage collection", error)

    def _tell(self, whose: str, error: Exception | None) -> None:
        if error is None:
            self._troubles.clear(whose)
        else:
            self._troubles.note(whose, error)
