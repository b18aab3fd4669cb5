"""
The dispatcher: claims due runs, submits their steps one by one, publishes the results and applies the verdicts.

At most `executor.parallel` runs are claimed, of each track one. One `tick` does all that can be done without waiting.
All of its state is in the database and the run's folder, so a new dispatcher continues after a crash. An error in the
files of one run or track makes only that run or track wait. A full disk and a locked database concern all.
"""

import contextlib

import structlog
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError
from sqlmodel import col, select

from daemon.champions import promotion
from daemon.champions.hooks.training import TrainingHooks
from daemon.dispatch.apply_verdict import conclude, fix_measures
from daemon.dispatch.attempt import folder_of, listed
from daemon.dispatch.attempt_ends import lacked_share, why_not_again
from daemon.dispatch.claimer import Claimer, unusable
from daemon.dispatch.publication import Publisher
from daemon.dispatch.spool import Executor, JobState, Spool
from daemon.dispatch.stale_steps import invalidate, invalidate_stale, is_in_vain
from daemon.dispatch.step_specs import key_of, spec_of
from daemon.dispatch.upkeep import Upkeep
from daemon.queue import run_queue, states
from daemon.settings.model import Settings
from daemon.state import run_files
from daemon.state.database import transaction
from daemon.state.ownership import ShareGone, require_share
from daemon.state.states import AttemptState, RunState
from daemon.state.tables import Attempt, Run, Track
from daemon.state.troubles import Troubles
from daemon.storage import gc
from daemon.storage.disk import is_full
from daemon.storage.disk_estimate import still_needed
from pipeline import durable
from pipeline.artifacts import Verdict
from pipeline.config import RunConfig
from pipeline.contract import SPEC_NAME, Step, StepResult, StepSpec
from pipeline.errors import EXIT_BAD_DATA, EXIT_DISK_FULL, EXIT_START_AGAIN, DropforgeError, StepFailed
from pipeline.steps import STEPS, next_step

_SIGNAL_EXITS = 128
#: Of each running run: token, whether it is to be cancelled, and the track's champion.
_RUNNING = (
    select(Run.id, Run.token, Run.cancel_requested, Track.champion_model_id)
    .join(Track, col(Track.name) == Run.track)
    .where(Run.state == RunState.RUNNING)
)
log = structlog.get_logger()


class Dispatcher:
    """Moves up to `executor.parallel` runs at a time through the pipeline."""

    def __init__(
        self, engine: Engine, settings: Settings, executor: Executor, troubles: Troubles | None = None
    ) -> None:
        """Prepare for the state folder of `settings`; `recover` and `tick` do the work, problems go to `troubles`."""
        self._engine = engine
        self._settings = settings
        self._root = settings.work_folder
        self._spool = Spool(settings.state_folder, self._root)
        self._executor = executor
        #: The claimed runs, in the order in which they were claimed, by their ids.
        self._claims: dict[int, states.Claim] = {}
        #: The specs, without their drops, of the steps that were queued or running when last polled, by run.
        self._specs: dict[int, StepSpec] = {}
        self._publisher = Publisher(settings.state_folder)
        self._troubles = Troubles() if troubles is None else troubles
        self._gpu = TrainingHooks(engine, settings, self._troubles)
        self.upkeep = Upkeep(engine, settings, self._troubles)
        self._claimer = Claimer(engine, settings, self._troubles, self.upkeep, self._gpu)
        self.draining = False

    def recover(self, now: int) -> None:
        """
        Remove the temporary files of a daemon that died and claim its running runs; repair the champions' links.

        The caller holds the state folder's lock. A run whose files cannot be used is set to waiting instead.
        """
        durable.remove_leftovers(self._spool.queue)
        self.upkeep.maintain(now)
        for claim in run_queue.rescue(self._engine, now):
            self._claims[claim.run_id] = claim
            log.info("run_adopted", run=claim.run_id)
            try:
                run_files.remove_leftovers(self._root, claim.run_id)
            except OSError as error:
                self._set_apart(claim, error, now)

    @property
    def idle(self) -> bool:
        """Whether no run is claimed."""
        return not self._claims

    @property
    def claimed(self) -> frozenset[int]:
        """The ids of the claimed runs."""
        return frozenset(self._claims)

    def tick(self, now: int) -> None:
        """
        Do maintenance, claim the due runs that may run, and advance each as far as is possible without waiting.

        No run is claimed if `draining` is set or the disk is low. An error in a claimed run ends or postpones that run;
        a full disk and database errors are raised. Files are read first, then it is seen whether the shared folder is
        there, then the database is changed: else `ShareGone` is raised.
        """
        require_share(self._settings)
        low = self.upkeep.is_disk_low(now)
        # Also while a run is claimed: a base model that was replaced must not be used and cached under the old id.
        self.upkeep.maintain(now)
        self._gpu.tick(self._needs_gpu)
        if len(self._claims) < self._settings.executor.parallel and not self.draining:
            self.upkeep.collect_garbage(now)
            self._claimer.claim_due(now, self._claims, low=low)
        at_work = self._at_work()
        for claim in tuple(self._claims.values()):
            if claim.run_id not in at_work and not self._troubles.is_pausing(f"run {claim.run_id}"):
                with self._troubles.alone(f"run {claim.run_id}"):
                    self._go_on(claim, now)

    def _at_work(self) -> set[int]:
        """Return the claimed runs with which nothing is to be done: their step runs, and nobody calls it off."""
        found: set[int] = set()
        if not self._specs:
            return found
        with transaction(self._engine) as session:
            running = {run_id: values for run_id, *values in session.exec(_RUNNING)}
        for run_id, spec in self._specs.items():
            if running.get(run_id) == [self._claims[run_id].token, False, spec.champion.model_id]:
                with contextlib.suppress(OSError):  # `_go_on` meets it again
                    if self._executor.poll(spec) is not JobState.ENDED:
                        found.add(run_id)
        return found

    def _go_on(self, claim: states.Claim, now: int) -> None:
        """Advance a claimed run as far as is possible without waiting; an error in it ends or postpones it."""
        try:
            while self._advance(claim, now):
                pass
        except ShareGone:
            raise
        except states.LostClaim as error:
            log.warning("claim_lost", run=claim.run_id, error=error.message)
            self._drop(claim)
        except DropforgeError as error:
            self._after_failure(claim, error.message, error.hint, now, retryable=False)
        except (OSError, DBAPIError) as error:
            self._set_apart(claim, error, now)
        except Exception as error:  # one run's trouble must not stop every other track
            log.exception("run_trouble", run=claim.run_id)
            hint = "the daemon's log has the whole story; this is a defect, please report it"
            self._after_failure(claim, f"{type(error).__name__}: {error}"[:2000], hint, now, retryable=False)
        else:
            self._troubles.clear(f"files of run {claim.run_id}")

    def describe(self) -> str:
        """Return one line for people: the claimed runs and their progress, the lack of disk space, or "idle"."""
        with transaction(self._engine) as session:
            opened = session.exec(select(Attempt).where(text("state = 'submitted'"))).all()
        attempts = {attempt.run_id: attempt for attempt in opened}
        words = [self._describe(run_id, attempts.get(run_id)) for run_id in self._claims]
        return "; ".join(words) or self.upkeep.disk.shortage() or "idle"

    def _describe(self, run_id: int, attempt: Attempt | None) -> str:
        if attempt is None:
            return f"run {run_id}"
        progress = run_files.load_progress(self._root, run_id, attempt.step, attempt.number)
        return f"run {run_id} {attempt.step if progress is None else progress.words}"

    def abandon(self, now: int) -> None:
        """
        At the end of a shutdown, cancel the open steps and set the claimed runs to waiting; not a failure.

        A run whose step outlives the daemon, or whose result is being published, stays running: the next daemon adopts
        it.
        """
        for claim in tuple(self._claims.values()):
            attempt = states.open_attempt(self._engine, claim.run_id)
            if claim.run_id in self._publisher or (attempt and self._executor.outlives(key_of(attempt))):
                continue
            if attempt is not None:
                # Otherwise the next worker would run a step that is not needed any more.
                self._stop_step(claim)
                # Its files stay: the step may be at its last checkpoint.
                ending = states.Ending(AttemptState.LOST, "the daemon stopped before the step did")
                states.end_attempt(self._engine, claim, attempt.id or 0, ending, now)
            run_queue.interrupt(self._engine, claim, now)
            self._drop(claim)

    def give_gpu_back(self) -> None:
        """At shutdown, run `hooks.after_training` and wait for it, if the GPU was taken and is not needed any more."""
        self._gpu.finish(self._needs_gpu)

    def _advance(self, claim: states.Claim, now: int) -> bool:
        """Poll, submit or end one step of the run, or end the run; return whether to call this again at once."""
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
        try:
            self.upkeep.disk.require(still_needed(self._root, run), margin=False)
            may_begin = not step.needs_gpu or self._gpu.free(run)
        except DropforgeError as error:
            self._postpone(claim, error, now)
            return False
        if may_begin:
            require_share(self._settings)
            begun = states.begin_attempt(self._engine, claim, step.name, now)
            self._executor.submit(spec_of(self._engine, self._settings, run, begun, done))
            log.info("step_submitted", run=claim.run_id, step=step.name, attempt=begun.number)
        return False

    def _look_at(self, claim: states.Claim, run: Run, attempt: Attempt, now: int) -> bool:
        """Poll an open attempt and act on its state; return whether the run can be advanced again at once."""
        self._specs.pop(claim.run_id, None)
        spec = self._spec_of(attempt)
        if spec is None:
            # The daemon died between the attempt's row and its spec: the same attempt is submitted now, unless an
            # earlier step has become stale, or it has begun and its spec was lost.
            begun = listed(self._root / folder_of(key_of(attempt)))
            if not run.cancel_requested and all(name.startswith(".") for name in begun):
                invalidate_stale(self._engine, self._root, run, now)
                done, step = self._next(run)
                if step is not None and step.name == attempt.step:
                    self._executor.submit(spec_of(self._engine, self._settings, run, attempt, done))
                    return False
            require_share(self._settings)
            self._stop_step(claim)
            self._end(claim, attempt, AttemptState.LOST, now, "it has no spec.json")
            return True
        if self._executor.poll(spec) is JobState.ENDED:
            return self._collect(claim, attempt, spec, now)
        if run.cancel_requested or is_in_vain(self._engine, run, spec):
            self._executor.cancel(spec.key)
        else:
            self._specs[claim.run_id] = spec.model_copy(update={"drops": ()})
        return False

    def _collect(self, claim: states.Claim, attempt: Attempt, spec: StepSpec, now: int) -> bool:
        """Publish an attempt's result or count its failure; return whether the run can be advanced again at once."""
        result = run_files.read_result(spec)
        if result is None:
            self._stop_step(claim)  # Slurm may not have begun its job yet
            self._end(claim, attempt, AttemptState.LOST, now, "its result carries another attempt's fence")
            self._after_death(claim, attempt, f"step {spec.step}: its result is not its own", now)
            return False
        if result.status == "ok":
            return self._publish(claim, attempt, spec, result, now)
        if result.status == "interrupted":
            return self._interrupted(claim, attempt, spec, result, now)
        message = result.error.message if result.error else f"exit code {result.exit_code}"
        hint = result.error.hint if result.error else f"the whole story: dropforge logs {claim.run_id}"
        self._end(claim, attempt, AttemptState.FAILED, now, message)
        if result.exit_code == EXIT_DISK_FULL:
            self._postpone(claim, DropforgeError(message, hint), now)
        elif result.exit_code > _SIGNAL_EXITS:
            self._after_death(claim, attempt, message, now)
        else:
            self._after_failure(claim, message, hint, now, retryable=result.exit_code != EXIT_BAD_DATA)
        return False

    def _publish(self, claim: states.Claim, attempt: Attempt, spec: StepSpec, result: StepResult, now: int) -> bool:
        """Publish a good result; return whether the run can be advanced again at once."""
        try:
            artifact = self._publisher.publish(spec, result)
        except StepFailed as error:
            self._end(claim, attempt, AttemptState.FAILED, now, error.message)
            self._after_failure(claim, error.message, error.hint, now, retryable=True)
            return False
        if artifact is None:
            if not self._run(claim).cancel_requested:
                return False
            self._end(claim, attempt, AttemptState.INTERRUPTED, now, "it was cancelled while it was published")
            return True
        if isinstance(artifact, Verdict) and artifact.outcome != "insufficient_evidence":
            fix_measures(self._engine, self._root, claim, spec.config, now)
        self._end(claim, attempt, AttemptState.PUBLISHED, now, None)
        log.info("step_published", run=claim.run_id, step=spec.step)
        return True

    def _interrupted(self, claim: states.Claim, attempt: Attempt, spec: StepSpec, result: StepResult, now: int) -> bool:
        """End an interrupted attempt; return whether the run can be advanced again at once."""
        begins_again = result.exit_code == EXIT_START_AGAIN
        run = self._run(claim)
        called_off = run.cancel_requested or is_in_vain(self._engine, run, spec)
        words = None if called_off else run_files.stop_words(spec)
        hint = why_not_again(self._engine, self._settings, attempt, spec) if words and not begins_again else ""
        if begins_again and result.error:
            words = result.error.message
        self._end(claim, attempt, AttemptState.FAILED if hint else AttemptState.INTERRUPTED, now, words)
        if begins_again or run.cancel_requested:
            return True
        if hint:
            self._after_failure(claim, words or "", hint, now, retryable=True)
            return False
        run_queue.interrupt(self._engine, claim, now, words)
        log.info("run_interrupted", run=claim.run_id, step=spec.step)
        self._drop(claim)
        return False

    def _conclude(self, claim: states.Claim, run: Run, now: int) -> bool:
        """Apply the verdict; return `True` if the run goes on instead: the champion changed, or it was cancelled."""
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

    def _next(self, run: Run) -> tuple[dict[str, str], Step | None]:
        """Return the paths of the run's published artifacts by step, and the next step: `None` after the last one."""
        done = run_files.published(self._root, run.id or 0)
        dataset = run_files.load_dataset(self._root, run.id or 0)
        return done, next_step(done, dataset, RunConfig.model_validate(run.config))

    def _needs_gpu(self) -> bool:
        """Return whether a claimed run has a GPU step that is not published, or any step's process is alive."""
        steps = {step.name for step in STEPS if step.needs_gpu}
        is_before = any(not steps <= set(run_files.published(self._root, run)) for run in self._claims)
        return is_before or self._spool.has_living()

    def _end(self, claim: states.Claim, attempt: Attempt, state: AttemptState, now: int, error: str | None) -> None:
        require_share(self._settings)
        states.end_attempt(self._engine, claim, attempt.id or 0, states.Ending(state, error), now)
        if state != AttemptState.PUBLISHED:
            gc.clear_attempt(self._root, attempt)

    def _postpone(self, claim: states.Claim, error: DropforgeError, now: int) -> None:
        require_share(self._settings)
        run_queue.postpone(self._engine, claim, error, now)
        log.warning("run_waits", run=claim.run_id, error=error.message, hint=error.hint)
        self._drop(claim)

    def _set_apart(self, claim: states.Claim, error: OSError | DBAPIError, now: int) -> None:
        """Postpone a run whose files cause `error`; raise `error` if it concerns every run: database or full disk."""
        if isinstance(error, DBAPIError):
            raise error
        require_share(self._settings)
        attempt = states.open_attempt(self._engine, claim.run_id)
        is_job = attempt is not None and self._executor.outlives(key_of(attempt))
        is_cancelled = is_job and self._run(claim).cancel_requested
        if is_full(error) and not is_cancelled:
            raise error
        problem = unusable(self._settings, claim.run_id, error)
        if is_job and not is_cancelled:
            # Its job goes on, and the shared file system may answer at the next look.
            self._troubles.note(f"files of run {claim.run_id}", problem, message=True)
            return
        self._stop_step(claim)
        self._postpone(claim, problem, now)

    def _stop_step(self, claim: states.Claim) -> None:
        """Have the run's open attempt stopped, if there is one: nobody polls it any more."""
        attempt = states.open_attempt(self._engine, claim.run_id)
        if attempt is not None:
            try:
                self._executor.cancel(key_of(attempt))
            except (OSError, ValueError) as error:
                log.warning("step_not_cancelled", run=claim.run_id, error=str(error))

    def _after_failure(self, claim: states.Claim, message: str, hint: str, now: int, *, retryable: bool) -> None:
        require_share(self._settings)
        self._stop_step(claim)
        if self._interrupts(claim, message, now):
            return
        failure = run_queue.Failure(message, hint, retryable)
        state = run_queue.fail(self._engine, claim, failure, now, self._settings.retry)
        log.warning("run_failed", run=claim.run_id, error=message, hint=hint, state=str(state))
        self._drop(claim)

    def _interrupts(self, claim: states.Claim, message: str, now: int) -> bool:
        """Interrupt a run whose step failed if the shared folder was gone meanwhile; return whether it was."""
        if not lacked_share(self._engine, self._settings, claim.run_id, self._run(claim).step or ""):
            return False
        run_queue.interrupt(self._engine, claim, now, f"the shared folder was not mounted: {message}")
        self._drop(claim)
        return True

    def _after_death(self, claim: states.Claim, attempt: Attempt, message: str, now: int) -> None:
        if self._interrupts(claim, message, now):
            return
        progress = run_files.made_checkpoint(self._root, claim.run_id, attempt.started_at)
        state = run_queue.died(self._engine, claim, run_queue.Death(message, progress), now, self._settings.retry)
        log.warning("step_died", run=claim.run_id, error=message, state=str(state))
        self._drop(claim)

    def _drop(self, claim: states.Claim) -> None:
        del self._claims[claim.run_id]
        self._specs.pop(claim.run_id, None)
        self._publisher.forget(claim.run_id)
        self._troubles.clear(f"files of run {claim.run_id}")
        self.upkeep.may_collect = True

    def _run(self, claim: states.Claim) -> Run:
        with transaction(self._engine) as session:
            run = session.get(Run, claim.run_id)
        if run is None or run.token != claim.token:
            raise states.LostClaim(f"run {claim.run_id} is no longer this daemon's")
        return run

    def _spec_of(self, attempt: Attempt) -> StepSpec | None:
        path = self._root / folder_of(key_of(attempt)) / SPEC_NAME
        return StepSpec.model_validate_json(durable.read_regular(path)) if path.exists() else None
