"""What is seen to beside the work on runs: the champions' links, bases, garbage, the GPU, waits."""

from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import Engine

from daemon.champions import promotion
from daemon.champions.base_models import Bases
from daemon.dispatch.spool import Spool
from daemon.inbox.answers import rejected
from daemon.inbox.folders import InboxUnusable
from daemon.queue import order, run_queue
from daemon.settings.model import Settings
from daemon.state import run_files
from daemon.state.troubles import Troubles
from daemon.storage import gc
from daemon.system.sd_notify import showing_life
from pipeline.steps import STEPS

_LOOK_MS = 30_000


class Upkeep:
    """Looks twice a minute; what a track or a collection runs into goes into `troubles`."""

    def __init__(self, engine: Engine, settings: Settings, troubles: Troubles) -> None:
        """See to the state folder of `settings`."""
        self._engine = engine
        self._settings = settings
        self._troubles = troubles
        self._bases_at = self._settled_at = -_LOOK_MS
        quiet = [settings.track(name).run_after_quiet_seconds for name in settings.track_names]
        self._longest_wait_ms = max(run_queue.LONGEST_BACKOFF_MS, round(1000 * max(quiet)))
        self.bases = Bases(engine, settings)

    def settle(self, now: int) -> None:
        """Make the champions' links equal to the rows, and shorten waits by a clock that was ahead; twice a minute."""
        # The clock may be set back: then the last look lies ahead.
        if abs(now - self._settled_at) < _LOOK_MS:
            return
        self._settled_at = now
        order.shorten_waits(self._engine, now, self._longest_wait_ms)
        for track, error in promotion.sync_links(self._engine, self._settings.state_folder).items():
            self._tell(f"track {track}", error)

    def refresh_bases(self, now: int) -> None:
        """Look at the base models again, if that was not done just now."""
        if abs(now - self._bases_at) < _LOOK_MS:
            return
        self._bases_at = now
        self.bases.refresh(now)
        for name in self._settings.track_names:
            self._tell(f"base model of track {name}", self.bases.problem(name))

    def collect_garbage(self, now: int) -> None:
        """Remove what nothing needs any more."""
        error: Exception | None = showing_life(gc.collect_quietly, self._engine, self._settings, now)
        try:
            showing_life(rejected.collect, self._engine, self._settings, now)
        except (OSError, InboxUnusable) as refused:
            error = error or refused
        self._tell("garbage collection", error)

    def _tell(self, whose: str, error: Exception | None) -> None:
        if error is None:
            self._troubles.clear(whose)
        else:
            self._troubles.note(whose, error)


def needs_gpu(state_folder: Path, runs: Iterable[int]) -> bool:
    """Say whether one of these runs has a step before it that needs the GPU, or a step's process is there yet."""
    steps = {step.name for step in STEPS if step.needs_gpu}
    is_before = any(steps.difference(run_files.published(state_folder, run)) for run in runs)
    return is_before or Spool(state_folder).has_living()
