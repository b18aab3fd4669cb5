"""
Apply a verdict: promote the candidate or let it wait for approval, put drops on trial, end the run.

Each part is idempotent: repeated after a crash it has the same result.
"""

import shutil
from typing import Any

from sqlalchemy import Engine

from daemon.champions import promotion
from daemon.champions.history import blocker, true_sentence
from daemon.champions.promotion import champions_of, require_generation
from daemon.queue import leave_one_out, run_queue, states, suspects
from daemon.settings.model import Settings
from daemon.state import run_files
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.states import AWAITING
from daemon.state.tables import Run, Track
from daemon.system.folders import WorkFolder
from daemon.system.sd_notify import showing_life
from pipeline.artifacts import Verdict
from pipeline.config import RunConfig
from pipeline.errors import StepFailed
from pipeline.models.manifest import verify_manifest


def fix_measures(engine: Engine, work_folder: WorkFolder, claim: states.Claim, run: Run, now: int) -> None:
    """
    Store on the run's track metric, answer length, split, its unit and batch size of its evaluation, where it has none.

    Later runs use them (`step_specs.compose`). A batch size below the run's setting replaces that of the track. Does
    nothing if data set or evaluation are not published. Raises `LostClaim`, or `ArtifactDamaged` if they cannot be
    parsed.
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


def conclude(engine: Engine, settings: Settings, claim: states.Claim, run: Run, now: int) -> tuple[str, str]:
    """
    Apply the run's published verdict and end the run; return its outcome and the sentence for the user.

    A win is promoted, or gets the outcome `awaiting_approval` if approval is manual, its model was rolled back from, or
    its new drops replace more than a tenth of the older held-out answers.
    Drops may be put on trial, cleared or suspended; the run's checkpoints are deleted. Raises `ChampionMoved` if the
    candidate, winner or loser, was compared with a champion that no longer serves, `LostClaim` if the claim is not
    valid any more, `Cancelled` if a person cancelled the run or withdrew one of its drops, `DropforgeError` if the
    candidate cannot be promoted.
    """
    root = settings.work_folder
    folder = run_files.run_folder(root, claim.run_id)
    verdict = run_files.load_verdict(root, claim.run_id)
    if verdict is None:  # pragma: no cover - `next_step` has just seen it
        raise StepFailed(f"run {claim.run_id} has no verdict")
    wins = verdict.outcome == "promoted"
    moved = verdict.heldout_replaced if wins else ""
    waits = wins and bool(moved or _is_manual(settings, run)) and not promotion.has_promoted(engine, claim.run_id)
    if wins and not waits:
        candidate = _candidate(claim, run.track, verdict)
        showing_life(verify_manifest, root / candidate.path)
        try:
            promotion.promote(engine, root, candidate, now)
        except promotion.Blocked:
            waits = True  # for a person who takes it all the same
    # Not compared: a run that ended before the evaluation, for lack of data. `stale_steps` repeats it if its data was
    # prepared for another champion and nothing was trained on it.
    compared = verdict.outcome != "contaminated" and "evaluate" in run_files.published(root, claim.run_id)
    bound = waits or (not wins and compared)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    outcome, sentence = AWAITING if waits else verdict.outcome, "; ".join(filter(None, (verdict.sentence, moved)))
    ending = run_queue.Ending(outcome, sentence, _heldout_version(settings, verdict, claim), verdict.gain)
    # In one transaction: no champion changes between the look at it, the end of the run and what follows from that.
    with transaction(engine) as session:
        held = run_queue.finish(session, claim, ending, now)
        if bound:
            require_generation(session, held.track, verdict.champion_generation)
        suspects.follow_verdict(session, settings, held, verdict, now)
        leave_one_out.follow_verdict(session, held, verdict, now)
        against = blocker(folder, champions_of(session, held.track)) if waits else None
    return outcome, true_sentence(claim.run_id, outcome, sentence, against)


def _candidate(claim: states.Claim, track: str, verdict: Verdict) -> promotion.Candidate:
    """Return the candidate that a winning verdict promotes. Raises `StepFailed` if the verdict names none."""
    identity, over = verdict.candidate_model_id, verdict.champion_generation
    if identity is None or over is None:
        raise StepFailed("the verdict names no model to promote")
    path = f"models/{identity}"
    return promotion.Candidate(track, claim.run_id, identity, path, over, verdict.sentence, claim.token)


def _is_manual(settings: Settings, run: Run) -> bool:
    """Return whether a win needs approval: `gate.approval` is "manual" in the run's settings or in today's."""
    # The track may have been taken out of the settings during its run.
    today = settings.track(run.track) if run.track in settings.track_names else settings
    return "manual" in {RunConfig.model_validate(run.config).gate.approval, today.gate.approval}


def _heldout_version(settings: Settings, verdict: Verdict, claim: states.Claim) -> str | None:
    """Return the version of the held-out set that the candidate was judged on; `None` if there was no candidate."""
    if verdict.candidate_model_id is None:
        return None
    dataset = run_files.load_dataset(settings.work_folder, claim.run_id)
    return verdict.heldout_version or (dataset.heldout_version if dataset else None)
