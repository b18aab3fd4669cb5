"""
Stale steps: find the published steps whose inputs have changed, and unpublish them so that they are done again.

A step's key holds the settings that it reads and, for `prepare`, the drops. A step is stale if the key of today's
settings, and of the drops without those taken out since the run began, differs from the key that it was made with. All
steps after a stale one are stale, too.

The champion is part of a key where it matters. An evaluation against a former champion is stale as long as there is no
verdict on it (`apply_verdict` decides whether such a verdict is still valid), and data without the records that a
former champion was trained on is stale until something was trained on it. A training that starts from a champion is
stale as soon as another model serves, and so is the data that was prepared for it, however far the run is: otherwise a
model that was rolled back would return through its descendant.
"""

from collections.abc import Collection
from pathlib import Path

import structlog
from sqlalchemy import Engine

from daemon.champions.promotion import champion
from daemon.queue import run_queue
from daemon.queue.states import published_attempts
from daemon.state import run_files
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.states import RunState
from daemon.state.tables import Run
from daemon.system.folders import WorkFolder
from pipeline import durable
from pipeline.artifacts import Dataset
from pipeline.config import RunConfig
from pipeline.contract import SPEC_NAME, StepSpec
from pipeline.errors import DropforgeError
from pipeline.steps import BY_NAME, STEPS

log = structlog.get_logger()


def first_stale(engine: Engine, work_folder: WorkFolder, run: Run) -> tuple[str, str] | None:
    """
    Return the first published step of a run whose settings, drops or champion have changed, and a reason; or `None`.

    The reason is a sentence if the champion that the training starts from was replaced, else "". Raises
    `ArtifactDamaged` if an artifact cannot be parsed.
    """
    done = list(run_files.published(work_folder, run.id or 0))
    if run.config is None or not done:
        return None
    past, valid = _Past(engine, work_folder, run), done
    # The last one first: an evaluation is valid as long as the verdict on it is.
    for number, name in reversed(list(enumerate(done))):
        if past.is_stale(name, valid):
            valid = done[:number]
    return None if valid == done else (done[len(valid)], past.left)


def is_useless(engine: Engine, run: Run, spec: StepSpec) -> bool:
    """Return whether the open step of `spec` is useless: the champion that its training starts from was replaced."""
    with transaction(engine) as session:
        serving = champion(session, run.track)
    return serving.model_id != spec.champion.model_id and bool(_Past(engine, WorkFolder(Path(spec.root)), run).left)


def retry(engine: Engine, work_folder: WorkFolder, run_id: int, now: int, since: str | None = None) -> str:
    """
    Let a failed, cancelled or crashed run continue; with `since`, do that step and all later ones again.

    It is set to waiting or queued, for the daemon to run with today's settings. Returns a sentence for the user. Raises
    `DropforgeError`, with nothing changed, if the run cannot be retried or there is no such run or step.
    """
    if since is not None and since not in BY_NAME:
        raise DropforgeError(f"there is no step {since!r}", f"use one of {', '.join(BY_NAME)}")
    with transaction(engine) as session:
        waits = run_queue.retry(session, run_id, now) == RunState.WAITING
        if since is not None:
            # Before the commit, after which a daemon may claim the run.
            invalidate(work_folder, run_id, since)
    return f"run {run_id} {'goes on where it stopped' if waits else 'had not begun: it is queued again'}"


def redo(engine: Engine, work_folder: WorkFolder, run: Run, stale: tuple[str, str], now: int) -> None:
    """Unpublish the step that `first_stale` returned, and all later ones; record its reason, if any, as an event."""
    step, reason = stale
    if reason:
        with transaction(engine) as session:
            record_event(session, "run_began_again", now, track=run.track, run_id=run.id, reason=reason)
    log.info("steps_taken_back", run=run.id, first=step)
    invalidate(work_folder, run.id or 0, step)


def invalidate(work_folder: WorkFolder, run_id: int, step: str) -> None:
    """Unpublish `step` and all later steps that are published (`run_files.unpublish`); no step may be running."""
    names = [step.name for step in STEPS]
    later = names[names.index(step) :]
    # The last one first, so that after a crash the first of them is still found to be stale.
    for name in reversed(list(run_files.published(work_folder, run_id))):
        if name in later:
            run_files.unpublish(work_folder, run_id, name)


class _Past:
    """The inputs that a run's published steps were made from, to be compared with today's."""

    def __init__(self, engine: Engine, work_folder: WorkFolder, run: Run) -> None:
        self._folder, self._run = work_folder, run.id or 0
        self._config = RunConfig.model_validate(run.config)
        self._drops = run.snapshot or []
        #: By step: the number of its last published attempt.
        self._made = {attempt.step: attempt.number for attempt in published_attempts(engine, self._run)}
        with transaction(engine) as session:
            self._serving = champion(session, run.track)
        self._dataset = run_files.load_dataset(work_folder, self._run)
        self._report = run_files.load_evaluation(work_folder, self._run)
        #: Why the training has to begin again: the champion that it starts from was replaced; empty if it need not.
        self.left = ""
        start = None if self._dataset is None else self._dataset.start
        if start is not None and start.model_id != self._serving.model_id:
            self.left = f"generation {start.generation}, from which it was trained, is not the champion any more"

    def is_stale(self, name: str, valid: Collection[str]) -> bool:
        """
        Return whether a published step's inputs have changed; `valid` are the published steps not known to be stale.

        Another champion makes an evaluation stale unless "decide" is valid, data if it `_leaves_out` what a champion
        was trained on, and every step if the training starts from the former one. With a damaged spec.json it is stale.
        """
        against = self._report if name == "evaluate" and "decide" not in valid else None
        if self.left or (against is not None and not against.is_against(self._serving)):
            return True
        spec = self._folder / run_files.attempt_folder(self._run, name, self._made.get(name, 0)) / SPEC_NAME
        if not spec.exists():
            return False  # the daemon died before it noted which attempt made it
        try:
            made = StepSpec.model_validate_json(durable.read_regular(spec))
        except ValueError:
            return True  # it is damaged, so nobody knows what the step was made from
        then = _key(name, made.config, [drop.id for drop in made.drops], self._dataset)
        today = _key(name, self._config, self._drops, self._dataset)
        if name == "prepare" and self._leaves_out(valid):
            # The same model knows the same, whatever served in between.
            then, today = (*then, made.champion.model_id), (*today, self._serving.model_id)
        return then != today or (name == "evaluate" and self._has_other_batches(made.config))

    def _leaves_out(self, valid: Collection[str]) -> bool:
        """
        Return whether the data depends on what a champion was trained on, and no training on it has begun.

        A training has begun with its first checkpoint; of data that is too small, only a published one counts.
        """
        data = self._dataset
        if data is None or "train" in valid or not (data.seen_by_champion or self._config.gate.on == "seen"):
            return False
        return data.shortfall is not None or not run_files.made_checkpoint(self._folder, self._run, 0)

    def _has_other_batches(self, made: RunConfig) -> bool:
        """Return whether today's batch size is set, and is neither the former setting nor the size that was used."""
        taken = 0 if self._report is None else self._report.batch_size
        return self._config.evaluate.batch_size not in {0, made.evaluate.batch_size, taken}


def _key(step: str, config: RunConfig, drops: list[int], data: Dataset | None) -> tuple[object, ...]:
    """
    Return the key of a step: the settings that it reads and earlier steps do not, and the drops for `prepare`.

    For metric, answer length and unit that the settings leave open, the key has those of the prepared `data`.
    """
    evaluate, gate, train = config.evaluate, config.gate, config.train
    judge = (config.judge.url, config.judge.model, config.judge.records)
    match step:
        case "prepare":
            metric = data.metric if data is not None and evaluate.metric == "auto" else evaluate.metric
            max_new_tokens = evaluate.max_new_tokens or (data.max_new_tokens if data is not None else 0)
            unit = config.unit or (data.unit if data is not None else None)
            rows = (config.salt, config.split, unit, config.base_model_id, gate.on, drops)
            return (*rows, train.max_length, train.format, train.beginning(), gate.min_records, metric, max_new_tokens)
        case "train":
            return (train.decisive(),)
        case "merge":
            return (evaluate.repetition_penalty,)
        case "evaluate":
            return (evaluate.general, bool(evaluate.vllm))
        case "judge":
            return judge
        case _:
            # A judge that was added or removed since changes the verdict's inputs.
            return (gate, config.guards, *judge)
