"""
How a champion changes: journalled, moved by compare-and-set, with links that follow.

The row is the truth, the links `tracks/<track>/champion` and `previous` are its picture in the state folder. A change
is an intent row, then the links, then the done row; `recover` finishes or abandons what a crash left between. Which
change there may be is for `promotion`, `rollback` and `approval` to say.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, update
from sqlmodel import Session, col, select

from daemon.queue.claims import Cancelled, is_cancelled
from daemon.state.database import newest_revision, open_engine, transaction
from daemon.state.database_file import revision
from daemon.state.events import record_event
from daemon.state.layout import DATABASE_NAME
from daemon.state.states import OVERTAKEN, HookState, PromotionKind, PromotionState
from daemon.state.tables import Promotion, Run, Track, waits
from pipeline.artifacts import ModelRef
from pipeline.durable import fsync_folder
from pipeline.errors import DropforgeError, is_disk_full

#: The events of a change that is intended and of one that is done.
_EVENTS = {
    PromotionKind.PROMOTION: ("promotion_intended", "promoted"),
    PromotionKind.FORCED: ("force_intended", "forced"),
    PromotionKind.ROLLBACK: ("rollback_intended", "rolled_back"),
}


class ChampionMoved(DropforgeError):
    """Another change came first: the candidate was not compared with today's champion."""


class NoChampion(DropforgeError):
    """The track has no champion, not even its base model."""

    def __init__(self, track: str) -> None:
        """Say so of `track`."""
        hint = "set base_model in dropforge.toml and start the daemon: dropforge run"
        super().__init__(f"track {track} has no champion yet", hint)


def champion(session: Session, track: str) -> ModelRef:
    """Return the track's champion. Raises `NoChampion` before its base model is known."""
    row = session.get(Track, track)
    if row is None or row.champion_generation is None:
        raise NoChampion(track)
    return ModelRef.model_validate(
        {"model_id": row.champion_model_id, "path": row.champion_path, "generation": row.champion_generation}
    )


def history(session: Session, track: str) -> list[Promotion]:
    """Return the track's champions, the base model first and today's last."""
    done = select(Promotion).where(Promotion.track == track, Promotion.state == PromotionState.DONE)
    return list(session.exec(done.order_by(col(Promotion.generation))).all())


def require_generation(session: Session, track: str, expected: int | None) -> None:
    """Raise `ChampionMoved` if the track's champion is of another generation, or it is not known which was meant."""
    if champion(session, track).generation != expected:
        raise _moved(track, expected)


@contextmanager
def alone(state_folder: Path, track: str) -> Iterator[None]:
    """Let one process or thread at a time change a track's champion: a person's rollback may meet the daemon."""
    folder = state_folder / "tracks" / track
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def intend(session: Session, intent: Promotion, now: int) -> Promotion:
    """
    Journal what is about to happen; the same intent, left half-done before, is taken up again.

    The caller is `alone` with the track. Raises `ChampionMoved` if today's champion is not of the generation before.
    """
    require_generation(session, intent.track, intent.generation - 1)
    now_champion = champion(session, intent.track)
    pending = select(Promotion).where(Promotion.track == intent.track, Promotion.state == PromotionState.INTENT)
    for old in session.exec(pending).all():
        if all(getattr(old, name) == getattr(intent, name) for name in ("run_id", "kind", "model_id", "generation")):
            return old
        _abandon(session, old, now)
    intent.previous_model_id, intent.previous_path = now_champion.model_id, now_champion.path
    if intent.run_id is not None:
        # On the row, since a run that did not end well may be retried with fewer drops.
        intent.drops = [int(str(drop["id"])) for drop in session.get_one(Run, intent.run_id).snapshot or ()]
    session.add(intent)
    session.flush()
    kind, _ = _EVENTS[PromotionKind(intent.kind)]
    record_event(session, kind, now, track=intent.track, run_id=intent.run_id, model_id=intent.model_id)
    return intent


def carry_out(engine: Engine, state_folder: Path, intent: Promotion, now: int) -> Promotion:
    """
    Point the links to an intent's model and, in one transaction, make its row and the track's say the same.

    With the row come the commands that the daemon has to run, and the end of waiting for all that waited for approval.
    Raises `ChampionMoved` if another change came first, `Cancelled` if the run was cancelled meanwhile.
    """
    _point(state_folder, intent.track, "champion", intent.model_path)
    _point(state_folder, intent.track, "previous", intent.previous_path or intent.model_path)
    with transaction(engine) as session:
        row = session.get_one(Promotion, intent.id)
        compared = (col(Track.name) == row.track, col(Track.champion_generation) == row.generation - 1)
        values = {
            "champion_generation": row.generation,
            "champion_model_id": row.model_id,
            "champion_path": row.model_path,
        }
        cancelled = _cancelled_run(session, row)
        won = cancelled is None and session.exec(update(Track).where(*compared).values(**values)).rowcount == 1
        if won:
            row.state, row.done_at, row.hook_state = PromotionState.DONE, now, HookState.PENDING
            # A former champion is known to work, and a way back from a way back would have no end.
            row.health_state = None if row.kind == PromotionKind.ROLLBACK else HookState.PENDING
            session.add(row)
            _, kind = _EVENTS[PromotionKind(row.kind)]
            record_event(
                session,
                kind,
                now,
                track=row.track,
                run_id=row.run_id,
                model_id=row.model_id,
                generation=row.generation,
                reason=row.reason,
                by=row.approved_by,
            )
            end_waiting(session, row.track, row.run_id, now)
        else:
            _abandon(session, row, now)
    if not won:
        follow(engine, state_folder, intent.track)
        raise _moved(intent.track, intent.generation - 1) if cancelled is None else Cancelled(cancelled)
    return row


def _cancelled_run(session: Session, intent: Promotion) -> Run | None:
    """Return the run whose verdict an intent rests on if that was cancelled meanwhile; a forced one rests on none."""
    run = session.get_one(Run, intent.run_id) if intent.kind == PromotionKind.PROMOTION else None
    return run if run is not None and is_cancelled(run) else None


def end_waiting(session: Session, track: str, promoted: int | None, now: int) -> None:
    """Let no run of the track wait for approval any more: `promoted` has it, the others were overtaken."""
    for run in session.exec(select(Run).where(Run.track == track, waits())).all():
        if run.id == promoted:
            run.outcome = "promoted"
        else:
            run.outcome = OVERTAKEN
            record_event(session, "run_overtaken", now, track=track, run_id=run.id)
        session.add(run)


def recover(engine: Engine, state_folder: Path, now: int) -> dict[str, OSError | None]:
    """
    Finish or abandon every change that a dead process left half-done, then make all links equal to the rows.

    An intent is finished if the champion that it was compared with still stands, its run was not cancelled and its
    model is there. Each track is seen to by itself: returned is, by track, what its files said against it, if they did.
    Raises `OSError` if the disk is full.
    """
    with transaction(engine) as session:
        pending = select(Promotion).where(Promotion.state == PromotionState.INTENT).order_by(col(Promotion.id))
        intents = session.exec(pending).all()
        names = session.exec(select(Track.name).where(col(Track.champion_generation).is_not(None))).all()
    found: dict[str, OSError | None] = {}
    for name in dict.fromkeys([*(intent.track for intent in intents), *names]):
        try:
            with alone(state_folder, name):
                for intent in intents:
                    if intent.track == name:
                        _take_up(engine, state_folder, intent, now)
                if name in names:
                    follow(engine, state_folder, name)
        except OSError as error:
            if is_disk_full(error):
                raise
            found[name] = error
        else:
            found[name] = None
    return found


def _take_up(engine: Engine, state_folder: Path, intent: Promotion, now: int) -> None:
    """Finish an intent of a dead process if it can still be, or abandon it."""
    with transaction(engine) as session:
        row = session.get_one(Promotion, intent.id)
        if row.state != PromotionState.INTENT:
            return
        track = session.get_one(Track, intent.track)
        current = track.champion_generation == intent.generation - 1
        stands = current and _cancelled_run(session, row) is None
        usable = stands and (state_folder / intent.model_path).is_dir()
        if not usable:
            _abandon(session, row, now)
    if usable:
        carry_out(engine, state_folder, intent, now)


def _abandon(session: Session, intent: Promotion, now: int) -> None:
    intent.state = PromotionState.ABANDONED
    session.add(intent)
    record_event(
        session, "promotion_abandoned", now, track=intent.track, run_id=intent.run_id, model_id=intent.model_id
    )


def _moved(track: str, expected: int | None) -> ChampionMoved:
    message = f"the champion of track {track} is not generation {expected} any more"
    return ChampionMoved(message, f"look at it: dropforge history --track {track}")


def follow(engine: Engine, state_folder: Path, track: str) -> None:
    """Make the track's links equal to its row."""
    with transaction(engine) as session:
        row = session.get_one(Track, track)
        serving = select(Promotion).where(
            Promotion.track == track,
            Promotion.state == PromotionState.DONE,
            Promotion.generation == row.champion_generation,
        )
        promotion = session.exec(serving).one()
    path = row.champion_path or promotion.model_path
    previous = promotion.previous_path or path
    if promotion.previous_model_id == row.base_model_id and row.base_path is not None:
        previous = row.base_path
    _point(state_folder, track, "champion", path)
    _point(state_folder, track, "previous", previous)


def follow_all(state_folder: Path) -> None:
    """Make all links equal to the rows, if the database has this program's schema: else the daemon's start does."""
    path = state_folder / DATABASE_NAME
    if revision(path) != newest_revision():
        return
    engine = open_engine(path)
    with transaction(engine) as session:
        names = session.exec(select(Track.name).where(col(Track.champion_generation).is_not(None))).all()
    for name in names:
        with alone(state_folder, name):
            follow(engine, state_folder, name)


def _point(state_folder: Path, track: str, name: str, path: str) -> None:
    """Make the link `name` of a track lead to a model, at every moment to the old one or to the new one, durably."""
    folder = state_folder / "tracks" / track
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / name
    target = Path(path) if Path(path).is_absolute() else Path("..", "..", path)
    if link.is_symlink() and link.readlink() == target:
        return
    aside = folder / f".{name}.new"
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.rename(link)
    fsync_folder(folder)
