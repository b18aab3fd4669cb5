"""
Manual decisions: approve a pending win, or make a run's model the champion whatever its verdict.

A win that waits is `awaiting_approval` as long as the champion that it was compared with serves; then it is too late.
"""

import getpass
import os
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import Engine

from daemon.champions import promotion
from daemon.champions.history import blocked, forcing
from daemon.champions.promotion import Candidate, TryOut, champion, change_by_hand, check_files
from daemon.champions.review.blind_review import require_reviewed
from daemon.queue.states import known_run
from daemon.state import run_files
from daemon.state.database import transaction
from daemon.state.events import Word
from daemon.state.states import AWAITING, OVERTAKEN, PromotionKind, state_words
from daemon.state.tables import Promotion, Run
from pipeline.errors import DropforgeError


def approve(engine: Engine, state_folder: Path, run_id: int, word: Word) -> Promotion:
    """
    Promote the win of a run that waits for approval, and return the row that says so; the reason may be empty.

    Raises `DropforgeError` if it did not win, another champion came first, its blind review is not complete or its
    files have changed; `ChampionMoved`, `Blocked` if it was rolled back from, `Cancelled`.
    """
    with transaction(engine) as session:
        run = known_run(session, run_id)
        past = promotion.champions_of(session, run.track)
    _require_waiting(state_folder, run, past)
    with transaction(engine) as session:
        require_reviewed(session, state_folder, run)
    try:
        verdict = run_files.load_verdict(state_folder, run_id)
    except run_files.ArtifactDamaged as error:
        raise DropforgeError(error.message, f"{error.hint}, or: {forcing(run_id)}") from error
    if verdict is None or verdict.candidate_model_id is None or verdict.champion_generation is None:
        message = f"the verdict of run {run_id} is not there any more"
        raise DropforgeError(message, f"bring runs/{run_id}/decide.json back from a backup, or: {forcing(run_id)}")
    path = f"models/{verdict.candidate_model_id}"
    check_files(state_folder, path, verdict.candidate_model_id, f"the model of run {run_id}", run.track)
    over, reason = verdict.champion_generation, "; ".join(filter(None, (verdict.sentence, word.reason)))
    candidate = Candidate(run.track, run_id, verdict.candidate_model_id, path, over, reason, approved_by=word.by)
    return promotion.promote(engine, state_folder, candidate, word.at)


def force(
    engine: Engine, state_folder: Path, run_id: int, word: Word, *, try_out: TryOut = lambda _folder: None
) -> Promotion:
    """
    Make the model of an ended run the champion whatever its verdict, and return the row that says so.

    Its files are compared with their hashes and `try_out` lets it answer before anything moves. The model is no longer
    blocked; suspended drops stay suspended. Raises `DropforgeError`, or `ChampionMoved` if another change came first.
    """
    with transaction(engine) as session:
        run = known_run(session, run_id)
        serving = champion(session, run.track)
    identity = _model_of(state_folder, run)
    if identity == serving.model_id:
        message = f"the model of run {run_id} is the champion of track {run.track} already"
        raise DropforgeError(message, f"look at it: dropforge champion --track {run.track}")
    change = Promotion(
        track=run.track,
        run_id=run_id,
        kind=PromotionKind.FORCED,
        generation=serving.generation + 1,
        model_id=identity,
        model_path=f"models/{identity}",
        reason=word.reason,
        created_at=word.at,
        approved_by=word.by,
        overrode=run.outcome or run.state,
    )
    return change_by_hand(engine, state_folder, change, f"the model of run {run_id}", try_out)


def who() -> str:
    """Return the name of the person at the command line, and behind which other one if sudo says so."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = f"user {os.getuid()}"
    behind = os.environ.get("SUDO_USER", "")
    return f"{name}, by sudo of {behind}" if behind and behind != name else name


def _blocked_by(past: Sequence[Promotion], run_id: int) -> Promotion | None:
    """Return the roll-back by which the model of a run lost its place and is blocked since, if there was one."""
    made = {row.model_id for row in past if row.run_id == run_id} & blocked(past)
    back = [row for row in past if row.kind == PromotionKind.ROLLBACK and row.previous_model_id in made]
    return back[-1] if back else None


def _require_waiting(state_folder: Path, run: Run, past: Sequence[Promotion]) -> None:
    """Raise `DropforgeError` for a run whose win does not wait; name `--force` only where it would do something."""
    if run.outcome == AWAITING:
        return
    back = _blocked_by(past, run.id or 0)
    serves = bool(past) and past[-1].model_id in {row.model_id for row in past if row.run_id == run.id}
    if run.ended_at is None:
        message = f"run {run.id} {state_words(run.state)} and has no verdict yet"
        raise DropforgeError(message, f"see how far it is: dropforge show {run.id}")
    if back is not None:
        how = "promoted" if run.outcome == "promoted" else "forced"
        by = f", by {back.approved_by}" if back.approved_by else ""
        message = f"run {run.id} was {how}, then {back.reason}{by}; its model is blocked since"
        hint = f"see what serves: dropforge history --track {run.track}"
    elif run.outcome == OVERTAKEN:
        message = f"run {run.id} won, but against a champion that another one has taken the place of"
        hint = "a run on new data is compared with today's champion"
    elif run.outcome == "promoted":
        message, hint = f"run {run.id} was promoted", f"see what serves: dropforge history --track {run.track}"
    elif run.outcome is None:
        why = f": {run.error}" if run.error else ""
        message, hint = f"run {run.id} {state_words(run.state)}{why}", f"look at it: dropforge show {run.id}"
    else:
        message, hint = f"run {run.id} did not win: {run.outcome}", f"see why: dropforge show {run.id}"
    if not serves and (run_files.run_folder(state_folder, run.id or 0) / "merge.json").exists():
        hint = f"{hint}; to make its model the champion all the same: {forcing(run.id or 0)}"
    raise DropforgeError(message, hint)


def _model_of(state_folder: Path, run: Run) -> str:
    """Return the id of the model that an ended run published."""
    if run.ended_at is None:
        message = f"run {run.id} {state_words(run.state)} and may still change its model"
        raise DropforgeError(message, f"wait for it, or end it: dropforge cancel {run.id}")
    model = run_files.load_model(state_folder, run.id or 0)
    if model is not None:
        return model.model_id
    gone = (run_files.run_folder(state_folder, run.id or 0) / "merge.removed.json").exists()
    message = f"run {run.id} " + ("has no model any more: it was collected" if gone else "published no model")
    kept = "gc.keep_models and gc.keep_days in dropforge.toml say how long models are kept"
    raise DropforgeError(message, kept if gone else f"see how it ended: dropforge show {run.id}")
