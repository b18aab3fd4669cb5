"""
Previews: while no run is going, a track's champion answers records of a drop that waits for its first run.

A preview is advice, and no run: it is one attempt, by the protocol of all steps, in the folder of the run that made the
champion. A run that becomes due waits for it, ten minutes at most. If it fails or takes longer, it is not repeated; if
a stop of the daemon interrupted it, it begins again.
"""

import shutil
import time
import uuid
from contextlib import suppress

import structlog
from sqlalchemy import Engine, text

from daemon.dispatch.spool import Executor, JobState
from daemon.dispatch.step_specs import compose, spec_of
from daemon.settings.model import Settings
from daemon.state import run_files
from daemon.state.database import ChangeWatch, transaction
from daemon.state.events import record_event
from daemon.state.tables import Attempt, Drop, Run, Track
from pipeline import durable
from pipeline.artifacts import Preview
from pipeline.contract import SPEC_NAME, StepSpec
from pipeline.steps import PREVIEW

_MOST_SECONDS = 600.0
#: The drops that may be tried, each with the runs that made its track's champion; a base model was made by none.
_UNTRIED = """
SELECT "drop".id, "drop".track, promotion.run_id FROM "drop" JOIN track ON track.name = "drop".track
JOIN promotion ON promotion.track = track.name AND promotion.model_id = champion_model_id
WHERE "drop".state = 'accepted' AND role = 'train' AND first_run IS NULL AND preview IS NULL AND paused IS NULL
AND metric IS NOT NULL AND promotion.run_id IS NOT NULL ORDER BY "drop".id, promotion.id DESC
"""
log = structlog.get_logger()


class Previews:
    """Has one preview at a time made."""

    def __init__(self, engine: Engine, settings: Settings, executor: Executor) -> None:
        """Submit attempts to `executor`."""
        self._engine, self._settings, self._executor = engine, settings, executor
        self._changes = ChangeWatch(engine)
        #: The attempt that is going, and until when it may, by the monotonic clock.
        self._spec: StepSpec | None = None
        self._until, self._again = 0.0, False

    @property
    def words(self) -> str:
        """The preview that is going, for people; empty if there is none."""
        return "" if self._spec is None else f"the champion answers records of drop {self._spec.attempt}"

    def tick(self, now: int, *, may_begin: bool) -> None:
        """Store what came of an attempt that has ended or takes too long, or begin the next one."""
        spec = self._spec
        if spec is None:
            if may_begin and (self._changes.changed() or self._again):
                self._again = False
                self._begin(now)
        elif time.monotonic() >= self._until or self._executor.poll(spec) is JobState.ENDED:
            self._spec = None
            self._end(spec, now)

    def _begin(self, now: int) -> None:
        """Submit the attempt at the oldest drop that was not tried, or go on with that of an earlier daemon."""
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
        try:
            spec = StepSpec.model_validate_json(durable.read_regular(folder / SPEC_NAME))
        except (OSError, ValueError):  # there is none, or it is damaged
            shutil.rmtree(folder, ignore_errors=True)
        self._spec, self._until = spec, time.monotonic() + _MOST_SECONDS
        self._executor.submit(spec)
        log.info("preview_submitted", drop=spec.attempt)

    def _end(self, spec: StepSpec, now: int) -> None:
        """Store what came of an attempt unless it is to begin again; without its folder its process stops."""
        made, why, again = None, "its result cannot be read", False
        with suppress(ValueError):
            result = run_files.read_result(spec)
            if result is None or result.status == "interrupted":  # not its own, if it is in time
                why, again = f"it took {_MOST_SECONDS:g} s", time.monotonic() < self._until
            elif result.status == "ok":
                made = Preview.model_validate(result.artifact)
            elif result.error is not None:
                why = result.error.message
        if not again:
            if made is None:
                log.warning("drop_not_previewed", drop=spec.attempt, error=why)
            self._store(spec, made or Preview(records=0), now)
        folder = self._settings.work_folder / spec.folder
        shutil.rmtree(folder, ignore_errors=True)
        self._again = again and not folder.exists()

    def _store(self, spec: StepSpec, made: Preview, now: int) -> None:
        with transaction(self._engine) as session:
            drop, verdict = session.get_one(Drop, spec.attempt), session.get_one(Run, spec.run).verdict or {}
            if made.metric == verdict.get("metric") and isinstance(score := verdict.get("candidate_score"), float):
                made = made.model_copy(update={"usual": score})
            drop.preview = made.model_dump(mode="json")
            session.add(drop)
            if made.points is not None:
                record_event(session, "drop_previewed", now, track=drop.track, drop_id=drop.id, points=made.points)
