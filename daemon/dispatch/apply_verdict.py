"""
Apply a verdict: promote the candidate or let it wait for approval, put drops on trial, end the run.

One transaction changes champion, run and drops, so a crash leaves all of it or nothing. What a first verdict fixes is
stored when `decide` is published (`Dispatcher._end`), and after a crash once more.
"""

import shutil
from typing import Any

import structlog
from sqlalchemy import Engine
from sqlmodel import Session

from daemon.champions import decisions, promotion
from daemon.champions.history import blocker
from daemon.champions.promotion import champions_of, require_generation
from daemon.champions.watch import note_watch, read_watch
from daemon.dispatch.stale_steps import invalidate
from daemon.queue import leave_one_out, run_queue, states, suspects
from daemon.settings.model import Settings
from daemon.state import run_files
from daemon.state.clauses import verdict_clauses
from daemon.state.database import transaction
from daemon.state.events import Word, record_event
from daemon.state.states import AWAITING
from daemon.state.tables import Run, Track
from daemon.system.folders import WorkFolder
from daemon.system.sd_notify import showing_life
from pipeline.artifacts import Verdict
from pipeline.config import RunConfig
from pipeline.decide.explain import sentence
from pipeline.decide.policy import WATCH_RETURN
from pipeline.errors import DropforgeError, StepFailed
from pipeline.models.manifest import verify_manifest

log = structlog.get_logger()


def fix_measures(engine: Engine, work_folder: WorkFolder, claim: states.Claim, run: Run, now: int) -> None:
    """
    Store a run's metric, answer length, split, unit and evaluation batch size on its track, where the track has none.

    Later runs use them (`step_specs.compose`). A batch size below the run's setting replaces that of the track. Records
    an event if anything was stored. Does nothing if data set or evaluation are not published. Raises `LostClaim` if the
    claim is not valid any more, `ArtifactDamaged` if an artifact cannot be parsed.
    """
    dataset = run_files.load_dataset(work_folder, claim.run_id)
    report = run_files.load_evaluation(work_folder, claim.run_id)
    if dataset is None or report is None:
        return
    config = RunConfig.model_validate(run.config)
    facts: dict[str, Any] = {
        "metric": dataset.metric,
        "max_new_tokens": dataset.max_new_tokens,
        "split": config.split.model_dump(),
        "unit": dataset.unit,
        "eval_batch_size": report.batch_size,
    }
    # A batch smaller than the setting: more did not fit into memory, whatever did before.
    anew = {"eval_batch_size"} if report.batch_size < config.evaluate.batch_size else set()
    with transaction(engine) as session:
        track = session.get_one(Track, states.held_run(session, claim).track)
        new = {name: value for name, value in facts.items() if value and (name in anew or getattr(track, name) is None)}
        for name, value in new.items():
            setattr(track, name, value)
        if new:
            session.add(track)
            record_event(session, "track_fixed", now, track=track.name, run_id=run.id, **new)


def conclude(engine: Engine, settings: Settings, claim: states.Claim, run: Run, now: int) -> bool:
    """
    Apply the run's published verdict and end the run; return `False` if the run has to go on instead.

    A win is promoted, or gets the outcome `awaiting_approval` if approval is manual or its model was rolled back from.
    Drops may be put on trial, cleared or suspended; of a control, its trial may be promoted. The run's checkpoints are
    deleted in any case. If the compared champion still serves, a return to a former one may follow (`_go_back`).

    The run goes on, with no row changed, if a person cancelled it or withdrew one of its drops, or if the candidate,
    winner or loser, was compared with a champion that no longer serves: then its evaluation is unpublished. Raises
    `LostClaim` if the claim is not valid any more, `DropforgeError` if verdict or winner's model is missing or damaged.
    """
    try:
        outcome, words, stays = _apply(engine, settings, claim, run, now)
    except states.Cancelled:
        return False  # its next action ends it
    except promotion.ChampionMoved:
        log.info("champion_moved", run=claim.run_id)
        invalidate(settings.work_folder, claim.run_id, "evaluate")
        return False
    # Not before: a run that goes on, after a crash or `Cancelled`, may train once more.
    shutil.rmtree(run_files.run_folder(settings.work_folder, claim.run_id) / "checkpoints", ignore_errors=True)
    log.info("run_finished", run=claim.run_id, outcome=outcome, sentence=words)
    if stays:
        _go_back(engine, settings, run.track, now)
    return True


def _apply(engine: Engine, settings: Settings, claim: states.Claim, run: Run, now: int) -> tuple[str, str, bool]:
    """
    Apply the verdict and end the run; return outcome, sentence for the user, whether the compared champion serves.

    Raises `Cancelled` or `ChampionMoved`, with no row changed, if the run has to go on; else as `conclude`.
    """
    root = settings.work_folder
    verdict = run_files.load_verdict(root, claim.run_id)
    if verdict is None:  # pragma: no cover - `next_step` has just seen it
        raise StepFailed(f"run {claim.run_id} has no verdict")
    wins, settled = verdict.outcome == "promoted", _settled(root, run, verdict)
    if wins and not _is_manual(settings, run):
        showing_life(verify_manifest, root / promotion.model_of(verdict).path)
    # Not compared: a run that ended before the evaluation, for lack of data. `stale_steps` repeats it if its data was
    # prepared for another champion and nothing was trained on it.
    compared = None if verdict.outcome == "contaminated" else run_files.load_evaluation(root, claim.run_id)
    # In one transaction: no champion changes between the look at it, the end of the run and what follows from that.
    with transaction(engine) as session:

        def serve(trial: Run) -> None:
            if settled is not None:
                outcome = "promoted" if _promote(session, settings, trial, settled, now) else AWAITING
                run_queue.settle(session, trial, outcome, settled, now)

        waits = wins and not _promote(session, settings, run, verdict, now)
        outcome = AWAITING if waits else verdict.outcome
        held = run_queue.finish(session, claim, outcome, verdict, now)
        if waits or (not wins and compared):
            require_generation(session, held.track, verdict.champion_generation)
        suspects.follow_verdict(session, settings, held, verdict, now, serve=serve)
        leave_one_out.follow_verdict(session, held, verdict, now)
        if compared is not None and compared.watch:
            note_watch(session, held, compared, now)
        against = blocker(held, champions_of(session, held.track)) if waits else None
        if wins or settled is not None:
            promotion.sync_link(session, root, held.track)
        stays = promotion.champion(session, held.track).generation == verdict.champion_generation
        return outcome, sentence(verdict_clauses(held, against)), stays


def _settled(root: WorkFolder, control: Run, verdict: Verdict) -> Verdict | None:
    """
    Return the trial's verdict as "promoted" and settled by `control`, if `verdict`, of the control, lets the trial win.

    `None` also if the run is no control or wins itself, or if the trial's model is missing or damaged, which is logged.
    """
    settlement = verdict.settlement
    if control.control_of is None or settlement is None or not settlement.passed or verdict.outcome == "promoted":
        return None
    trial = run_files.load_verdict(root, control.control_of)
    if trial is None:
        return None
    try:
        showing_life(verify_manifest, root / promotion.model_of(trial).path)
    except DropforgeError as error:  # what the control says of the drop counts all the same
        log.warning("trial_not_served", run=control.control_of, error=error.message, hint=error.hint)
        return None
    return trial.model_copy(update={"outcome": "promoted", "settled_by": control.id})


def _promote(session: Session, settings: Settings, run: Run, verdict: Verdict, now: int) -> bool:
    """
    Add a winner's promotion (`add_promotion`, and raises as that does); the caller syncs the link.

    Return `False`, with nothing changed, if it needs approval or the model is blocked.
    """
    if _is_manual(settings, run):
        return False
    try:
        promotion.add_promotion(session, settings.work_folder, run.id or 0, verdict, Word("", now))
    except promotion.Blocked:
        return False  # a person may take it all the same
    return True


def _is_manual(settings: Settings, run: Run) -> bool:
    """Return whether a win needs approval: `gate.approval` is "manual" in the run's settings or in today's."""
    # The track may have been taken out of the settings during its run.
    today = settings.track(run.track) if run.track in settings.track_names else settings
    return "manual" in {RunConfig.model_validate(run.config).gate.approval, today.gate.approval}


def _go_back(engine: Engine, settings: Settings, track: str, now: int) -> None:
    """Roll back to a former champion if the watch proposes that and `gate.return` is "auto"; log a `DropforgeError`."""
    if track not in settings.track_names or settings.track(track).gate.going_back != "auto":
        return
    with transaction(engine) as session:
        watch, over = read_watch(session, track), promotion.champion(session, track).generation
    if watch and watch.reached == WATCH_RETURN:
        root, word = settings.work_folder, Word(watch.words, now)
        try:  # its files are verified, and not loaded
            showing_life(decisions.rollback, engine, root, track, word, to=watch.former, over=over)
        except DropforgeError as error:
            log.warning("not_returned", track=track, error=error.message, hint=error.hint)
