"""
Manual decisions: approve a pending win, force a run's model whatever its verdict, roll back to a former champion.

A pending win is `awaiting_approval` as long as the champion that it was compared with serves; after that it cannot be
approved any more.
"""

from collections.abc import Sequence

from sqlalchemy import Engine

from daemon.champions import promotion
from daemon.champions.blind_review import require_reviewed
from daemon.champions.history import blocked, unhealthy_models
from daemon.champions.promotion import TryOut, change_by_hand, change_to, check_files
from daemon.queue.states import known_run
from daemon.state import run_files
from daemon.state.clauses import forcing
from daemon.state.database import transaction
from daemon.state.events import Word
from daemon.state.states import AWAITING, PromotionKind, state_words
from daemon.state.tables import Promotion, Run, Track
from daemon.system.folders import WorkFolder
from pipeline.artifacts import ModelRef, Verdict
from pipeline.errors import DropforgeError


def approve(engine: Engine, work_folder: WorkFolder, run_id: int, word: Word) -> Promotion:
    """
    Promote the model of a run whose win waits for approval, and return the promotion's row; the reason may be empty.

    Before the change all files of the model are compared with their hashes. It ends the track's other pending approvals
    and marks its hooks as pending. Raises `DropforgeError` if no win of the run waits for approval (any more), its
    verdict is damaged, its blind review is not complete or the model's files have changed; `Blocked` if the model was
    rolled back from; `ChampionMoved` or `Cancelled` if the champion changed or the run was cancelled meanwhile.
    """
    with transaction(engine) as session:
        run = known_run(session, run_id)
        if run.outcome != AWAITING:
            ended = f"ended as {run.outcome}" if run.outcome else state_words(run.state)
            message = f"run {run_id} {ended}: no win of it waits for approval"
            hint = f"see why: dropforge show {run_id}; to promote an ended run's model whatever the verdict: "
            raise DropforgeError(message, hint + forcing(run_id))
        require_reviewed(session, work_folder, run)
    try:
        verdict = Verdict.model_validate(run.verdict)
    except ValueError as error:
        raise DropforgeError(f"the verdict of run {run_id} cannot be read", forcing(run_id)) from error
    model = promotion.model_of(verdict)
    check_files(work_folder, model.path, model.model_id, f"the model of run {run_id}", run.track)
    return promotion.promote(engine, work_folder, run_id, verdict, word)


def force(
    engine: Engine, work_folder: WorkFolder, run_id: int, word: Word, *, try_out: TryOut = lambda _folder: None
) -> Promotion:
    """
    Make the model of an ended run the champion whatever its verdict, and return the promotion's row.

    Before the change the model's files are compared with their hashes, and `try_out` is called with its folder. The
    model is no longer blocked; suspended drops stay suspended. The track's pending approvals end. Raises
    `DropforgeError` if the run is unknown, has not ended or has no model (any more), its model serves already or its
    files have changed; what `try_out` raises; `ChampionMoved` if another change came first.
    """
    with transaction(engine) as session:
        run = known_run(session, run_id)
        serving = promotion.champion(session, run.track)
    identity = _model_of(work_folder, run)
    if identity == serving.model_id:
        message = f"the model of run {run_id} is the champion of track {run.track} already"
        raise DropforgeError(message, f"look at it: dropforge champion --track {run.track}")
    model = ModelRef(model_id=identity, path=f"models/{identity}", generation=serving.generation + 1)
    change = change_to(model, PromotionKind.FORCED, run.track, run_id, word)
    change.overrode = run.outcome or run.state
    return change_by_hand(engine, work_folder, change, f"the model of run {run_id}", try_out)


def rollback(  # noqa: PLR0913 - the last three go by name
    engine: Engine,
    work_folder: WorkFolder,
    track: str,
    word: Word,
    *,
    to: int | None = None,
    over: int | None = None,
    try_out: TryOut = lambda _folder: None,
) -> Promotion:
    """
    Make the former champion of generation `to` the champion again, as the next generation; return the promotion's row.

    Without `to` it is the latest other model, refused if that is blocked, unhealthy or gone. `over` is the generation
    that must serve until then, `None` if any may. Before the change every file of its model is compared with its hash,
    and `try_out` is called with its folder. The model that is replaced is blocked: no run promotes it again, only a
    person does. The track's pending approvals end. Raises `DropforgeError` if there is no such champion, it serves
    already or its files have changed; what `try_out` raises; `ChampionMoved` if another change came first.
    """
    with transaction(engine) as session:
        serving = promotion.champion(session, track)
        if over is not None:
            promotion.require_generation(session, track, over)
        row, past = session.get_one(Track, track), promotion.champions_of(session, track)
    for former in past:
        if former.model_id == row.base_model_id and row.base_path is not None:
            former.model_path = row.base_path
    target = _target(past, serving, to, work_folder)
    model = ModelRef(model_id=target.model_id, path=target.model_path, generation=serving.generation + 1)
    change = change_to(model, PromotionKind.ROLLBACK, track, target.run_id, word)
    change.drops, change.restored = target.drops, target.generation
    return change_by_hand(engine, work_folder, change, f"the model of generation {target.generation}", try_out)


def _model_of(work_folder: WorkFolder, run: Run) -> str:
    """Return the id of the model that a run published. Raises `DropforgeError` if it has none or has not ended."""
    if run.ended_at is None:
        message = f"run {run.id} {state_words(run.state)} and may still change its model"
        raise DropforgeError(message, f"wait for it, or end it: dropforge cancel {run.id}")
    model = run_files.load_model(work_folder, run.id or 0)
    if model is not None:
        return model.model_id
    gone = (run_files.run_folder(work_folder, run.id or 0) / "merge.removed.json").exists()
    message = f"run {run.id} " + ("has no model any more: it was collected" if gone else "published no model")
    kept = "gc.keep_models in dropforge.toml says how many models are kept"
    raise DropforgeError(message, kept if gone else f"see how it ended: dropforge show {run.id}")


def _target(past: Sequence[Promotion], serving: ModelRef, to: int | None, work_folder: WorkFolder) -> Promotion:
    """
    Return the former champion of generation `to`; without `to`, the latest one that is not today's model.

    Raises `DropforgeError` if there is none, if it serves already, or without `to` if it is refused (`_against`).
    """
    track = past[0].track
    hint = f"see the generations: dropforge history --track {track}"
    if to is not None:
        target = next((row for row in past if row.generation == to), None)
        if target is None:
            raise DropforgeError(f"track {track} has had no champion of generation {to}", hint)
        if target.model_id == serving.model_id:
            raise DropforgeError(f"the model of generation {to} is the champion of track {track} already", hint)
        return target
    # A run can make the very model that serves, and promote it again.
    others = [row for row in past if row.model_id != serving.model_id]
    if not others:
        raise DropforgeError(f"track {track} has had no other champion than today's", hint)
    former = others[-1]
    against = _against(former, past, work_folder)
    if against:
        message = f"no rollback without --to: the model of generation {former.generation} {against}"
        name = f"name one: dropforge rollback --track {track} --to GENERATION --reason TEXT"
        raise DropforgeError(message, f"{hint}, and {name}")
    return former


def _against(row: Promotion, past: Sequence[Promotion], work_folder: WorkFolder) -> str:
    """Return why a rollback without `--to` refuses a former champion; an empty string if it does not."""
    if not (work_folder / row.model_path).is_dir():
        return "is not there any more"
    if row.model_id in blocked(past):
        return "was rolled back from"
    return "failed its health command" if row.model_id in unhealthy_models(past) else ""
