"""
Each track's champion: journalled, moved by compare-and-set, with a link that follows.

The row is the truth, the links `tracks/<track>/champion` and `previous` are its picture in the state folder. A
promotion or a rollback is an intent row, then the links, then the done row; `recover` finishes or abandons what a crash
left between. A model that was rolled back from is barred: no run promotes it again.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, update
from sqlmodel import Session, col, select

from daemon.claims import Claim, held_run, record_event
from daemon.database import transaction
from daemon.queue import ensure_track
from daemon.tables import Promotion, PromotionKind, PromotionState, Track
from pipeline.artifacts import ModelRef
from pipeline.durable import fsync_folder
from pipeline.errors import DropforgeError
from pipeline.manifest import model_id, verify_manifest


class ChampionMoved(DropforgeError):
    """Another promotion came first: the candidate was not compared with today's champion."""


class NoChampion(DropforgeError):
    """The track has no champion, not even its base model."""


class Barred(DropforgeError):
    """The model was rolled back from: only a person brings it back."""


class NoTarget(DropforgeError):
    """There is no such champion to roll back to, or its files are not what they were."""


@dataclass(frozen=True)
class Candidate:
    """The model that a run made, and where it lies: `path` is relative to the state folder."""

    track: str
    run_id: int
    model_id: str
    path: str
    token: str | None = None
    """The claim of the daemon that promotes its run's model; without one nobody's claim is asked for."""


def ensure_base(  # noqa: PLR0913, PLR0917 - which base of which track, where and when
    engine: Engine, state_folder: Path, track_name: str, base_path: Path, base_model_id: str, now: int
) -> None:
    """
    Make the base model the track's first champion, generation 0, if it has none; see to its links.

    Another base later on is noted on the track and leaves a champion that was trained as it is; while the champion is
    still the old base, the new one takes its place as the next generation. A base that only moved, with the same
    content, is followed to its new place.
    """
    with _alone(state_folder, track_name):
        _set_base(engine, track_name, base_path, base_model_id, now)
        _follow(engine, state_folder, track_name)


def _set_base(engine: Engine, track_name: str, base_path: Path, base_model_id: str, now: int) -> None:
    with transaction(engine) as session:
        track = ensure_track(session, track_name, now)
        path = str(base_path.absolute())
        known = (track.base_path, track.base_model_id)
        track.base_path, track.base_model_id = path, base_model_id
        if track.champion_generation is None:
            track.champion_generation, track.champion_model_id, track.champion_path = 0, base_model_id, path
            session.add(_base_row(track, "base model", now))
            record_event(session, "base_set", now, track=track_name, model_id=base_model_id, path=path)
        elif known != (path, base_model_id):
            record_event(session, "base_changed", now, track=track_name, model_id=base_model_id, path=path)
            if track.champion_model_id == known[1] != base_model_id:
                old = (track.champion_model_id, track.champion_path)
                track.champion_generation += 1
                track.champion_model_id, track.champion_path = base_model_id, path
                row = _base_row(track, "another base model in the settings", now)
                row.previous_model_id, row.previous_path = old
                session.add(row)
        if track.champion_model_id == base_model_id:
            track.champion_path = path
        session.add(track)


def _base_row(track: Track, reason: str, now: int) -> Promotion:
    """Return the row that makes the base model in `track`'s champion columns its champion."""
    return Promotion.model_validate({
        "track": track.name, "kind": PromotionKind.BASE, "state": PromotionState.DONE,
        "generation": track.champion_generation, "model_id": track.champion_model_id, "model_path": track.champion_path,
        "reason": reason, "created_at": now, "done_at": now,
    })  # fmt: skip


def promote(  # noqa: PLR0913, PLR0917 - what is promoted over which generation, why and when
    engine: Engine, state_folder: Path, candidate: Candidate, expected_generation: int, reason: str, now: int
) -> Promotion:
    """
    Make the candidate its track's champion and return the row that says so.

    For a run that did this already nothing happens and its row is returned. Raises `ChampionMoved` if the champion is
    not of `expected_generation` any more, `Barred` if the model was rolled back from, `LostClaim` if the run is not the
    owner's.
    """
    intent = Promotion(
        track=candidate.track, run_id=candidate.run_id, generation=expected_generation + 1,
        model_id=candidate.model_id, model_path=candidate.path, reason=reason, created_at=now,
    )  # fmt: skip
    with _alone(state_folder, candidate.track):
        with transaction(engine) as session:
            done = _of_run(session, candidate.run_id, PromotionState.DONE)
            if done is not None:
                return done
            if candidate.token is not None:
                held_run(session, Claim(candidate.run_id, candidate.token))
            if candidate.model_id in _barred(history(session, candidate.track)):
                message = f"model {candidate.model_id[:12]} was rolled back from and does not come back by itself"
                raise Barred(message, f"see why: dropforge history --track {candidate.track}")
            intent = _intend(session, intent, now)
        return _carry_out(engine, state_folder, intent, now)


def rollback(  # noqa: PLR0913, PLR0917 - which track goes back to what, why and when
    engine: Engine, state_folder: Path, track: str, to: int | None, reason: str, now: int
) -> Promotion:
    """
    Make a former champion reign again, as the next generation; return the row that says so.

    `to` is the generation of the former champion, `None` the one that today's took the place of. Every file of its
    model is compared with its hash before anything moves. The model that loses its place is barred: no run promotes it
    again, only a rollback to it. Raises `NoTarget`, `NoChampion`, or `ChampionMoved` if another change came first.
    """
    with transaction(engine) as session:
        reigning = champion(session, track)
        target = _target(history(session, track), reigning, to)
        row = session.get_one(Track, track)
    if target.model_id == row.base_model_id and row.base_path is not None:
        target.model_path = row.base_path
    _check_model(state_folder / target.model_path, target)
    intent = Promotion(
        track=track, kind=PromotionKind.ROLLBACK, generation=reigning.generation + 1, model_id=target.model_id,
        model_path=target.model_path, reason=f"rolled back to generation {target.generation}: {reason}", created_at=now,
    )  # fmt: skip
    with _alone(state_folder, track):
        with transaction(engine) as session:
            # A collection holds the write lock while it moves models away: one that is here now, stays.
            _require_folder(state_folder / target.model_path, target)
            intent = _intend(session, intent, now)
        return _carry_out(engine, state_folder, intent, now)


def recover(engine: Engine, state_folder: Path, now: int) -> None:
    """
    Finish or abandon every change that a dead process left half-done, then make all links equal to the rows.

    An intent is finished if the champion that it was compared with still stands and its model is there.
    """
    with transaction(engine) as session:
        pending = select(Promotion).where(Promotion.state == PromotionState.INTENT).order_by(col(Promotion.id))
        intents = session.exec(pending).all()
    for intent in intents:
        with _alone(state_folder, intent.track):
            _take_up(engine, state_folder, intent, now)
    with transaction(engine) as session:
        names = session.exec(select(Track.name).where(col(Track.champion_generation).is_not(None))).all()
    for name in names:
        with _alone(state_folder, name):
            _follow(engine, state_folder, name)


def champion(session: Session, track: str) -> ModelRef:
    """Return the track's champion. Raises `NoChampion` before its base model is known."""
    row = session.get(Track, track)
    if row is None or row.champion_generation is None:
        message = f"track {track} has no champion yet"
        raise NoChampion(message, "set base_model in dropforge.toml and start the daemon: dropforge run")
    return ModelRef.model_validate(
        {"model_id": row.champion_model_id, "path": row.champion_path, "generation": row.champion_generation}
    )


def history(session: Session, track: str) -> list[Promotion]:
    """Return the track's champions, the base model first and today's last."""
    done = select(Promotion).where(Promotion.track == track, Promotion.state == PromotionState.DONE)
    return list(session.exec(done.order_by(col(Promotion.generation))).all())


@contextmanager
def _alone(state_folder: Path, track: str) -> Iterator[None]:
    """Let one process or thread at a time change a track's champion: a person's rollback may meet the daemon."""
    folder = state_folder / "tracks" / track
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _take_up(engine: Engine, state_folder: Path, intent: Promotion, now: int) -> None:
    """Finish an intent of a dead process if it can still be, or abandon it."""
    with transaction(engine) as session:
        row = session.get_one(Promotion, intent.id)
        if row.state != PromotionState.INTENT:
            return
        track = session.get_one(Track, intent.track)
        current = track.champion_generation == intent.generation - 1
        usable = current and (state_folder / intent.model_path).is_dir()
        if not usable:
            _abandon(session, row, now)
    if usable:
        _carry_out(engine, state_folder, intent, now)


def _target(past: Sequence[Promotion], reigning: ModelRef, to: int | None) -> Promotion:
    """Return the former champion of generation `to`, or the one before today's that is not barred."""
    track = past[0].track
    hint = f"see the generations: dropforge history --track {track}"
    if to is not None:
        found = next((row for row in past if row.generation == to), None)
        if found is None:
            message = f"track {track} has had no champion of generation {to}"
            raise NoTarget(message, hint)
        if found.model_id == reigning.model_id:
            message = f"the model of generation {to} is the champion of track {track} already"
            raise NoTarget(message, hint)
        return found
    barred, before = _barred(past), reigning.model_id
    # The last row by which a model won its place, not those by which it came back, says what it took the place of.
    won = {row.model_id: row for row in past if row.kind != PromotionKind.ROLLBACK}
    latest = {row.model_id: row for row in past}
    for _ in past:
        before = won[before].previous_model_id or ""
        if before in latest and before not in barred and before != reigning.model_id:
            return latest[before]
        if before not in won:
            break
    message = f"track {track} has no champion before today's to go back to"
    raise NoTarget(message, f"{hint}; then name one: dropforge rollback --track {track} --to GENERATION --reason TEXT")


def _barred(past: Sequence[Promotion]) -> set[str]:
    """Return the models that were rolled back from and that nobody has brought back since."""
    barred = set()
    for row in past:
        if row.kind == PromotionKind.ROLLBACK and row.previous_model_id is not None:
            barred.add(row.previous_model_id)
        barred.discard(row.model_id)
    return barred


def _other_ways(target: Promotion) -> str:
    return f"go back to another one: dropforge history --track {target.track}; or bring the folder back from a backup"


def _require_folder(folder: Path, target: Promotion) -> None:
    if not folder.is_dir():
        message = f"the model of generation {target.generation} is not there any more: {folder}"
        raise NoTarget(message, _other_ways(target))


def _check_model(folder: Path, target: Promotion) -> None:
    """Compare a former champion's files with their hashes. Raises `NoTarget` if one is not what it was."""
    _require_folder(folder, target)
    what, hint = f"the model of generation {target.generation}", _other_ways(target)
    try:
        # A base model is the user's own folder, without a manifest of ours.
        found = model_id(folder) if Path(target.model_path).is_absolute() else verify_manifest(folder)
    except DropforgeError as error:
        message = f"{what} is not what it was: {error.message}"
        raise NoTarget(message, hint) from error
    if found != target.model_id:
        message = f"{what} is not what it was: {folder} holds another model"
        raise NoTarget(message, hint)


def _intend(session: Session, intent: Promotion, now: int) -> Promotion:
    """Journal what is about to happen; the same intent, left half-done before, is taken up again."""
    now_champion = champion(session, intent.track)
    if now_champion.generation != intent.generation - 1:
        raise _moved(intent.track, intent.generation - 1)
    pending = select(Promotion).where(Promotion.track == intent.track, Promotion.state == PromotionState.INTENT)
    for old in session.exec(pending).all():
        if all(getattr(old, name) == getattr(intent, name) for name in ("run_id", "kind", "model_id", "generation")):
            return old
        _abandon(session, old, now)
    intent.previous_model_id, intent.previous_path = now_champion.model_id, now_champion.path
    session.add(intent)
    session.flush()
    kind = "rollback_intended" if intent.kind == PromotionKind.ROLLBACK else "promotion_intended"
    record_event(session, kind, now, track=intent.track, run_id=intent.run_id, model_id=intent.model_id)
    return intent


def _carry_out(engine: Engine, state_folder: Path, intent: Promotion, now: int) -> Promotion:
    """Point the links to an intent's model and, in one transaction, make its row and the track's say the same."""
    _point(state_folder, intent.track, "champion", intent.model_path)
    _point(state_folder, intent.track, "previous", intent.previous_path or intent.model_path)
    with transaction(engine) as session:
        row = session.get_one(Promotion, intent.id)
        compared = (col(Track.name) == row.track, col(Track.champion_generation) == row.generation - 1)
        values = {
            "champion_generation": row.generation, "champion_model_id": row.model_id, "champion_path": row.model_path,
        }  # fmt: skip
        won = session.exec(update(Track).where(*compared).values(**values)).rowcount == 1
        if won:
            row.state, row.done_at = PromotionState.DONE, now
            session.add(row)
            kind = "rolled_back" if row.kind == PromotionKind.ROLLBACK else "promoted"
            record_event(
                session, kind, now, track=row.track, run_id=row.run_id,
                model_id=row.model_id, generation=row.generation, reason=row.reason,
            )  # fmt: skip
        else:
            _abandon(session, row, now)
    if not won:
        _follow(engine, state_folder, intent.track)
        raise _moved(intent.track, intent.generation - 1)
    return row


def _abandon(session: Session, intent: Promotion, now: int) -> None:
    intent.state = PromotionState.ABANDONED
    session.add(intent)
    record_event(
        session, "promotion_abandoned", now, track=intent.track, run_id=intent.run_id, model_id=intent.model_id
    )


def _of_run(session: Session, run_id: int, state: PromotionState) -> Promotion | None:
    return session.exec(select(Promotion).where(Promotion.run_id == run_id, Promotion.state == state)).first()


def _moved(track: str, expected: int) -> ChampionMoved:
    message = f"the champion of track {track} is not generation {expected} any more"
    return ChampionMoved(message, f"look at it: dropforge history --track {track}")


def _follow(engine: Engine, state_folder: Path, track: str) -> None:
    """Make the track's links equal to its row."""
    with transaction(engine) as session:
        row = session.get_one(Track, track)
        reigning = select(Promotion).where(
            Promotion.track == track,
            Promotion.state == PromotionState.DONE,
            Promotion.generation == row.champion_generation,
        )
        promotion = session.exec(reigning).one()
    path = row.champion_path or promotion.model_path
    previous = promotion.previous_path or path
    if promotion.previous_model_id == row.base_model_id and row.base_path is not None:
        previous = row.base_path
    _point(state_folder, track, "champion", path)
    _point(state_folder, track, "previous", previous)


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
