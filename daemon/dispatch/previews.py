"""
Previews: while no run is going, a track's champion answers records of a drop that waits for its first run.

A preview is advice, and no run: it is one attempt, by the protocol of all steps, in the folder of the run that made the
champion. It is cancelled when a run is claimed or the daemon stops, and begins again later. If it fails, its process
vanished included, it is not repeated.
"""

import shutil
import uuid
from contextlib import suppress
from pathlib import Path

import structlog
from sqlalchemy import Engine, text

from daemon.dispatch.spool import Executor, JobState
from daemon.dispatch.step_specs import compose, spec_of
from daemon.settings.model import Settings
from daemon.state import run_files
from daemon.state.database import ChangeWatch, transaction
from daemon.state.events import record_event
from daemon.state.states import DropState
from daemon.state.tables import Attempt, Drop, Run, Track
from pipeline.artifacts import Preview
from pipeline.contract import StepSpec
from pipeline.steps import PREVIEW

#: The drops that have no preview, each with the runs that trained its track's champion, on other drops.
_UNTRIED = """
SELECT "drop".id, "drop".track, promotion.run_id FROM "drop" JOIN track ON track.name = "drop".track
JOIN promotion ON promotion.track = track.name AND promotion.model_id = champion_model_id
WHERE "drop".state = 'accepted' AND role = 'train' AND first_run IS NULL AND preview IS NULL AND paused IS NULL
AND metric IS NOT NULL AND promotion.run_id IS NOT NULL
AND "drop".id NOT IN (SELECT value FROM json_each(promotion.drops)) ORDER BY "drop".id, promotion.id DESC
"""
log = structlog.get_logger()


class Previews:
    """Submits previews, one at a time, and stores what they gave."""

    def __init__(self, engine: Engine, settings: Settings, executor: Executor) -> None:
        """Submit attempts to `executor`."""
        self._engine, self._settings, self._executor = engine, settings, executor
        self._changes = ChangeWatch(engine)
        self._spec: StepSpec | None = None
        #: Whether the next attempt is due though the database has not changed.
        self._again = False

    @property
    def words(self) -> str:
        """The running preview, as words for people; empty if there is none."""
        return "" if self._spec is None else f"the champion answers records of drop {self._spec.attempt}"

    def recover(self, queue: Path) -> None:
        """Remove what a daemon that died left of its previews: their orders in `queue`, and their folders."""
        for entry in queue.glob(f"*-{PREVIEW.name}-*.json"):
            with suppress(OSError):  # else the worker removes it
                entry.unlink()
        for folder in self._settings.work_folder.glob(f"runs/*/attempts/{PREVIEW.name}-*"):
            shutil.rmtree(folder, ignore_errors=True)  # a process that is at work there sees that and stops

    def tick(self, now: int, *, may_run: bool) -> None:
        """Begin a preview if it `may_run` and the database has changed, cancel one that may not, store an ended one."""
        spec = self._spec
        if spec is None:
            if may_run and (self._changes.changed() or self._again):
                self._again = True  # should it fail
                self._begin(now)
                self._again = False
        elif self._executor.poll(spec) is JobState.ENDED:
            self._end(spec, now)
            self._spec = None
        elif not may_run:
            self._executor.cancel(spec.key)

    def _begin(self, now: int) -> None:
        """Submit a preview of the first drop of `_UNTRIED` in a track of today's settings; do nothing without one."""
        with transaction(self._engine) as session:
            rows = session.connection().execute(text(_UNTRIED)).all()
            row = next((row for row in rows if row.track in self._settings.track_names), None)
            if row is None:
                return
            run, track = session.get_one(Run, row.run_id), session.get_one(Track, row.track)
            session.expunge(run)
        run.config = compose(self._settings, track).model_dump(mode="json")  # today's, of the spec only
        attempt = Attempt(run_id=row.run_id, step=PREVIEW.name, number=row.id, fence=uuid.uuid4().hex, started_at=now)
        spec = spec_of(self._engine, self._settings, run, attempt, {})
        folder = self._settings.work_folder / spec.folder
        if folder.exists():
            shutil.rmtree(folder)
        self._executor.submit(spec)
        self._spec = spec
        log.info("preview_submitted", drop=spec.attempt)

    def _end(self, spec: StepSpec, now: int) -> None:
        """Store a preview in its drop, an empty one if it failed; repeat an interrupted one; remove its folder."""
        made, why = None, "its result cannot be read"
        with suppress(ValueError):
            result = run_files.read_result(spec)
            if result is None or result.status == "interrupted":  # `None`: it is of an earlier attempt
                self._again = True
            elif result.status == "ok":
                made = Preview.model_validate(result.artifact)
            elif result.error is not None:
                why = result.error.message
        if not self._again:
            if made is None:
                log.warning("drop_not_previewed", drop=spec.attempt, error=why)
            self._store(spec, made or Preview(records=0), now)
        shutil.rmtree(self._settings.work_folder / spec.folder, ignore_errors=True)

    def _store(self, spec: StepSpec, made: Preview, now: int) -> None:
        with transaction(self._engine) as session:
            drop, verdict = session.get_one(Drop, spec.attempt), session.get_one(Run, spec.run).verdict or {}
            if made.metric == verdict.get("metric") and isinstance(score := verdict.get("candidate_score"), float):
                made = made.model_copy(update={"usual": score})
            drop.preview = made.model_dump(mode="json")
            session.add(drop)
            if made.points is not None and drop.state == DropState.ACCEPTED:
                record_event(session, "drop_previewed", now, track=drop.track, drop_id=drop.id, points=made.points)
