"""
Which published steps of a run still stand.

A run that a person retries goes on with today's settings and without the drops that were taken out since. A published
step is stale where settings of its own differ from those that it was made with, or where what it takes from the data
does. `prepare` is quick, and other settings may well come to the same rows: it is done again alone, and once it is
published anew what was made from the old data is looked at again. Any other stale step takes all later ones with it,
and the verdict goes with each. So does an evaluation against a former champion, as long as there is no verdict on it
(what such a verdict still means, `apply_verdict` says), and data without records that a former champion knew, until
something was trained on it.

A training that goes on from a champion, or is combined with one, is stale as soon as another model serves, and so is
the data that was prepared for it, however far the run is: else a model that was rolled back would return as its child.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import structlog
from sqlalchemy import Engine
from sqlmodel import Session

from daemon.champions.journal import champion
from daemon.dispatch.run_config import compose
from daemon.queue import run_queue
from daemon.queue.attempts import published_attempts
from daemon.queue.states import known_run
from daemon.queue.tracks import ensure_track
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
from pipeline.steps import BY_NAME, STEPS, next_step

#: What each step takes of the files that `prepare` made, by their hashes, and of its choices; `prepare` makes these.
_FILES = {"train": ("data/train.jsonl", "data/dev.jsonl"), "evaluate": ("data/heldout.jsonl",)}
_CHOICES = {
    "prepare": ("metric", "max_new_tokens"),
    "merge": ("max_new_tokens",),
    "evaluate": ("metric", "max_new_tokens"),
}
log = structlog.get_logger()


@dataclass(frozen=True)
class Remains:
    """What of a run's published steps stands."""

    stands: tuple[str, ...]
    stale: tuple[str, ...]
    """Published steps that are to be taken back."""
    again: tuple[str, ...]
    """The stale ones, and those that were taken back before and not done since."""
    certain: bool
    """Whether `stands` is sure: not where `prepare` is done again and may come to other rows."""
    left: str = ""
    """The former champion that the training started from, in words; empty if none."""

    @property
    def words(self) -> str:
        """What stands and what is done again, for a person."""
        again = run_files.again_words(self.stands, self.again, certain=self.certain)
        return f"{self.left}: {again}" if self.left else again


def invalidate_stale(engine: Engine, state_folder: Path, run: Run, now: int) -> None:
    """Unpublish the steps of a run in hand that are stale."""
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
    """Return whether the running step of `spec` belongs to a training from a former champion."""
    with transaction(engine) as session:
        serving = champion(session, run.track)
    return serving.model_id != spec.champion.model_id and bool(_Past(engine, Path(spec.root), run).left)


def retry_words(engine: Engine, settings: Settings, run_id: int, now: int) -> str:
    """Return what a retry would keep and do again; empty if nobody can tell. Raises `DropforgeError` as `retry`."""
    with Session(engine, expire_on_commit=False) as session:  # never committed
        state = run_queue.retry_in(session, run_id, now)
        run = known_run(session, run_id)
        if state == RunState.QUEUED or not _can_begin(session, settings, run, now):
            return ""
        session.expunge(run)
    try:
        return what_remains(engine, settings.state_folder, run).words
    except run_files.ArtifactDamaged:
        return ""  # the run says so when it comes to it


def _can_begin(session: Session, settings: Settings, run: Run, now: int) -> bool:
    """Begin a run by today's settings, in a transaction that is not committed; return whether it could."""
    try:
        config = compose(settings, ensure_track(session, run.track, now))
    except DropforgeError:
        return False  # the run says so when it comes to it
    return run_queue.begin(session, run, config, now)


def retry(engine: Engine, settings: Settings, run_id: int, now: int, since: str | None = None) -> tuple[str, str]:
    """
    Let a failed, cancelled or crashed run go on, doing `since` and all later steps again if that is named.

    Returns in words how it goes on, and what `retry_words` says. Raises `DropforgeError` if it cannot be retried or
    there is no such step.
    """
    if since is not None and since not in BY_NAME:
        raise DropforgeError(f"there is no step {since!r}", f"use one of {', '.join(BY_NAME)}")
    if since is not None:
        # Before the run is anybody's: a refusal must leave its artifacts as they are.
        run_queue.require_retriable(engine, run_id)
        invalidate(settings.state_folder, run_id, since)
    words = retry_words(engine, settings, run_id, now)
    waits = run_queue.retry(engine, run_id, now) == RunState.WAITING
    return f"run {run_id} {'goes on where it stopped' if waits else 'had not begun: it is queued again'}", words


def invalidate(state_folder: Path, run_id: int, step: str) -> None:
    """Take a run's published artifacts back from `step` on; nobody may be working on the run."""
    names = [one.name for one in STEPS]
    _unpublish(state_folder, run_id, names[names.index(step) :])


def what_remains(engine: Engine, state_folder: Path, run: Run) -> Remains:
    """Return what of a run stands, by the settings and the snapshot that it has. Raises `ArtifactDamaged`."""
    done = list(run_files.published(state_folder, run.id or 0))
    past = _Past(engine, state_folder, run)
    first = next((name for name in done if name != "prepare" and past.is_stale(name)), None)
    stale = set() if first is None else set(done[done.index(first) :])
    if "prepare" in done and past.is_stale("prepare"):
        stale |= {"prepare", "decide"}
    whole = [name for name in done if name not in stale]
    if "evaluate" in whole and "decide" not in whole and not past.is_against_todays():
        stale |= {"evaluate", "judge"}
    if "prepare" in whole and past.is_left_for_another(whole):
        stale |= {"prepare", "decide"}
    stands = tuple(name for name in done if name not in stale)
    return Remains(
        stands=stands,
        stale=tuple(name for name in done if name in stale),
        again=tuple(step.name for step in STEPS if step.name in {*done, *past.made} and step.name not in stands),
        certain="prepare" in stands or past.has_same_rows(),
        left=next(iter(past.left.values()), ""),
    )


def _unpublish(state_folder: Path, run_id: int, steps: Collection[str]) -> None:
    """Take steps back, the last one first: whatever is left after a crash, the first of them is stale still."""
    for name in reversed(list(run_files.published(state_folder, run_id))):
        if name in steps:
            run_files.unpublish(state_folder, run_id, name)


class _Past:
    """What a run's published steps were made from, and whether that is still so."""

    def __init__(self, engine: Engine, state_folder: Path, run: Run) -> None:
        self.folder = state_folder
        self.run_id = run.id or 0
        self.config = RunConfig.model_validate(run.config)
        self._drops = [drop["id"] for drop in run.snapshot or ()]
        #: By step: the number of the attempt that it was made by last, and of the one whose data that read.
        self.made: dict[str, int] = {}
        self._read: dict[str, int] = {}
        for one in published_attempts(engine, self.run_id):
            self.made[one.step] = one.number
            self._read[one.step] = self.made.get("prepare", 0)
        with transaction(engine) as session:
            self.serving = champion(session, run.track)
            is_champion = promotion_of(session, self.run_id) is not None
        #: By step: the former champion that it was trained from, in words; none if its own model was promoted.
        self.left = {} if is_champion else self._left()

    def _left(self) -> dict[str, str]:
        data = run_files.load_dataset(self.folder, self.run_id)
        adapter = run_files.load_adapter(self.folder, self.run_id)
        behind = {
            "prepare": () if data is None else (data.start,),
            "train": () if adapter is None else (adapter.start, *adapter.also_trained_on),
        }
        return {
            name: f"generation {model.generation}, from which it was trained, is not the champion any more"
            for name, models in behind.items()
            for model in models
            if model is not None and model.model_id != self.serving.model_id
        }

    def is_stale(self, name: str) -> bool:
        """Say whether a published step would be made from something else today."""
        if name in self.left:
            return True
        try:
            made = self.spec(name)
            if made is None:
                return False
            differs = _basis(name, made.config, _ids(made)) != _basis(name, self.config, self._drops)
            return differs or self._asks_otherwise(name, made.config) or self._has_other_data(name)
        except ValueError:
            return True  # it is damaged, so nobody knows what the step was made from

    def spec(self, name: str) -> StepSpec | None:
        """Return what the attempt that made a step was told, if that is there. Raises `ValueError` if it is damaged."""
        path = self._attempt(name, self.made.get(name, 0)) / SPEC_NAME
        return StepSpec.model_validate_json(path.read_bytes()) if path.exists() else None

    def has_same_rows(self) -> bool:
        """Say whether `prepare`, done again, has to come to the same rows: its settings and drops are the same."""
        try:
            made = self.spec("prepare")
        except ValueError:
            return False
        if made is None or self.config.train.start == "champion":
            return False  # another champion may serve, to which other rows are new
        return _rows_from(made.config, _ids(made)) == _rows_from(self.config, self._drops)

    def is_against_todays(self) -> bool:
        """Return whether the run's report compares its candidate with the champion that serves now."""
        report = run_files.load_evaluation(self.folder, self.run_id)
        return report is None or report.is_against(self.serving)

    def is_left_for_another(self, whole: Collection[str]) -> bool:
        """
        Return whether data leaves out what a former champion knew, and nothing was trained on it yet.

        Too little data may be so for that champion only. Where none was left out, another champion leaves no more.
        """
        dataset = run_files.load_dataset(self.folder, self.run_id)
        if dataset is None or "train" in whole or not (dataset.seen_by_champion or self.config.gate.on == "seen"):
            return False
        step = next_step(whole, dataset, self.config)
        if step is BY_NAME["train"] and run_files.made_checkpoint(self.folder, self.run_id, 0):
            return False  # it goes on with the very same files only
        made = self.spec("prepare")
        # The same model knows the same, whatever served in between.
        return made is not None and made.champion.model_id != self.serving.model_id

    def _attempt(self, name: str, number: int) -> Path:
        return self.folder / run_files.attempt_folder(self.run_id, name, number)

    def _asks_otherwise(self, name: str, made: RunConfig) -> bool:
        """Say whether the settings ask for another choice than was made, and do not leave it to the step."""
        today = self.config.evaluate
        if name == "evaluate":
            report = run_files.load_evaluation(self.folder, self.run_id)
            taken = 0 if report is None else report.batch_size
            if today.batch_size not in {0, made.evaluate.batch_size, taken}:
                return True
        choices = _CHOICES.get(name, ())
        dataset = run_files.load_dataset(self.folder, self.run_id) if choices else None
        return dataset is not None and any(
            getattr(today, choice) not in {"auto", 0, getattr(dataset, choice)} for choice in choices
        )

    def _has_other_data(self, name: str) -> bool:
        """Say whether the data of today differs in what a step took of the data that it was made from."""
        read, today = self._read[name], self.made.get("prepare", 0)
        if read == today or "prepare" not in run_files.published(self.folder, self.run_id):
            return False
        return self._taken(name, read) != self._taken(name, today)

    def _taken(self, name: str, number: int) -> list[object]:
        """Return what a step takes of an attempt at `prepare`. Raises `ValueError` if its result is not there."""
        result = StepResult.model_validate(durable.read_json(self._attempt("prepare", number) / RESULT_NAME))
        data = result.artifact or {}
        files = [result.outputs.get(file) for file in _FILES.get(name, ())]
        begins = (data.get("start") or {}).get("model_id") if name == "train" else None
        return [begins, *files, *(data.get(choice) for choice in _CHOICES.get(name, ()))]


def _ids(spec: StepSpec) -> list[object]:
    return [drop.id for drop in spec.drops]


def _rows_from(config: RunConfig, drops: list[object]) -> tuple[object, ...]:
    """Return what decides which rows are trained on, and over which model, beside the champion."""
    of_data = (config.salt, config.split, config.base_model_id, config.special_tokens, config.gate.on, drops)
    return (*of_data, config.train.max_length, config.train.beginning())


def _basis(step: str, config: RunConfig, drops: list[object]) -> tuple[object, ...]:
    """
    Return what a step is made from, beside the artifacts of the steps before it.

    The track's noise floor is none of it: a report that measured it has it.
    """
    evaluate, gate, judge = config.evaluate, config.gate, config.judge
    asked = (judge.url, judge.model, judge.records)
    match step:
        case "prepare":
            return (*_rows_from(config, drops), gate.min_records, gate.min_records_continuous)
        case "train":
            # The drops by themselves: what a model is said to know is its run's snapshot, whatever rows that came to.
            return (config.train.decisive(), config.base_model_id, drops)
        case "merge":
            return (evaluate.repetition_penalty,)
        case "evaluate":
            return (evaluate.repetition_penalty, evaluate.general, evaluate.engine)
        case "judge":
            return asked
        case _:
            # A judge that was taken on or dismissed since is heard, or not.
            return (gate, config.guards, *asked)
