"""
Which published steps of a run still stand.

A run that a person retries goes on with today's settings and without the drops that were taken out since. Every
published step is compared with the spec that it was made from; the first one that would be made from something else is
invalidated, and all later ones with it. So is an evaluation against a former champion, as long as there is no verdict
on it (what such a verdict still means, `apply_verdict` says), and data without records that a former champion knew,
until something was trained on it.
"""

from collections.abc import Collection
from pathlib import Path

import structlog
from pydantic import ValidationError
from sqlalchemy import Engine

from daemon.champions.journal import champion
from daemon.queue.attempts import published_attempts
from daemon.state import run_files
from daemon.state.database import transaction
from daemon.state.tables import Run
from pipeline.config import EvaluateConfig, RunConfig
from pipeline.contract import SPEC_NAME, StepSpec
from pipeline.steps import BY_NAME, STEPS, next_step

log = structlog.get_logger()


def up_to_date(engine: Engine, state_folder: Path, run: Run) -> dict[str, str]:
    """Take back the steps of a run in hand that are stale; return the others: step name → path of its artifact."""
    run_id = run.id or 0
    done = run_files.published(state_folder, run_id)
    if not done or run.config is None:
        return done
    stale = _first_stale(engine, state_folder, run, done)
    whole = list(done) if stale is None else list(done)[: list(done).index(stale)]
    if "evaluate" in whole and "decide" not in whole and not _is_against_todays(engine, state_folder, run):
        stale = "evaluate"
    if "prepare" in whole and _is_left_for_another(engine, state_folder, run, whole):
        stale = "prepare"
    if stale is None:
        return done
    log.info("steps_taken_back", run=run_id, since=stale)
    invalidate(state_folder, run_id, stale)
    return run_files.published(state_folder, run_id)


def invalidate(state_folder: Path, run_id: int, step: str) -> list[str]:
    """
    Take a run's published artifacts back from `step` on; return the names of the steps that are to be done again.

    The last one goes first: what is left after a crash is a whole beginning. Nobody may be working on the run.
    """
    names = [one.name for one in STEPS]
    later = names[names.index(step) :]
    done = run_files.published(state_folder, run_id)
    for name in reversed(later):
        if name in done:
            run_files.unpublish(state_folder, run_id, name)
    return later


def _first_stale(engine: Engine, state_folder: Path, run: Run, done: dict[str, str]) -> str | None:
    numbers = published_attempts(engine, run.id or 0)
    config = RunConfig.model_validate(run.config)
    ids = [drop["id"] for drop in run.snapshot or ()]
    for name in done:
        if name not in numbers:
            continue
        try:
            made = _order(state_folder, run.id or 0, name, numbers[name])
        except ValidationError:
            return name  # it is damaged, so nobody knows what the step was made from
        if made is None:
            continue
        if _basis(name, made.config, [drop.id for drop in made.drops]) != _basis(name, config, ids):
            return name
        if name == "prepare" and not _same_measure(state_folder, run.id or 0, config.evaluate):
            return name
        if name == "evaluate" and not _same_batches(state_folder, run.id or 0, made.config, config):
            return name
    return None


def _order(state_folder: Path, run_id: int, step: str, number: int) -> StepSpec | None:
    """Return the spec of an attempt, if it is there still. Raises `ValidationError` on a damaged one."""
    path = state_folder / run_files.attempt_folder(run_id, step, number) / SPEC_NAME
    return StepSpec.model_validate_json(path.read_bytes()) if path.exists() else None


def _basis(step: str, config: RunConfig, drops: list[object]) -> tuple[object, ...]:
    """
    Return what a step is made from, beside the artifacts of the steps before it.

    The track's noise floor is none of it: a report that measured it has it.
    """
    evaluate, gate, judge = config.evaluate, config.gate, config.judge
    asked = (judge.url, judge.model, judge.records)
    match step:
        case "prepare":
            limits = (gate.on, gate.min_records, gate.min_records_continuous)
            return (config.salt, config.split, config.base_model_id, config.special_tokens, *limits, drops)
        case "train":
            return (config.train, config.base_model_id)
        case "merge":
            return (evaluate.repetition_penalty,)
        case "evaluate":
            return (evaluate.repetition_penalty, evaluate.general, evaluate.engine)
        case "judge":
            return asked
        case _:
            # A judge that was taken on or dismissed since is heard, or not.
            return (gate, config.guards, *asked)


def _is_against_todays(engine: Engine, state_folder: Path, run: Run) -> bool:
    """Say whether the run's report compares its candidate with the champion that serves now."""
    report = run_files.load_evaluation(state_folder, run.id or 0)
    with transaction(engine) as session:
        serving = champion(session, run.track)
    return report is None or report.is_against(serving)


def _is_left_for_another(engine: Engine, state_folder: Path, run: Run, whole: Collection[str]) -> bool:
    """
    Say whether data left records out for a champion that serves no more, and no training goes to waste without it.

    Too little data, too, may be so only for that champion. Where none was left out, no other one leaves more to ask.
    """
    run_id = run.id or 0
    dataset = run_files.load_dataset(state_folder, run_id)
    if dataset is None or not dataset.seen_by_champion or "train" in whole:
        return False
    step = next_step(whole, dataset, RunConfig.model_validate(run.config))
    if step is BY_NAME["train"] and run_files.made_checkpoint(state_folder, run_id, 0):
        # It goes on with the very same files only.
        return False
    number = published_attempts(engine, run_id).get("prepare", 0)
    made = _order(state_folder, run_id, "prepare", number)
    with transaction(engine) as session:
        serving = champion(session, run.track)
    # The same model knows the same, whatever served in between.
    return made is not None and made.champion.model_id != serving.model_id


def _same_batches(state_folder: Path, run_id: int, made: RunConfig, config: RunConfig) -> bool:
    """Say whether the settings still ask for as many prompts at once as `evaluate` took, or leave it to the track."""
    report = run_files.load_evaluation(state_folder, run_id)
    taken = 0 if report is None else report.batch_size
    return config.evaluate.batch_size in {0, made.evaluate.batch_size, taken}


def _same_measure(state_folder: Path, run_id: int, evaluate: EvaluateConfig) -> bool:
    """Say whether the settings still ask for what `prepare` chose, or leave the choice to it."""
    dataset = run_files.load_dataset(state_folder, run_id)
    return dataset is None or (
        evaluate.metric in {"auto", dataset.metric} and evaluate.max_new_tokens in {0, dataset.max_new_tokens}
    )
