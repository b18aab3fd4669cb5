"""
The dispatcher: claims due runs, submits their steps one by one, publishes the results and applies the verdicts.

At most `executor.parallel` runs are claimed, of each track one. One `tick` does all that can be done without waiting.
All of its state is in the database and the run's folder, so a new dispatcher continues after a crash. An error in the
files of one run or track makes only that run or track wait. A full disk and a locked database concern all.
"""

import contextlib
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from daemon.champions.hooks.training import TrainingHooks
from daemon.dispatch.apply_verdict import conclude, fix_measures
from daemon.dispatch.claimer import Claimer, unusable
from daemon.dispatch.facts import FactReader
from daemon.dispatch.next_action import Action, Do, Facts, next_action, not_mounted
from daemon.dispatch.previews import Previews
from daemon.dispatch.publication import Publisher
from daemon.dispatch.spool import Executor, JobState, Spool
from daemon.dispatch.stale_steps import redo
from daemon.dispatch.step_specs import key_of, spec_of
from daemon.dispatch.upkeep import Upkeep
from daemon.queue import drops, run_queue, states
from daemon.queue.attempt_ends import End, Leave, Then
from daemon.settings.model import Settings
from daemon.state import run_files
from daemon.state.database import ChangeWatch
from daemon.state.ownership import ShareGone, require_share
from daemon.state.states import AttemptState
from daemon.state.troubles import Troubles
from daemon.storage import gc
from daemon.storage.disk import is_full
from pipeline import durable
from pipeline.artifacts import Dataset, Verdict
from pipeline.contract import Step, StepSpec
from pipeline.errors import EXIT_UNFORESEEN, DropforgeError
from pipeline.steps import BY_NAME

log = structlog.get_logger()


class Dispatcher:
    """Moves up to `executor.parallel` runs at a time through the pipeline."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        executor: Executor,
        troubles: Troubles | None = None,
        on_nodes: Mapping[str, Executor] = MappingProxyType({}),
    ) -> None:
        """
        Prepare for the state folder of `settings`; `recover` and `tick` do the work, problems go to `troubles`.

        The steps that `on_nodes` has an executor for outlive the daemon; `executor` runs the others.
        """
        self._engine, self._settings, self._root = engine, settings, settings.work_folder
        self._spool = Spool(settings.state_folder, self._root)
        self._on_nodes, self._executors = on_nodes, dict.fromkeys(BY_NAME, executor) | dict(on_nodes)
        #: The claimed runs, in the order in which they were claimed, by their ids.
        self._claims: dict[int, states.Claim] = {}
        #: By run the spec, without its drops, of the step whose end it waits for; emptied when the database changes.
        self._at_work: dict[int, StepSpec] = {}
        self._changes = ChangeWatch(engine)
        self._publisher = Publisher(settings.state_folder)
        self._troubles = Troubles() if troubles is None else troubles
        self._gpu = TrainingHooks(engine, settings, self._troubles)
        self.upkeep = Upkeep(engine, settings, self._troubles)
        self._reader = FactReader(engine, settings, self._executors, self._publisher, self.upkeep.disk)
        self._needs_gpu = partial(self._reader.needs_gpu, self._claims, self._spool)
        self._claimer = Claimer(engine, settings, self._troubles, self.upkeep, self._gpu)
        self._previews = Previews(engine, settings, executor)
        # A cluster's jobs may wait for hours, and a server that shares the GPU has no room for a second model.
        shares_gpu = settings.hooks.before_training or settings.hooks.after_training
        self._may_preview = not ("evaluate" in on_nodes or shares_gpu)
        self.draining = False

    def recover(self, now: int) -> None:
        """
        Remove the temporary files of a daemon that died and claim its running runs; repair the champions' links.

        The caller holds the state folder's lock. A run whose files cannot be used is postponed (`_postpone`).
        """
        durable.remove_leftovers(self._spool.queue)
        self._previews.recover(self._spool.queue)
        self.upkeep.maintain(now)
        for claim in run_queue.rescue(self._engine, now):
            self._claims[claim.run_id] = claim
            log.info("run_adopted", run=claim.run_id)
            try:
                run_files.remove_leftovers(self._root, claim.run_id)
            except OSError as error:
                self._postpone(claim, error, now)

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
        Do maintenance, claim due runs, advance each claimed run as far as is possible without waiting; then previews.

        No run is claimed if `draining` is set or the disk is low. An error in a claimed run ends or postpones that run;
        a full disk and database errors are raised. Raises `ShareGone` if the shared folder is away, which is checked
        between reading a run's files and changing the database.
        """
        require_share(self._settings)
        low = self.upkeep.is_disk_low(now)
        # Also while a run is claimed: a base model that was replaced must not be used and cached under the old id.
        self.upkeep.maintain(now)
        self._gpu.tick(self._needs_gpu)
        if len(self._claims) < self._settings.executor.parallel and not self.draining:
            self.upkeep.collect_garbage(now)
            self._claimer.claim_due(now, self._claims, low=low)
        if self._changes.changed():
            self._at_work.clear()
        for claim in tuple(self._claims.values()):
            if not self._is_at_work(claim.run_id) and not self._troubles.is_pausing(f"run {claim.run_id}"):
                with self._troubles.alone(f"run {claim.run_id}"):
                    self._go_on(claim, now)
        if not self._troubles.is_pausing("previews"):
            with self._troubles.alone("previews"):
                self._previews.tick(now, may_run=self._may_preview and self.idle and not self.draining and not low)

    def _is_at_work(self, run_id: int) -> bool:
        """Return whether nothing is to be done with a run: its step runs, and the database has not changed."""
        spec = self._at_work.get(run_id)
        with contextlib.suppress(OSError):  # `_go_on` meets it again
            return spec is not None and self._executors[spec.step].poll(spec) is not JobState.ENDED
        return False

    def _go_on(self, claim: states.Claim, now: int) -> None:
        """Advance a claimed run until it waits; an error ends or postpones it, and is raised if it concerns all."""
        self._at_work.pop(claim.run_id, None)
        waits = False
        try:
            while claim.run_id in self._claims and not waits:
                facts = self._reader.facts(claim, draining=self.draining)
                action = next_action(facts)
                require_share(self._settings)
                self._perform(claim, facts, action, now)
                waits = action.what in {Do.SUBMIT, Do.CANCEL, Do.WAIT}
                if waits and facts.spec is not None:
                    self._at_work[claim.run_id] = facts.spec.model_copy(update={"drops": (), "elders": ()})
        except ShareGone:
            raise
        except states.LostClaim as error:
            log.warning("claim_lost", run=claim.run_id, error=error.message)
            self._forget(claim)
        except DropforgeError as error:
            self._fail(claim, error, now)
        except (OSError, DBAPIError) as error:
            self._postpone(claim, error, now)
        except Exception as error:  # one run's trouble must not stop every other track
            log.exception("run_trouble", run=claim.run_id)
            hint = "the daemon's log has the whole story; this is a defect, please report it"
            self._fail(claim, DropforgeError(f"{type(error).__name__}: {error}"[:2000], hint, EXIT_UNFORESEEN), now)
        else:
            self._troubles.clear(f"files of run {claim.run_id}")

    def describe(self) -> str:
        """Return one line for people: claimed runs and progress, else a lack of disk space, a preview, or "idle"."""
        words = {run_id: f"run {run_id}" for run_id in self._claims}
        for run_id, spec in self._at_work.items():
            progress = run_files.load_progress(self._root, run_id, spec.step, spec.attempt)
            words[run_id] += f" {spec.step if progress is None else progress.words}"
        return "; ".join(words.values()) or self.upkeep.disk.shortage() or self._previews.words or "idle"

    def abandon(self, now: int) -> None:
        """
        At the end of a shutdown, cancel the open steps and set the claimed runs to waiting; not a failure.

        A run whose step runs on a node, or whose result is being published, stays running: the next daemon adopts
        it.
        """
        for claim in tuple(self._claims.values()):
            attempt = states.open_attempt(self._engine, claim.run_id)
            if claim.run_id in self._publisher or (attempt and attempt.step in self._on_nodes):
                continue
            # Otherwise the next worker would run a step that is not needed any more.
            self._stop_step(claim)
            self._leave(claim, Leave(Then.INTERRUPT), now)

    def give_gpu_back(self) -> None:
        """At shutdown, run `hooks.after_training` and wait for it, if the GPU was taken and is not needed any more."""
        self._gpu.finish(self._needs_gpu)

    def _perform(self, claim: states.Claim, facts: Facts, action: Action, now: int) -> None:
        match action.what:
            case Do.SUBMIT if facts.step is not None:
                self._submit(claim, facts, facts.step, now)
            case Do.CANCEL if facts.spec is not None:
                self._executors[facts.spec.step].cancel(facts.spec.key)
            case Do.PUBLISH if facts.spec is not None and facts.result is not None:
                self._publisher.begin(facts.spec, facts.result)
            case Do.REDO if facts.stale is not None:
                redo(self._engine, self._root, facts.run, facts.stale, now)
            case Do.CONCLUDE:
                if conclude(self._engine, self._settings, claim, facts.run, now):
                    self._forget(claim)
            case End() as end:
                self._end(claim, facts, end, action.error, now)
            case Then() as then:
                self._leave(claim, Leave(then, action.error), now)

    def _submit(self, claim: states.Claim, facts: Facts, step: Step, now: int) -> None:
        """Submit the open attempt, or begin one at `step` if the GPU is free; postpone the run if freeing it failed."""
        attempt = facts.attempt
        if attempt is None:
            try:
                if step.needs_gpu and not self._gpu.free(facts.run):
                    return
            except DropforgeError as error:
                self._leave(claim, Leave(Then.POSTPONE, error), now)
                return
            attempt = states.begin_attempt(self._engine, claim, step.name, now)
        spec = spec_of(self._engine, self._settings, facts.run, attempt, facts.done)
        self._executors[step.name].submit(spec)
        self._at_work[claim.run_id] = spec.model_copy(update={"drops": (), "elders": ()})
        log.info("step_submitted", run=claim.run_id, step=step.name, attempt=attempt.number)

    def _end(self, claim: states.Claim, facts: Facts, end: End, error: DropforgeError | None, now: int) -> None:
        """
        End the open attempt as `end` says, and release the run unless it goes on; do nothing without an open attempt.

        A lost attempt is revoked. A published verdict other than "insufficient_evidence" fixes the track's measures
        (`fix_measures`); published data, unless the run is about one drop, the number of new answers in its drops. The
        files of an attempt that was not published are cleared.
        """
        attempt, made = facts.attempt, facts.published
        if attempt is None:
            return
        if end.state == AttemptState.LOST:
            self._stop_step(claim)
        if isinstance(made, Verdict) and made.outcome != "insufficient_evidence":
            fix_measures(self._engine, self._root, claim, facts.run, now)
        elif isinstance(made, Dataset) and facts.run.about_drop is None:
            drops.note_new_answers(self._engine, facts.run, made.proposals, now)
        ending = states.Ending(end.state, error.message if error else None)
        states.end_attempt(self._engine, claim, attempt.id or 0, ending, now)
        if end is End.PUBLISHED:
            log.info("step_published", run=claim.run_id, step=attempt.step)
        else:
            gc.clear_attempt(self._root, attempt)
        if end.then is not Then.GO_ON:
            self._leave(claim, Leave(end.then, error, facts.progress), now)

    def _leave(self, claim: states.Claim, leave: Leave, now: int) -> None:
        """Release the run as `leave` says, log that, and forget its claim."""
        move = run_queue.leave(self._engine, claim, leave, now, self._settings.retry)
        why = {} if leave.error is None else {"error": leave.error.message, "hint": leave.error.hint}
        (log.warning if why else log.info)(move.kind, run=claim.run_id, state=str(move.to), **why)
        self._forget(claim)

    def _fail(self, claim: states.Claim, error: DropforgeError, now: int) -> None:
        """
        Stop the run's step, and fail the run; interrupt it if `FactReader.away` names a folder.

        Raises `ShareGone`, with nothing changed, if it is away now.
        """
        require_share(self._settings)
        self._stop_step(claim)
        away = self._reader.away(states.claimed_run(self._engine, claim))
        self._leave(claim, Leave(Then.INTERRUPT, not_mounted(away, error)) if away else Leave(Then.FAIL, error), now)

    def _postpone(self, claim: states.Claim, error: OSError | DBAPIError, now: int) -> None:
        """
        Stop the step of a run whose files cause `error`, and postpone the run.

        Raises `error` if it concerns every run, database or full disk, and `ShareGone` if the shared folder is away. A
        run with a job on a cluster stays claimed, and a trouble is noted, unless it is to be cancelled.
        """
        if isinstance(error, DBAPIError):
            raise error
        require_share(self._settings)
        attempt = states.open_attempt(self._engine, claim.run_id)
        is_job = attempt is not None and attempt.step in self._on_nodes
        is_cancelled = is_job and states.claimed_run(self._engine, claim).cancel_requested
        if is_full(error) and not is_cancelled:
            raise error
        problem = unusable(self._settings, claim.run_id, error)
        if is_job and not is_cancelled:
            # Its job goes on, and the shared file system may answer at the next look.
            self._troubles.note(f"files of run {claim.run_id}", problem, message=True)
            return
        self._stop_step(claim)
        self._leave(claim, Leave(Then.POSTPONE, problem), now)

    def _stop_step(self, claim: states.Claim) -> None:
        """Have the executor cancel the run's open attempt, if there is one, without waiting; an error is logged."""
        if (attempt := states.open_attempt(self._engine, claim.run_id)) is not None:
            try:
                self._executors[attempt.step].cancel(key_of(attempt))
            except (OSError, ValueError) as error:
                log.warning("step_not_cancelled", run=claim.run_id, error=str(error))

    def _forget(self, claim: states.Claim) -> None:
        del self._claims[claim.run_id]
        self._at_work.pop(claim.run_id, None)
        self._publisher.forget(claim.run_id)
        self._troubles.clear(f"files of run {claim.run_id}")
        self.upkeep.may_collect = True
