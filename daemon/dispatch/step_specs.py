"""Build a run's configuration, and a step's spec from drops, champion and the history of the track."""

from itertools import takewhile
from typing import cast

import structlog
from sqlalchemy import Engine, text
from sqlmodel import Session, col, select

from daemon.champions import history, promotion
from daemon.champions.watch import watch_fields
from daemon.queue import suspects
from daemon.queue.snapshots import judged_before
from daemon.settings.model import Settings
from daemon.state import run_files
from daemon.state.database import transaction
from daemon.state.questions import ELDERS, SNAPSHOT, UP_TO
from daemon.state.states import DropState, Purpose
from daemon.state.tables import Attempt, Drop, Run, Track
from pipeline.config import RunConfig, Unit
from pipeline.contract import StepSpec
from pipeline.decide import policy
from pipeline.errors import DropforgeError
from pipeline.steps import BY_NAME, PREVIEW

#: Steps whose spec has the run's drops: there may be thousands.
_WITH_DROPS = frozenset({"prepare", "decide"})
#: Models are folders, no hub is asked. The worker passes on no other than `step_process.STEP_VARIABLES`.
_STEP_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
log = structlog.get_logger()


def compose(settings: Settings, track: Track) -> RunConfig:
    """
    Return the configuration of a run of `track` that begins now: the settings and what the track has fixed.

    The track's split shares replace the settings'; its metric, answer length and batch size apply where none is set;
    its salt and unit always. Raises `SettingsError` if the track is not in the settings.
    """
    wanted = settings.track(track.name)
    fixed = {
        "metric": wanted.evaluate.metric if wanted.evaluate.metric != "auto" else track.metric,
        "max_new_tokens": wanted.evaluate.max_new_tokens or track.max_new_tokens,
        "batch_size": wanted.evaluate.batch_size or track.eval_batch_size,
    }
    return RunConfig(
        track=track.name,
        base_model=wanted.base_model,
        base_model_id=track.base_model_id or "",
        salt=track.salt,
        unit=cast("Unit | None", track.unit),
        train=wanted.train,
        gate=wanted.gate,
        guards=wanted.guards,
        judge=wanted.judge,
        split=wanted.split.model_copy(update=_fixed_shares(track)),
        evaluate=wanted.evaluate.model_copy(update={key: value for key, value in fixed.items() if value}),
    )


def warn_of_fixed(settings: Settings, track: Track) -> None:
    """Log a warning for each split share in the settings that differs from the track's fixed share, which applies."""
    wanted = settings.track(track.name).split
    for name, share in _fixed_shares(track).items():
        if share != getattr(wanted, name):
            log.warning("setting_is_fixed", track=track.name, setting=f"split.{name}", in_force=share)


def spec_of(engine: Engine, settings: Settings, run: Run, attempt: Attempt, inputs: dict[str, str]) -> StepSpec:
    """
    Return the spec of an attempt, with those of `inputs`, artifact paths by step name, that are of earlier steps.

    "prepare" and "decide" get the run's drops; a preview, whose attempt's number is a drop's id, those up to this drop.
    Raises `DropforgeError` if the step needs a drop that the database lacks.
    """
    earlier = list(takewhile(attempt.step.__ne__, BY_NAME))
    root = settings.work_folder
    folder = run_files.attempt_folder(attempt.run_id, attempt.step, attempt.number)
    with transaction(engine) as session:
        of_track = _of_track(session, settings, run)
        asked = {"run": attempt.run_id if attempt.step in _WITH_DROPS else None, "drop": attempt.number}
        which = UP_TO if attempt.step == PREVIEW.name else SNAPSHOT
        drops = session.connection().execute(text(which), asked).mappings().all()
        elders = session.connection().execute(text(ELDERS), asked).mappings().all()
    if lost := [drop["id"] for drop in drops if drop["sha256"] is None]:
        message = f"run {attempt.run_id} was made of drop {lost[0]}, which the database lacks"
        raise DropforgeError(message, "start one without it: dropforge train; or restore a backup: dropforge restore")
    return StepSpec.model_validate(
        {
            "run": attempt.run_id,
            "step": attempt.step,
            "attempt": attempt.number,
            "fence": attempt.fence,
            "root": str(root),
            "folder": folder,
            "checkpoints": f"runs/{attempt.run_id}/checkpoints",
            "predictions": "predictions",
            "inputs": {name: path for name, path in inputs.items() if name in earlier},
            "env": {**_STEP_ENVIRONMENT, "DROPFORGE_DEVICE": settings.device},
            "drops": tuple(map(dict, drops)),
            "elders": tuple(map(dict, elders)),
            "config": RunConfig.model_validate(run.config),
            "network": BY_NAME.get(attempt.step, PREVIEW).network,
            "parallel": settings.executor.parallel_here,
            **of_track,
        }
    )


def _of_track(session: Session, settings: Settings, run: Run) -> dict[str, object]:
    """Return the fields of a spec that come from the history of the run's track."""
    serving, past = promotion.champion(session, run.track), promotion.champions_of(session, run.track)
    uses, versions = judged_before(session, run.track, run.id or 0)
    proposed = select(Drop.rows).where(Drop.track == run.track, Drop.state == DropState.PROPOSED)
    since = (col(Drop.first_run).is_(None)) | (col(Drop.first_run) > (past[-1].run_id or 0))
    renewed = select(Drop.id).where(Drop.track == run.track, col(Drop.answers_accepted), since)
    former = history.former(past, session.get_one(Track, run.track), settings.work_folder)
    return {
        "champion": {**serving.model_dump(), "drops": past[-1].drops},
        "renewed": session.exec(renewed).all(),
        "former": former[: policy.FORMER],
        **watch_fields(session, run, past, former),
        "uses": uses,
        "judged_versions": versions,
        **_of_search(session, settings, run),
        "suspect": run.about_drop if run.purpose == Purpose.TRIAL else None,
        "left_out": run.about_drop if run.purpose == Purpose.LEFT_OUT else None,
        "proposed_rows": sum(session.exec(proposed).all()),
    }


def _of_search(session: Session, settings: Settings, run: Run) -> dict[str, dict[str, str]]:
    """
    Return a spec's fields `trial` and `blamed`: the artifact paths, by step, of two other runs, empty without them.

    `trial` is the trial of a control, `blamed` the run of `suspects.blamed_run`.
    """
    runs = {"trial": run.control_of, "blamed": suspects.blamed_run(session, run)}
    return {name: run_files.published(settings.work_folder, number) if number else {} for name, number in runs.items()}


def _fixed_shares(track: Track) -> dict[str, float]:
    """Return the split shares that the track has fixed, "heldout" and "dev", by name; empty before a verdict."""
    return {name: share for name, share in (track.split or {}).items() if name in {"heldout", "dev"}}


def key_of(attempt: Attempt) -> str:
    """Return an attempt's key, RUN-STEP-NUMBER, as in its spec."""
    return f"{attempt.run_id}-{attempt.step}-{attempt.number}"
