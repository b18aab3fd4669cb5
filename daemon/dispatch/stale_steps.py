"""
Stale steps: find the published steps whose inputs have changed, and unpublish them so that they are done again.

A step's key holds the settings that it reads, the drops, and the hashes of the data that it uses. A step is valid while
the key of today's settings, and of the drops without those taken out since the run began, equals the key that it was
made with. A stale step makes all later steps stale. Only `prepare` is done again without them, together with the
verdict: it is quick and may well produce the same rows, and once it is published again the steps made from the old data
are checked again.

The champion is part of a key where it matters. An evaluation against a former champion is stale as long as there is no
verdict on it (`apply_verdict` decides whether such a verdict is still valid), and data without the records that a
former champion was trained on is stale until something was trained on it. A training that starts from a champion is
stale as soon as another model serves, and so is the data that was prepared for it, however far the run is: otherwise a
model that was rolled back would return through its descendant.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from sqlalchemy import Engine
from sqlmodel import Session

from daemon.champions.promotion import champion
from daemon.dispatch.step_specs import compose
from daemon.queue import run_queue
from daemon.queue.states import ensure_track, known_run, published_attempts
from daemon.settings.model import Settings
from daemon.state import run_files
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.states import RunState
from daemon.state.tables import Run, promotion_of
from pipeline import durable
from pipeline.config import RunConfig
from pipeline.contract import RESULT_NAME, SPEC_NAME, StepResult, StepSpec
from pipeline.errors import DropforgeError
from pipeline.steps import BY_NAME, STEPS

log = structlog.get_logger()


class Remains(NamedTuple):
    """Result of `what_remains`: the stale steps of a run, and what is kept and repeated in words."""

    stale: tuple[str, ...]
    left: str
    """The former champion that the training started from, in words; empty if none."""
    words: str
    """What stands and what is done again, with those that were taken back before and not done since."""


def invalidate_stale(engine: Engine, state_folder: Path, run: Run, now: int) -> None:
    """
    Unpublish the stale steps of the claimed run; do nothing if it has published none.

    Records an event if the training started from a model that is not the champion any more.
    """
    run_id = run.id or 0
    if run.config is None or not run_files.published(state_folder, run_id):
        return
    found = what_remains(engine, state_folder, run)
    if found.left:
        with transaction(engine) as session:
            record_event(session, "run_began_again", now, track=run.track, run_id=run_id, reason=found.left)
    if found.stale:
        log.info("steps_taken_back", run=run_id, words=found.words)
        _unpublish(state_folder, run_id, found.stale)


def is_in_vain(engine: Engine, run: Run, spec: StepSpec) -> bool:
    """Return whether the running step of `spec` is useless: its training started from a former champion."""
    with transaction(engine) as session:
        serving = champion(session, run.track)
    return serving.model_id != spec.champion.model_id and bool(_Past(engine, Path(spec.root), run).left)


def retry_words(engine: Engine, settings: Settings, run_id: int, now: int) -> str:
    """Describe which steps a retry would keep and repeat; empty if unknown. Raises what `retry` raises."""
    with Session(engine, expire_on_commit=False) as session:  # never committed: the run only seems to begin
        state = run_queue.retry_in(session, run_id, now)
        run = known_run(session, run_id)
        try:
            config = compose(settings, ensure_track(session, run.track, now))
        except DropforgeError:
            return ""  # the run says so when it comes to it
        if state == RunState.QUEUED or not run_queue.begin(session, run, config, now):
            return ""
        session.expunge(run)
    try:
        return what_remains(engine, settings.state_folder, run).words
    except run_files.ArtifactDamaged:
        return ""  # the run says so when it comes to it


def retry(engine: Engine, settings: Settings, run_id: int, now: int, since: str | None = None) -> tuple[str, str]:
    """
    Let a failed, cancelled or crashed run continue; with `since`, do that step and all later ones again.

    Returns how the run continues, in words, and the result of `retry_words`. Raises `DropforgeError` if the run cannot
    be retried or there is no such step.
    """
    if since is not None:
        if since not in BY_NAME:
            raise DropforgeError(f"there is no step {since!r}", f"use one of {', '.join(BY_NAME)}")
        # Before the run is anybody's, and only if it can be retried: a refusal must leave its artifacts as they are.
        retry_words(engine, settings, run_id, now)
        invalidate(settings.state_folder, run_id, since)
    words = retry_words(engine, settings, run_id, now)
    waits = run_queue.retry(engine, run_id, now) == RunState.WAITING
    return f"run {run_id} {'goes on where it stopped' if waits else 'had not begun: it is queued again'}", words


def invalidate(state_folder: Path, run_id: int, step: str) -> None:
    """Unpublish `step` and all later steps of a run; no step of the run may be running."""
    names = [one.name for one in STEPS]
    _unpublish(state_folder, run_id, names[names.index(step) :])


def what_remains(engine: Engine, state_folder: Path, run: Run) -> Remains:
    """Return which published steps are stale under the run's own config and snapshot. Raises `ArtifactDamaged`."""
    done = list(run_files.published(state_folder, run.id or 0))
    past, stands = _Past(engine, state_folder, run), list(done)
    for name in reversed(done):
        if past.is_stale(name, stands):
            stale = {"prepare", "decide"} if name == "prepare" else set(done[done.index(name) :])
            stands = [one for one in stands if one not in stale]
    again = [step.name for step in STEPS if step.name in {*done, *past.made} and step.name not in stands]
    left = next(iter(past.left.values()), "")
    words = run_files.again_words(stands, again, certain="prepare" in stands)
    return Remains(tuple(name for name in done if name not in stands), left, f"{left}: {words}" if left else words)


def _unpublish(state_folder: Path, run_id: int, steps: Collection[str]) -> None:
    """Unpublish steps, the last one first, so that after a crash the first of them is still found to be stale."""
    for name in reversed(list(run_files.published(state_folder, run_id))):
        if name in steps:
            run_files.unpublish(state_folder, run_id, name)


class _Past:
    """The inputs that a run's published steps were made from, to be compared with today's."""

    def __init__(self, engine: Engine, state_folder: Path, run: Run) -> None:
        self._folder, self._run = state_folder, run.id or 0
        self._config = RunConfig.model_validate(run.config)
        self._drops = [drop["id"] for drop in run.snapshot or ()]
        #: By step: the number of its last published attempt, and of the `prepare` attempt whose data that one read.
        self.made: dict[str, int] = {}
        self._read: dict[str, int] = {}
        for one in published_attempts(engine, self._run):
            self.made[one.step] = one.number
            self._read[one.step] = self.made.get("prepare", 0)
        with transaction(engine) as session:
            self._serving = champion(session, run.track)
            is_champion = promotion_of(session, self._run) is not None
        self._dataset = run_files.load_dataset(state_folder, self._run)
        self._report = run_files.load_evaluation(state_folder, self._run)
        #: By step: the former champion that it started from, in words; empty if the run's own model was promoted.
        self.left = {} if is_champion else self._left()

    def _left(self) -> dict[str, str]:
        adapter = run_files.load_adapter(self._folder, self._run)
        behind = {
            "prepare": None if self._dataset is None else self._dataset.start,
            "train": None if adapter is None else adapter.start,
        }
        return {
            name: f"generation {model.generation}, from which it was trained, is not the champion any more"
            for name, model in behind.items()
            if model is not None and model.model_id != self._serving.model_id
        }

    def is_stale(self, name: str, stands: Collection[str]) -> bool:
        """Return whether a published step's inputs have changed; some do not count if a later step is in `stands`."""
        against = self._report if name == "evaluate" and "decide" not in stands else None
        if name in self.left or (against is not None and not against.is_against(self._serving)):
            return True
        try:
            spec = self._folder / run_files.attempt_folder(self._run, name, self.made.get(name, 0)) / SPEC_NAME
            if not spec.exists():
                return False
            made = StepSpec.model_validate_json(spec.read_bytes())
            then = _key(name, made.config, [drop.id for drop in made.drops], self._data(self._read[name]))
            today = _key(name, self._config, self._drops, self._data(self.made.get("prepare", 0)))
        except ValueError:
            return True  # it is damaged, so nobody knows what the step was made from
        if name == "prepare" and self._leaves_out(stands):
            # The same model knows the same, whatever served in between.
            then, today = (*then, made.champion.model_id), (*today, self._serving.model_id)
        return then != today or (name == "evaluate" and self._has_other_batches(made.config))

    def _data(self, number: int) -> dict[str, Any]:
        """Return artifact and file hashes of `prepare` attempt `number`, {} for 0. Raises `ValueError` if damaged."""
        if not number:
            return {}  # the daemon died before it noted which attempt made the data, and the run ended
        folder = self._folder / run_files.attempt_folder(self._run, "prepare", number)
        result = StepResult.model_validate(durable.read_json(folder / RESULT_NAME))
        return {**(result.artifact or {}), **result.outputs}

    def _leaves_out(self, stands: Collection[str]) -> bool:
        """
        Return whether the data depends on what a champion was trained on, and nothing was trained on it yet.

        Data that is too small may suffice for another champion. A training that has begun goes on with its own data.
        """
        data = self._dataset
        if data is None or "train" in stands or not (data.seen_by_champion or self._config.gate.on == "seen"):
            return False
        # A training that has begun goes on with the very same files only.
        return data.shortfall is not None or not run_files.made_checkpoint(self._folder, self._run, 0)

    def _has_other_batches(self, made: RunConfig) -> bool:
        """Return whether today's batch size is set, and is neither the former setting nor the size that was used."""
        taken = 0 if self._report is None else self._report.batch_size
        return self._config.evaluate.batch_size not in {0, made.evaluate.batch_size, taken}


def _key(step: str, config: RunConfig, drops: list[object], data: dict[str, Any]) -> tuple[object, ...]:
    """
    Return the key of a step: the settings that it reads, the drops, and the values in `data` that it uses.

    The track's noise floor is not part of it: the report that measured it contains it.
    """
    evaluate, gate, train = config.evaluate, config.gate, config.train
    metric = data.get("metric") if evaluate.metric == "auto" else evaluate.metric
    max_new_tokens = evaluate.max_new_tokens or data.get("max_new_tokens")
    judge = (config.judge.url, config.judge.model, config.judge.records)
    match step:
        case "prepare":
            rows = (config.salt, config.split, config.base_model_id, gate.on, drops)
            return (*rows, train.max_length, train.beginning(), gate.min_records, metric, max_new_tokens)
        case "train":
            # The drops by themselves: what a model is said to know is its run's snapshot, whatever rows that came to.
            start = (data.get("start") or {}).get("model_id")
            files = (data.get("data/train.jsonl"), data.get("data/dev.jsonl"))
            return (train.decisive(), config.base_model_id, drops, start, *files)
        case "merge":
            return (evaluate.repetition_penalty, max_new_tokens)
        case "evaluate":
            how = (evaluate.repetition_penalty, evaluate.general, bool(evaluate.vllm))
            return (*how, metric, max_new_tokens, data.get("data/heldout.jsonl"))
        case "judge":
            return judge
        case _:
            # A judge that was added or removed since changes the verdict's inputs.
            return (gate, config.guards, *judge)
