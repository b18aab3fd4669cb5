"""Read the facts that the next action of a claimed run depends on: its row, its open attempt, its files."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from sqlalchemy import Engine

from daemon.champions.base_models import is_away, require_base
from daemon.dispatch.attempt import folder_of, listed
from daemon.dispatch.next_action import Facts
from daemon.dispatch.publication import Publisher
from daemon.dispatch.spool import Executor, JobState, Spool
from daemon.dispatch.stale_steps import first_stale, is_useless
from daemon.dispatch.step_specs import key_of
from daemon.queue import states
from daemon.queue.attempt_ends import MOST_INTERRUPTED
from daemon.settings.model import Settings
from daemon.state import run_files
from daemon.state.layout import SHARE_GONE_NOTE
from daemon.state.states import AttemptState
from daemon.state.tables import Attempt, Run
from daemon.storage.disk import Disk
from daemon.storage.disk_estimate import still_needed
from pipeline import durable
from pipeline.config import RunConfig
from pipeline.contract import SPEC_NAME, StepSpec
from pipeline.errors import DropforgeError
from pipeline.steps import STEPS, next_step


class FactReader:
    """Reads the facts of claimed runs; changes no row and no file, but takes the outcome of an ended publication."""

    def __init__(
        self, engine: Engine, settings: Settings, executors: Mapping[str, Executor], publisher: Publisher, disk: Disk
    ) -> None:
        """Ask `executors`, by step, for attempts, `publisher` for publications and `disk` for room."""
        self._engine, self._settings, self._root = engine, settings, settings.work_folder
        self._executors, self._publisher, self._disk = executors, publisher, disk

    def facts(self, claim: states.Claim, *, draining: bool) -> Facts:
        """
        Return the facts of a claimed run; the outcome of a publication is in those of one call only.

        Raises `LostClaim` if the claim is not valid any more; `OSError` or `DropforgeError` if files cannot be used.
        """
        run = states.claimed_run(self._engine, claim)
        attempt = states.open_attempt(self._engine, claim.run_id)
        if attempt is None:
            return Facts(run, draining) if run.cancel_requested else self._between_steps(run, draining=draining)
        folder = self._root / folder_of(key_of(attempt))
        try:
            spec = StepSpec.model_validate_json(durable.read_regular(folder / SPEC_NAME))
        except FileNotFoundError:
            if run.cancel_requested or any(not name.startswith(".") for name in listed(folder)):
                return Facts(run, attempt=attempt)
            return self._between_steps(run, attempt)
        except ValueError:
            return Facts(run, attempt=attempt, damaged=True)
        return self._of_attempt(run, attempt, spec)

    def needs_gpu(self, runs: Iterable[int], spool: Spool) -> bool:
        """Return whether a GPU step of one of `runs` is not published, or the process of a step in `spool` is alive."""
        steps = {step.name for step in STEPS if step.needs_gpu}
        is_before = any(not steps <= set(run_files.published(self._root, run)) for run in runs)
        return is_before or spool.has_living()

    def away(self, run: Run) -> str:
        """
        Return "the shared folder" if it was away after the last attempt at `run.step` began, or the base if it is.

        Empty if neither is true.
        """
        last = states.last_attempts(self._engine, run.id or 0, run.step or "", 1)
        _, _, gone, _ = durable.signature(self._settings.state_folder / SHARE_GONE_NOTE)
        if last and gone // 1_000_000 >= last[0].started_at:
            return "the shared folder"
        folder = str((run.config or {}).get("base_model", ""))
        return f"the base model {folder}" if folder and is_away(Path(folder)) else ""

    def _between_steps(self, run: Run, attempt: Attempt | None = None, *, draining: bool = False) -> Facts:
        """
        Return the facts of a run without a running step: the first stale step, else the next.

        Disk space and base model are looked for only without `attempt`, and not while `draining`.
        """
        if stale := first_stale(self._engine, self._root, run):
            return Facts(run, attempt=attempt, stale=stale)
        run_id = run.id or 0
        done = run_files.published(self._root, run_id)
        dataset = run_files.load_dataset(self._root, run_id)
        config = RunConfig.model_validate(run.config)
        step, blocker = next_step(done, dataset, config), None
        if step is not None and attempt is None and not draining:
            try:
                require_base(Path(config.base_model), run_id)
                self._disk.require(still_needed(self._root, run), margin=False)
            except DropforgeError as error:
                blocker = error
        return Facts(run, draining=draining, attempt=attempt, done=done, step=step, blocker=blocker)

    def _of_attempt(self, run: Run, attempt: Attempt, spec: StepSpec) -> Facts:
        """Return a submitted attempt's facts: whether it has ended, how (a publication's end once), or is useless."""
        if self._executors[spec.step].poll(spec) is not JobState.ENDED:
            useless = not run.cancel_requested and is_useless(self._engine, run, spec)
            return Facts(run, attempt=attempt, spec=spec, useless=useless)
        result = None
        with suppress(ValueError):  # damaged: of no more use than another attempt's
            result = run_files.read_result(spec)
        publishing = result is not None and result.status == "ok" and spec.run in self._publisher
        is_interrupted = result is not None and result.status == "interrupted" and not run.cancel_requested
        return Facts(
            run,
            attempt=attempt,
            spec=spec,
            ended=True,
            result=result,
            publishing=publishing,
            published=self._publisher.take(spec.run) if publishing else None,
            stopped=self._how_stopped(run, attempt, spec) if is_interrupted else None,
            progress=self._made_progress(attempt),
            away=self.away(run),
        )

    def _how_stopped(self, run: Run, attempt: Attempt, spec: StepSpec) -> DropforgeError | None:
        """Return how Slurm ended the job, with the hint of `_why_not_again`; `None` if it did not, or was useless."""
        words = None if is_useless(self._engine, run, spec) else run_files.stop_words(spec)
        return None if words is None else DropforgeError(words, self._why_not_again(attempt, spec))

    def _why_not_again(self, attempt: Attempt, spec: StepSpec) -> str:
        """
        Return a hint if the end of an attempt by Slurm counts as a failure, else an empty string.

        It does if the attempt made no progress and ran out of time, or is the last of `MOST_INTERRUPTED` such in a row.
        """
        if self._made_progress(attempt):
            return ""
        if run_files.was_out_of_time(spec):
            return f"its time limit came before a checkpoint: raise executor.slurm.{spec.step}.time"
        last = states.last_attempts(self._engine, spec.run, spec.step, MOST_INTERRUPTED)
        is_interrupted = [earlier.state == AttemptState.INTERRUPTED for earlier in last[1:]]
        if len(last) < MOST_INTERRUPTED or not all(is_interrupted) or any(map(self._made_progress, last[1:])):
            return ""
        return f"{MOST_INTERRUPTED} attempts in a row left no checkpoint; see why: dropforge show {spec.run}"

    def _made_progress(self, attempt: Attempt) -> bool:
        """Return whether an attempt left more than it began with: a checkpoint or, of `evaluate`, predictions."""
        if attempt.step == "evaluate":
            return run_files.made_predictions(self._root, attempt.run_id, attempt.number)
        return run_files.made_checkpoint(self._root, attempt.run_id, attempt.started_at)
