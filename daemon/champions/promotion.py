"""
Each track's champion: which model serves, and the only functions that replace it.

The row is authoritative; the links `tracks/<track>/champion` and `previous` in the work folder follow it. They are
renamed while the transaction that writes the row holds the database's write lock, and before it commits: whoever sees
the row finds the links. A crash or an error before the commit can leave a changed link, which `mend_links` puts back. A
model that was rolled back from is blocked: no run promotes it again, only a person does (`decisions`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

from sqlalchemy import Engine
from sqlmodel import Session, col, select

from daemon.champions.history import blocked, no_champion
from daemon.queue.states import require_not_cancelled
from daemon.state.clauses import forcing
from daemon.state.database import open_reader, rows_of, transaction, waits
from daemon.state.events import Word, record_event
from daemon.state.questions import CHAMPIONS
from daemon.state.states import OVERTAKEN, HookState, PromotionKind
from daemon.state.tables import Promotion, Run, Track
from daemon.system.folders import WorkFolder
from pipeline.artifacts import ModelRef, Verdict
from pipeline.decide.explain import brief
from pipeline.durable import fsync_folder
from pipeline.errors import DropforgeError, StepFailed
from pipeline.models.manifest import model_id, verify_manifest

#: Lets the model in a folder answer; raises `DropforgeError` if it does not.
TryOut = Callable[[Path], object]
#: `Event.kind` of a change, by its kind.
_EVENTS: dict[str, str] = {
    PromotionKind.PROMOTION: "promoted",
    PromotionKind.FORCED: "forced",
    PromotionKind.ROLLBACK: "rolled_back",
}


class ChampionMoved(DropforgeError):
    """The champion is not the one that the candidate was compared with, or that the caller expected."""


class Blocked(DropforgeError):
    """The model was rolled back from: no run promotes it, only a person can make it the champion again."""


def champion(session: Session, track: str) -> ModelRef:
    """Return the track's champion. Raises `DropforgeError` if it has none yet, not even its base model."""
    row = session.get(Track, track)
    if row is None or row.champion_generation is None:
        raise no_champion(track)
    return ModelRef.model_validate(
        {"model_id": row.champion_model_id, "path": row.champion_path, "generation": row.champion_generation}
    )


def champions_of(session: Session, track: str) -> list[Promotion]:
    """Return the rows of all champions that the track has had, the base model first and today's last."""
    return list(rows_of(session, Promotion, CHAMPIONS, track=track))


def require_generation(session: Session, track: str, expected: int | None) -> None:
    """Raise `ChampionMoved` unless the track's champion has generation `expected`; `None` always raises."""
    if champion(session, track).generation != expected:
        message = f"the champion of track {track} is not generation {expected} any more"
        raise ChampionMoved(message, f"look at it: dropforge history --track {track}")


def model_of(verdict: Verdict) -> ModelRef:
    """Return the model that a verdict promotes, as the next generation. Raises `StepFailed` if it names none."""
    identity, over = verdict.candidate_model_id, verdict.champion_generation
    if identity is None or over is None:
        raise StepFailed("the verdict names no model to promote")
    return ModelRef(model_id=identity, path=f"models/{identity}", generation=over + 1)


def promote(engine: Engine, work_folder: WorkFolder, run_id: int, verdict: Verdict, word: Word) -> Promotion:
    """Promote a win that waited for approval: row and links. Return the row. Raises what `add_promotion` raises."""
    with transaction(engine) as session:
        row = add_promotion(session, work_folder, run_id, verdict, word)
        sync_link(session, work_folder, row.track)
        return row


def add_promotion(session: Session, work_folder: WorkFolder, run_id: int, verdict: Verdict, word: Word) -> Promotion:
    """
    Make the model of a run that has won its track's champion and return the promotion's row; call `sync_link` last.

    `word` is the approval, if one was needed. This marks the track's hooks as pending and ends its other pending
    approvals. Raises, with nothing changed, `ChampionMoved` if the champion is not the one that the candidate was
    compared with, `Blocked` if the model was rolled back from, `Cancelled` if the run was cancelled, `DropforgeError`
    if the model's folder is missing.
    """
    model, run = model_of(verdict), session.get_one(Run, run_id)
    require_not_cancelled(run)
    if model.model_id in blocked(champions_of(session, run.track)):
        message = f"model {model.model_id[:12]} was rolled back from and is promoted by a person only"
        see = f"see why: dropforge history --track {run.track}"
        raise Blocked(message, f"{see}; to bring it back: {forcing(run_id)}")
    require_there(work_folder / model.path, f"the model of run {run_id}", run.track)
    change = change_to(model, PromotionKind.PROMOTION, run.track, run_id, word)
    change.verdict = brief(verdict)
    return change_champion(session, change)


def change_to(model: ModelRef, kind: PromotionKind, track: str, run_id: int | None, word: Word) -> Promotion:
    """Return a new row, in no session yet, of a change of the track's champion to `model`."""
    return Promotion(
        track=track,
        run_id=run_id,
        kind=kind,
        generation=model.generation,
        model_id=model.model_id,
        model_path=model.path,
        reason=word.reason,
        created_at=word.at,
        approved_by=word.by,
    )


def change_by_hand(engine: Engine, work_folder: WorkFolder, change: Promotion, what: str, try_out: TryOut) -> Promotion:
    """
    Make a manual change after hashing the model's files and calling `try_out` with its folder; return the row.

    `what` names the model in messages. The checks may take minutes, which are added to `change.created_at`. Raises
    `DropforgeError` if the files are missing or changed, what `try_out` raises, `ChampionMoved` if another change came
    first.
    """
    begun = monotonic()
    check_files(work_folder, change.model_path, change.model_id, what, change.track)
    try_out(work_folder / change.model_path)
    change.created_at += 1000 * int(monotonic() - begun)
    with transaction(engine) as session:
        # A collection holds the write lock while it moves models away: one that is here now, stays.
        require_there(work_folder / change.model_path, what, change.track)
        change_champion(session, change)
        sync_link(session, work_folder, change.track)
        return change


def check_files(work_folder: WorkFolder, path: str, identity: str, what: str, track: str) -> None:
    """
    Raise `DropforgeError` unless the model at `path` has the id `identity`, by the hashes of its files.

    `path` is relative to the work folder, or absolute for a base model. `what` names the model in messages.
    """
    folder = work_folder / path
    require_there(folder, what, track)
    try:
        # A base model is the user's own folder, without a manifest of ours.
        there = model_id(folder) if Path(path).is_absolute() else verify_manifest(folder)
    except DropforgeError as error:
        raise DropforgeError(f"{what} has changed: {error.message}", other_ways(track)) from error
    if there != identity:
        raise DropforgeError(f"{what} has changed: {folder} holds another model", other_ways(track))


def require_there(folder: Path, what: str, track: str) -> None:
    """Raise `DropforgeError` if the model's folder does not exist; `what` names the model in the message."""
    if not folder.is_dir():
        raise DropforgeError(f"{what} is not there any more: {folder}", other_ways(track))


def other_ways(track: str) -> str:
    """Return the hint, for an error message, for a model of `track` whose files are missing or changed."""
    return f"take another one: dropforge history --track {track}; or bring the folder back from a backup"


def change_champion(session: Session, change: Promotion) -> Promotion:
    """
    Make the model of `change` its track's champion and return `change`; call `sync_link` last in the transaction.

    The row's hooks are marked as pending (`health` only for a new model, none for generation 0), an event is recorded
    (of a base model by the caller), and no win of the track waits for approval any more. A change that is no win ends
    the watch. Raises `ChampionMoved` if today's champion is not of the generation before.
    """
    if change.generation:
        require_generation(session, change.track, change.generation - 1)
    track = session.get_one(Track, change.track)
    change.previous_model_id, change.previous_path = track.champion_model_id, track.champion_path
    if change.run_id is not None and change.kind != PromotionKind.ROLLBACK:
        # On the row, since a run that did not end well may be retried with fewer drops.
        change.drops = session.get_one(Run, change.run_id).snapshot
    change.hook_state = HookState.PENDING if change.generation else None
    # A former champion is known to work, and a way back from a way back would have no end.
    change.health_state = HookState.PENDING if change.kind in {PromotionKind.PROMOTION, PromotionKind.FORCED} else None
    track.champion_generation, track.champion_model_id = change.generation, change.model_id
    track.champion_path = change.model_path
    if change.kind != PromotionKind.PROMOTION:
        track.watch_former = track.watch_since = None
    session.add_all([change, track])
    if change.kind in _EVENTS:
        about = change.model_dump(include={"track", "run_id", "model_id", "generation", "reason"})
        record_event(session, _EVENTS[change.kind], change.created_at, **about, by=change.approved_by)
    end_waiting(session, change.track, change.run_id, change.created_at)
    return change


def end_waiting(session: Session, track: str, promoted: int | None, now: int) -> None:
    """
    Set the outcome of all pending wins of the track: `promoted` for run `promoted`, overtaken for all others.

    Each overtaken run gets its event at time `now`; the promotion's event is the caller's. The caller commits.
    """
    for run in session.exec(select(Run).where(Run.track == track, waits())).all():
        if run.id == promoted:
            run.outcome = "promoted"
        else:
            run.outcome = OVERTAKEN
            record_event(session, "run_overtaken", now, track=track, run_id=run.id)
        session.add(run)


def tracks_with_champion(engine: Engine) -> Sequence[str]:
    """Return the names of all tracks that have a champion, in no particular order."""
    with transaction(open_reader(engine.get_execution_options()["path"])) as session:
        return session.exec(select(Track.name).where(col(Track.champion_generation).is_not(None))).all()


def mend_links(engine: Engine, work_folder: WorkFolder, track: str) -> None:
    """Make the links of a track with a champion match its row, in a transaction if that is needed (`sync_link`)."""
    # A shared file system may hang: the write lock is taken only if there is something to do.
    with transaction(open_reader(engine.get_execution_options()["path"])) as session:
        links = _links(session, work_folder, session.get_one(Track, track))
    if not all(_is_set(link, target) for link, target in links.items()):
        with transaction(engine) as session:
            sync_link(session, work_folder, track)


def sync_link(session: Session, work_folder: WorkFolder, track: str) -> None:
    """Make a track's links match its row, each atomically and durably, in the caller's write transaction."""
    for link, target in _links(session, work_folder, session.get_one(Track, track)).items():
        if not _is_set(link, target):
            link.parent.mkdir(parents=True, exist_ok=True)
            aside = link.with_name(f".{link.name}.new")
            aside.unlink(missing_ok=True)
            aside.symlink_to(target)
            aside.rename(link)
            fsync_folder(link.parent)


def _links(session: Session, work_folder: WorkFolder, row: Track) -> dict[Path, Path]:
    """Return the targets of a track's links `champion` and `previous`, by the links' paths."""
    serving = select(Promotion).where(Promotion.track == row.name, Promotion.generation == row.champion_generation)
    promotion = session.exec(serving).one()
    path = row.champion_path or promotion.model_path
    previous = promotion.previous_path or path
    if promotion.previous_model_id == row.base_model_id and row.base_path is not None:
        previous = row.base_path
    folder = work_folder / "tracks" / row.name
    named = {"champion": Path(path), "previous": Path(previous)}
    return {folder / name: path if path.is_absolute() else Path("..", "..", path) for name, path in named.items()}


def _is_set(link: Path, target: Path) -> bool:
    """Return whether `link` leads to `target`, and no change of it was cut off."""
    return link.is_symlink() and link.readlink() == target and not link.with_name(f".{link.name}.new").is_symlink()
