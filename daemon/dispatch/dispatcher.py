"""
Claims the next run, sends its steps to the executor one by one, publishes what came back, and acts on the verdict.

One `tick` does all that can be done without waiting. All of its state is in the database and the run's folder, so a new
dispatcher after a crash goes on where the files say the old one was. What one run or track has against it in its own
files is that one's alone: it waits, and all others go on. A full disk and a locked database are everybody's.
"""

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session

from daemon.champions import promotion
from daemon.champions.hooks.training import TrainingHooks
from daemon.dispatch.apply_verdict import conclude, fix_measures
from daemon.dispatch.housekeeping import Upkeep, needs_gpu
from daemon.dispatch.spool import JobState, LocalExecutor, Spool
from daemon.dispatch.stale_steps import invalidate, invalidate_stale, is_in_vain
from daemon.dispatch.step_specs import compose, key_of, spec_of, warn_of_fixed
from daemon.queue import order, run_queue, states, suspects
from daemon.settings.model import Settings
from daemon.state import run_files
from daemon.state.database import ChangeWatch, transaction
from daemon.state.events import record_event
from daemon.state.states import AttemptState, RunState
from daemon.state.tables import Attempt, Run
from daemon.state.troubles import RunsApart, Troubles
from daemon.storage import gc
from daemon.storage.disk import Disk, is_full
from daemon.storage.disk_estimate import needed_bytes, of_waiting_drops, still_needed
from daemon.system.sd_notify import notify
from pipeline.artifacts import Verdict
from pipeline.config import RunConfig
from pipeline.contract import SPEC_NAME, Step, StepResult, StepSpec
from pipeline.errors import EXIT_BAD_DATA, EXIT_DISK_FULL, EXIT_START_AGAIN, DiskFull, DropforgeError, StepFailed
from pipeline.steps import next_step

_SIGNAL_EXITS = 128
log = structlog.get_logger()


class Dispatcher:
    """Moves one run at a time through the pipeline."""

    def __init__(
        self, engine: Engine, settings: Settings, executor: LocalExecutor, troubles: Troubles | None = None
    ) -> None:
        """Dispatch for the state folder of `settings`, from `recover` and `tick` on; tracks tell `troubles` theirs."""
        self._engine = engine
        self._settings = settings
        self._root = settings.state_folder
        self._executor = executor
        self._claims: list[states.Claim] = []
        self._cancelling: set[str] = set()
        self._changes = ChangeWatch(engine)
        #: When a run is due that could not be claimed at the last look, and when that was: the clock may be set back.
        self._due: int | None = None
        self._asked_at = 0
        self._apart = RunsApart(settings.state_folder)
        troubles = Troubles() if troubles is None else troubles
        self._upkeep = Upkeep(engine, settings, troubles)
        self._gpu = TrainingHooks(engine, settings, troubles)
        self.bases = self._upkeep.bases
        self.disk = Disk(settings)
        self._was_low = False
        #: Whether there may be something to collect: after a start, after a run, when a night begins.
        self.may_collect = True
        self.draining = False

    def recover(self, now: int) -> None:
        """Finish what a dead daemon left half-done and adopt its runs; the caller holds the state folder's lock."""
        Spool(self._root).remove_leftovers()
        self._upkeep.settle(now)
        self._claims = run_queue.rescue(self._engine, now)
        for claim in list(self._claims):
            log.info("run_adopted", run=claim.run_id)
            try:
                run_files.remove_leftovers(self._root, claim.run_id)
            except OSError as error:
                self._set_apart(claim, error, now)
        self._upkeep.refresh_bases(now)

    @property
    def idle(self) -> bool:
        """Whether no run is in hand."""
        return not self._claims

    def tick(self, now: int) -> None:
        """Do everything that can be done now."""
        low = self._look_at_disk(now)
        self._upkeep.settle(now)
        # With a run in hand too: a base that was replaced must not be judged by, and cached, under the old one's name.
        self._upkeep.refresh_bases(now)
        self._gpu.tick(self._needs_gpu)
        if not self._claims and not self.draining:
            self._collect_garbage(now)
            # Asked twice a second all day long: only where the answer can be another one than last time.
            later = now >= self._asked_at and (self._due is None or now < self._due)
            if later and not self._changes.changed():
                return
            self._asked_at = now
            self._due = now  # should the claim fail, on a full disk say, it is tried again
            suspects.go_on(self._engine, self._settings, now)
            claim = None if low else self._claim(now)
            if claim is None:
                self._due = order.next_due(self._engine)
                return
            self._claims = [claim]
            log.info("run_claimed", run=claim.run_id)
        for claim in list(self._claims):
            try:
                self._work_on(claim, now)
            except states.LostClaim as error:
                log.warning("claim_lost", run=claim.run_id, error=error.message)
                self._drop(claim)
            except (OSError, DBAPIError) as error:
                self._set_apart(claim, error, now)
            except Exception as error:  # one run's trouble must not stop every other track
                log.exception("run_trouble", run=claim.run_id)
                hint = "the daemon's log has the whole story; this is a defect, please report it"
                self._after_failure(claim, f"{type(error).__name__}: {error}"[:2000], hint, now, retryable=False)

    def _look_at_disk(self, now: int) -> bool:
        """Return whether the disk is under the low-water mark, and record a change of that."""
        words = self.disk.shortage()
        if bool(words) != self._was_low:
            with transaction(self._engine) as session:
                kind = "disk_low" if words else "disk_has_room"
                record_event(session, kind, now, free_bytes=self.disk.free_bytes())
            self._was_low = bool(words)
            log.warning("disk_low", why=words) if words else log.info("disk_has_room")
            notify(f"STATUS={words or 'the disk has room again'}")
        return self._was_low

    def describe(self) -> str:
        """Return one line for people: what runs and how far it is."""
        for claim in self._claims:
            attempt = states.open_attempt(self._engine, claim.run_id)
            if attempt is None:
                return f"run {claim.run_id}"
            progress = run_files.load_progress(self._root, claim.run_id, attempt.step, attempt.number)
            return f"run {claim.run_id} {attempt.step if progress is None else progress.words}"
        return self.disk.shortage() or "idle"

    def abandon(self, now: int) -> None:
        """At the end of a shutdown: let every run in hand wait, uncounted, though its step left no result."""
        for claim in list(self._claims):
            attempt = states.open_attempt(self._engine, claim.run_id)
            if attempt is not None:
                # Or the next worker would run what nobody waits for.
                self._executor.cancel(key_of(attempt))
                # Its files stay: the step may be at its last checkpoint.
                words = "the daemon stopped before the step did"
                states.end_attempt(self._engine, claim, attempt.id or 0, states.Ending(AttemptState.LOST, words), now)
            run_queue.interrupt(self._engine, claim, now)
            self._drop(claim)

    def give_gpu_back(self) -> None:
        """After the end of all steps: let the server have its GPU while there is no daemon, and wait for that."""
        self._gpu.finish(self._needs_gpu)

    # --- one claim

    def _claim(self, now: int) -> states.Claim | None:
        """Take the first run in the order of the queue that can go on now; write on those before it why they cannot."""
        with transaction(self._engine) as session:
            for run in order.due_runs(session, now):
                try:
                    if run.config is None:
                        config = self._config_of(session, run, now)
                        if not run_queue.begin(session, run, config, now):
                            continue
                    if run.state == RunState.WAITING:
                        self._require_room(run)
                except DropforgeError as error:
                    run_queue.put_off(session, run, error, now)
                else:
                    return run_queue.claim(session, run, now)
        return None

    def _work_on(self, claim: states.Claim, now: int) -> None:
        """Take every step with a run that can be taken now; one whose published files are damaged fails by name."""
        try:
            while self._advance(claim, now):
                pass
            self._apart.clear(claim.run_id)
        except run_files.ArtifactDamaged as error:
            self._after_failure(claim, error.message, error.hint, now, retryable=False)

    def _advance(self, claim: states.Claim, now: int) -> bool:
        """Take one step with a run; say whether another may follow at once."""
        attempt = states.open_attempt(self._engine, claim.run_id)
        run = self._run(claim)
        if attempt is not None:
            return self._look_at(claim, run, attempt, now)
        if run.cancel_requested and not promotion.has_promoted(self._engine, claim.run_id):
            run_queue.cancelled(self._engine, claim, now)
            log.info("run_cancelled", run=claim.run_id)
            self._drop(claim)
            return False
        invalidate_stale(self._engine, self._root, run, now)
        done, step = self._next(run)
        if step is None:
            return self._conclude(claim, run, now)
        if self.draining:
            run_queue.interrupt(self._engine, claim, now)
            self._drop(claim)
            return False
        if self._may_begin(claim, run, step, now):
            begun = states.begin_attempt(self._engine, claim, step.name, now)
            self._submit(run, begun, done)
            log.info("step_submitted", run=claim.run_id, step=step.name, attempt=begun.number)
        return False

    def _may_begin(self, claim: states.Claim, run: Run, step: Step, now: int) -> bool:
        """Say whether a step can begin now; let its run wait where the disk or the GPU is not free for it."""
        try:
            self._has_room(run, margin=False)
            return not step.needs_gpu or self._gpu.free(run)
        except DropforgeError as error:
            self._postpone(claim, error, now)
            return False

    def _look_at(self, claim: states.Claim, run: Run, attempt: Attempt, now: int) -> bool:
        """See how an open attempt is doing."""
        spec = self._spec_of(attempt)
        if spec is None:
            # The daemon died between the attempt's row and its spec: the same attempt is ordered now, unless what it
            # goes on from stands no more.
            invalidate_stale(self._engine, self._root, run, now)
            done, step = self._next(run)
            if step is None or step.name != attempt.step:
                self._end(claim, attempt, AttemptState.LOST, now, "another step was to be done again before it began")
                return True
            self._submit(run, attempt, done)
            return False
        state = self._executor.poll(spec)
        if state is JobState.LOST and not self._was_ordered(spec):
            self._executor.submit(spec)
        elif state is JobState.LOST:
            self._end(claim, attempt, AttemptState.LOST, now, "its process vanished")
            self._after_death(claim, attempt, f"step {attempt.step}: its process vanished without a result", now)
            return False
        if state is JobState.ENDED:
            return self._collect(claim, attempt, spec, now)
        if spec.key not in self._cancelling and (run.cancel_requested or is_in_vain(self._engine, run, spec)):
            self._executor.cancel(spec.key)
            self._cancelling.add(spec.key)
        return False

    def _collect(self, claim: states.Claim, attempt: Attempt, spec: StepSpec, now: int) -> bool:
        """Act on a result; say whether the run goes on at once."""
        result = run_files.read_result(spec)
        if result is None:
            self._end(claim, attempt, AttemptState.LOST, now, "its result carries another attempt's fence")
            self._after_death(claim, attempt, f"step {spec.step}: its result is not its own", now)
            return False
        if result.status == "ok":
            try:
                with gc.collecting(self._root):
                    artifact = run_files.publish(spec, result)
            except StepFailed as error:
                self._end(claim, attempt, AttemptState.FAILED, now, error.message)
                self._after_failure(claim, error.message, error.hint, now, retryable=True)
                return False
            if isinstance(artifact, Verdict) and artifact.outcome != "insufficient_evidence":
                fix_measures(self._engine, self._root, claim, spec.config, now)
            self._end(claim, attempt, AttemptState.PUBLISHED, now, None)
            log.info("step_published", run=claim.run_id, step=spec.step, seconds=round(result.seconds, 1))
            return True
        if result.status == "interrupted":
            begins_again = result.exit_code == EXIT_START_AGAIN
            words = result.error.message if result.error and begins_again else None
            self._end(claim, attempt, AttemptState.INTERRUPTED, now, words)
            if begins_again or self._run(claim).cancel_requested:
                return True
            run_queue.interrupt(self._engine, claim, now)
            log.info("run_interrupted", run=claim.run_id, step=spec.step)
            self._drop(claim)
            return False
        self._collect_failure(claim, attempt, result, now)
        return False

    def _collect_failure(self, claim: states.Claim, attempt: Attempt, result: StepResult, now: int) -> None:
        message = result.error.message if result.error else f"exit code {result.exit_code}"
        hint = result.error.hint if result.error else f"the whole story: dropforge logs {claim.run_id}"
        self._end(claim, attempt, AttemptState.FAILED, now, message)
        if result.exit_code == EXIT_DISK_FULL:
            self._postpone(claim, DiskFull(message, hint), now)
        elif result.exit_code > _SIGNAL_EXITS:
            self._after_death(claim, attempt, message, now)
        else:
            self._after_failure(claim, message, hint, now, retryable=result.exit_code != EXIT_BAD_DATA)

    def _conclude(self, claim: states.Claim, run: Run, now: int) -> bool:
        """Act on the verdict; say whether the run goes on at once, since its champion has moved meanwhile."""
        try:
            outcome, words = conclude(self._engine, self._settings, claim, run, now)
        except states.LostClaim:
            raise
        except states.Cancelled:
            return True  # which ends it
        except promotion.ChampionMoved:
            log.info("champion_moved", run=claim.run_id)
            invalidate(self._root, claim.run_id, "evaluate")
            return True
        except DropforgeError as error:
            self._after_failure(claim, error.message, error.hint, now, retryable=False)
            return False
        log.info("run_finished", run=claim.run_id, outcome=outcome, sentence=words)
        self._drop(claim)
        return False

    # --- small parts

    def _config_of(self, session: Session, run: Run, now: int) -> RunConfig:
        """Return the configuration of a run that begins now. Raises `DropforgeError` if its track cannot run."""
        track = states.ensure_track(session, run.track, now)
        self.bases.require(track.name)
        config = compose(self._settings, track)
        warn_of_fixed(self._settings, track)
        self.disk.require(needed_bytes(config, *of_waiting_drops(session, track.name)))
        return config

    def _require_room(self, run: Run) -> None:
        """Raise `DropforgeError` if a waiting run cannot go on now, for want of room or for its own files."""
        try:
            self._has_room(run)
        except (OSError, ValueError) as error:
            raise self._apart.words(run.id or 0, error) from error

    def _has_room(self, run: Run, *, margin: bool = True) -> None:
        """Raise `DropforgeError` if the disk has no room for the rest of a run, `CannotTell` if that is unknown."""
        self.disk.require(still_needed(self._root, run), margin=margin)

    def _next(self, run: Run) -> tuple[dict[str, str], Step | None]:
        """Return the run's published steps, with their artifacts, and the one to do now: `None` after the last."""
        done = run_files.published(self._root, run.id or 0)
        dataset = run_files.load_dataset(self._root, run.id or 0)
        return done, next_step(done, dataset, RunConfig.model_validate(run.config))

    def _needs_gpu(self) -> bool:
        return needs_gpu(self._root, [claim.run_id for claim in self._claims])

    def _submit(self, run: Run, attempt: Attempt, done: dict[str, str]) -> None:
        self._executor.submit(spec_of(self._engine, self._settings, run, attempt, done))

    def _end(self, claim: states.Claim, attempt: Attempt, state: AttemptState, now: int, error: str | None) -> None:
        states.end_attempt(self._engine, claim, attempt.id or 0, states.Ending(state, error), now)
        if state != AttemptState.PUBLISHED:
            gc.clear_attempt(self._root, attempt)

    def _postpone(self, claim: states.Claim, error: DropforgeError, now: int) -> None:
        run_queue.postpone(self._engine, claim, error, now)
        log.warning("run_waits", run=claim.run_id, error=error.message, hint=error.hint)
        self._drop(claim)

    def _set_apart(self, claim: states.Claim, error: OSError | DBAPIError, now: int) -> None:
        """Let a run with damaged files wait, uncounted. Raises errors that concern every run, as of a full disk."""
        if isinstance(error, DBAPIError) or is_full(error):
            raise error
        attempt = states.open_attempt(self._engine, claim.run_id)
        if attempt is not None:
            self._executor.cancel(key_of(attempt))
        run_queue.postpone(self._engine, claim, self._apart.words(claim.run_id, error), now)
        self._drop(claim)

    def _after_failure(self, claim: states.Claim, message: str, hint: str, now: int, *, retryable: bool) -> None:
        failure = run_queue.Failure(message, hint, retryable)
        state = run_queue.fail(self._engine, claim, failure, now, self._settings.retry)
        log.warning("run_failed", run=claim.run_id, error=message, hint=hint, state=str(state))
        self._drop(claim)

    def _after_death(self, claim: states.Claim, attempt: Attempt, message: str, now: int) -> None:
        progress = run_files.made_checkpoint(self._root, claim.run_id, attempt.started_at)
        state = run_queue.died(self._engine, claim, run_queue.Death(message, progress), now, self._settings.retry)
        log.warning("step_died", run=claim.run_id, error=message, state=str(state))
        self._drop(claim)

    def _drop(self, claim: states.Claim) -> None:
        self._claims.remove(claim)
        self.may_collect = True

    def _collect_garbage(self, now: int) -> None:
        if self.may_collect and self._settings.gc.automatic:
            self.may_collect = False
            self._upkeep.collect_garbage(now)

    def _run(self, claim: states.Claim) -> Run:
        with transaction(self._engine) as session:
            run = session.get(Run, claim.run_id)
        if run is None or run.token != claim.token:
            raise states.LostClaim(f"run {claim.run_id} is no longer this daemon's")
        return run

    def _spec_of(self, attempt: Attempt) -> StepSpec | None:
        folder = run_files.attempt_folder(attempt.run_id, attempt.step, attempt.number)
        path = self._root / folder / SPEC_NAME
        return StepSpec.model_validate_json(path.read_bytes()) if path.exists() else None

    def _was_ordered(self, spec: StepSpec) -> bool:
        """Return whether more came of an attempt than its spec: the daemon may have died before the spool's entry."""
        return {path.name for path in (self._root / spec.folder).iterdir()} != {SPEC_NAME}
