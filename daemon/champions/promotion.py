"""
Each track's champion: which model reigns, which ones did, and the rules by which one takes another's place.

`succession` has the mechanics. A model that was rolled back from is barred: no run promotes it again, only a person
brings it back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from sqlalchemy import Engine
from sqlmodel import Session, col, select

from daemon.champions.journal import (
    ChampionMoved,
    NoChampion,
    alone,
    carry_out,
    champion,
    end_waiting,
    follow,
    intend,
    promotion_of,
    recover,
    require_generation,
)
from daemon.queue.claims import Claim, held_run, record_event
from daemon.queue.run_queue import ensure_track
from daemon.queue.withdrawals import Withdrawn, require_no_withdrawal
from daemon.state.database import transaction
from daemon.state.tables import HookState, Promotion, PromotionKind, PromotionState, Run, Track
from pipeline.artifacts import ModelRef
from pipeline.errors import DropforgeError
from pipeline.model_folder.manifest import model_id, verify_manifest

__all__ = [
    "Barred", "Candidate", "ChampionMoved", "NoChampion", "NoTarget", "Withdrawn", "champion", "drops_of",
    "ensure_base", "former", "has_promoted", "history", "promote", "recover", "rollback",
]  # fmt: skip

#: Former champions that a refused rollback names.
_TOLD = 5
TryOut = Callable[[Path], object]
"""Lets the model in a folder answer; raises `DropforgeError` if it does not."""


class Barred(DropforgeError):
    """The model was rolled back from: only a person brings it back."""


class NoTarget(DropforgeError):
    """There is no such model to make the champion, or its files are not what they were."""


@dataclass(frozen=True)
class Candidate:
    """The model that a run made, and where it lies: `path` is relative to the state folder."""

    track: str
    run_id: int
    model_id: str
    path: str
    token: str | None = None
    """The claim of the daemon that promotes its run's model; without one nobody's claim is asked for."""
    approved_by: str | None = None
    """The person who said yes, where one was asked."""


def ensure_base(  # noqa: PLR0913, PLR0917 - which base of which track, where and when
    engine: Engine, state_folder: Path, track_name: str, base_path: Path, base_model_id: str, now: int
) -> None:
    """
    Make the base model the track's first champion, generation 0, if it has none; see to its links.

    Another base later on is noted on the track and leaves a champion that was trained as it is; while the champion is
    still the old base, the new one takes its place as the next generation. A base that only moved, with the same
    content, is followed to its new place.
    """
    with alone(state_folder, track_name):
        _set_base(engine, track_name, base_path, base_model_id, now)
        follow(engine, state_folder, track_name)


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
                row.hook_state = HookState.PENDING
                session.add(row)
                end_waiting(session, track.name, None, now)
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
    not of `expected_generation` any more, `Barred` if the model was rolled back from, `Withdrawn` if it was trained
    on a drop that was withdrawn since, `NoTarget` if it is not there, `LostClaim` if the run is not the owner's.
    """
    intent = Promotion(
        track=candidate.track, run_id=candidate.run_id, generation=expected_generation + 1,
        model_id=candidate.model_id, model_path=candidate.path, reason=reason, created_at=now,
        approved_by=candidate.approved_by,
    )  # fmt: skip
    with alone(state_folder, candidate.track):
        with transaction(engine) as session:
            done = promotion_of(session, candidate.run_id)
            if done is not None:
                return done
            if candidate.token is not None:
                held_run(session, Claim(candidate.run_id, candidate.token))
            if candidate.model_id in barred(history(session, candidate.track)):
                message = f"model {candidate.model_id[:12]} was rolled back from and does not come back by itself"
                see = f"see why: dropforge history --track {candidate.track}"
                raise Barred(message, f"{see}; to bring it back: {forcing(candidate.run_id)}")
            if not _is_intended(session, candidate.run_id):
                # What was journalled before the withdrawal is finished by `recover`, too.
                require_no_withdrawal(session, candidate.run_id, forcing(candidate.run_id))
            require_there(state_folder / candidate.path, f"the model of run {candidate.run_id}", candidate.track)
            intent = intend(session, intent, now)
        return carry_out(engine, state_folder, intent, now)


def rollback(  # noqa: PLR0913, PLR0917 - which track goes back to what, why and when
    engine: Engine, state_folder: Path, track: str, to: int | None, reason: str, now: int,
    *, by: str | None = None, over: int | None = None, try_out: TryOut = lambda _folder: None,
) -> Promotion:  # fmt: skip
    """
    Make a former champion reign again, as the next generation; return the row that says so.

    `to` is the generation of the former champion, `None` the one that today's took the place of; `over` is the one that
    has to reign now, `None` for whichever does. Before anything moves every file of its model is compared with its
    hash, and `try_out` lets it answer. The model that loses its place is barred: no run promotes it again, only a
    person brings it back. Raises `NoTarget`, `NoChampion`, what `try_out` does, or `ChampionMoved` if another change
    came first.
    """
    with transaction(engine) as session:
        reigning = champion(session, track)
        if over is not None:
            require_generation(session, track, over)
        row, past = session.get_one(Track, track), history(session, track)
    for one in past:
        if one.model_id == row.base_model_id and row.base_path is not None:
            one.model_path = row.base_path
    target = _target(past, reigning, to, state_folder)
    folder, what = state_folder / target.model_path, f"the model of generation {target.generation}"
    begun = monotonic()
    check_files(state_folder, target.model_path, target.model_id, what, track)
    try_out(folder)
    now = later(now, monotonic() - begun)
    intent = Promotion(
        track=track, kind=PromotionKind.ROLLBACK, generation=reigning.generation + 1, model_id=target.model_id,
        model_path=target.model_path, reason=f"rolled back to generation {target.generation}: {reason}", created_at=now,
        approved_by=by,
    )  # fmt: skip
    with alone(state_folder, track):
        with transaction(engine) as session:
            # A collection holds the write lock while it moves models away: one that is here now, stays.
            require_there(folder, what, track)
            intent = intend(session, intent, now)
        return carry_out(engine, state_folder, intent, now)


def history(session: Session, track: str) -> list[Promotion]:
    """Return the track's champions, the base model first and today's last."""
    done = select(Promotion).where(Promotion.track == track, Promotion.state == PromotionState.DONE)
    return list(session.exec(done.order_by(col(Promotion.generation))).all())


def _target(past: Sequence[Promotion], reigning: ModelRef, to: int | None, state_folder: Path) -> Promotion:
    """Return the former champion of generation `to`, or the one before today's that is neither barred nor sick."""
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
    shut, before, chain = barred(past) | _sick(past), reigning.model_id, []
    # The last row by which a model won its place, not those by which it came back, says what it took the place of.
    won = {row.model_id: row for row in past if row.kind != PromotionKind.ROLLBACK}
    latest = {row.model_id: row for row in past}
    for _ in past:
        before = won[before].previous_model_id or ""
        if before in latest and before not in shut and before != reigning.model_id:
            return latest[before]
        if before not in won:
            break
        chain.append(before)
    # Those that today's came after, the nearest first; then those that came after it, the latest first.
    others = [latest.pop(model) for model in chain if model in latest and model != reigning.model_id]
    after = (row for model, row in latest.items() if model != reigning.model_id)
    others += sorted(after, key=lambda row: row.generation, reverse=True)
    raise _no_target(past, others, state_folder)


def _no_target(past: Sequence[Promotion], others: Sequence[Promotion], state_folder: Path) -> NoTarget:
    """
    Return why a rollback finds nothing to go back to by itself, and the generation that a person can name.

    `others` has the latest row of each model that does not reign, the best one to name first.
    """
    track, shut, sick = past[0].track, barred(past), _sick(past)
    bases = {row.model_id for row in past if row.kind == PromotionKind.BASE}
    if not others:
        message = f"track {track} has had no other champion than today's"
        return NoTarget(message, f"see for yourself: dropforge history --track {track}")
    told = [
        f"generation {row.generation}{' (base model)' if row.model_id in bases else ''} {_why_not(row, shut, sick)}"
        for row in others[:_TOLD]
    ]
    told += [f"and {len(others) - _TOLD} more"] if len(others) > _TOLD else []
    message = f"track {track} has no champion before today's that a rollback takes by itself: {', '.join(told)}"
    there = next((row for row in others if (state_folder / row.model_path).is_dir()), None)
    if there is None:
        return NoTarget(message, f"their models are gone: {_other_ways(track)}")
    command = f"dropforge rollback --track {track} --to {there.generation} --reason TEXT"
    return NoTarget(message, f"to take one all the same: {command}; see them all: dropforge history --track {track}")


def _why_not(row: Promotion, shut: set[str], sick: set[str]) -> str:
    """Say why a rollback does not take a model by itself, whose latest row this is."""
    if row.model_id in shut:
        return "was rolled back from"
    return "failed its health command" if row.model_id in sick else "was passed over by a rollback"


def _sick(past: Sequence[Promotion]) -> set[str]:
    """Return the models that failed their health command when they last came to reign: others took their place."""
    latest = {row.model_id: row for row in past}
    return {model for model, row in latest.items() if row.health_state == HookState.FAILED}


def former(session: Session, state_folder: Path, track: str, most: int) -> list[ModelRef]:
    """
    Return up to `most` former champions of the track that may serve again, the latest first.

    Not today's, not those that were rolled back from, that failed their health command or that a way back passed over,
    not those whose folder is gone; base models are among them.
    """
    past, row = history(session, track), session.get_one(Track, track)
    shut, over = barred(past) | _sick(past) | {row.champion_model_id}, _passed_over(past)
    found: dict[str, ModelRef] = {}
    for one in reversed(past):
        moved = one.model_id == row.base_model_id and row.base_path is not None
        path = row.base_path if moved and row.base_path is not None else one.model_path
        left = one.generation in over or one.model_id in shut
        if left or one.model_id in found or not (state_folder / path).is_dir():
            continue
        found[one.model_id] = ModelRef(
            model_id=one.model_id, path=path, generation=one.generation, drops=drops_of(session, track, one.model_id)
        )
        if len(found) == most:
            break
    return list(found.values())


def _passed_over(past: Sequence[Promotion]) -> set[int]:
    """Return the generations between those that were rolled back from and those that reigned again for them."""
    over: set[int] = set()
    for row in past:
        if row.kind == PromotionKind.ROLLBACK:
            before = [one.generation for one in past if one.generation < row.generation]
            target = max(one.generation for one in past if one.model_id == row.model_id and one.generation in before)
            over.update(generation for generation in before if generation > target)
    return over


def drops_of(session: Session, track: str, model: str) -> tuple[int, ...] | None:
    """Return the drops in the snapshot that a champion's model was made from; `None` for a base model."""
    made = select(Promotion).where(
        Promotion.track == track,
        Promotion.model_id == model,
        Promotion.state == PromotionState.DONE,
        col(Promotion.run_id).is_not(None),
    )
    row = session.exec(made.order_by(col(Promotion.generation).desc())).first()
    if row is None:
        return None
    if row.drops is not None:
        return tuple(row.drops)
    # Promoted by an earlier version.
    return tuple(int(str(drop["id"])) for drop in session.get_one(Run, row.run_id).snapshot or ())


def barred(past: Sequence[Promotion]) -> set[str]:
    """Return the models that were rolled back from and that nobody has brought back since."""
    shut = set()
    for row in past:
        if row.kind == PromotionKind.ROLLBACK and row.previous_model_id is not None:
            shut.add(row.previous_model_id)
        shut.discard(row.model_id)
    return shut


def forcing(run_id: int) -> str:
    """Return the command that makes a run's model the champion whatever its verdict."""
    return f"dropforge promote {run_id} --force --reason TEXT"


def later(now: int, seconds: float) -> int:
    """Return the time, in ms, after a look at a model: a large one takes minutes, and the history says who served."""
    return now + 1000 * int(seconds)


def require_there(folder: Path, what: str, track: str) -> None:
    """Raise `NoTarget` if the folder of a model, named by `what`, is not there any more."""
    if not folder.is_dir():
        message = f"{what} is not there any more: {folder}"
        raise NoTarget(message, _other_ways(track))


def check_files(state_folder: Path, path: str, identity: str, what: str, track: str) -> None:
    """Compare the files of the model at `path`, as rows have it, with their hashes. Raises `NoTarget` on another."""
    folder = state_folder / path
    require_there(folder, what, track)
    try:
        # A base model is the user's own folder, without a manifest of ours.
        found = model_id(folder) if Path(path).is_absolute() else verify_manifest(folder)
    except DropforgeError as error:
        message = f"{what} is not what it was: {error.message}"
        raise NoTarget(message, _other_ways(track)) from error
    if found != identity:
        message = f"{what} is not what it was: {folder} holds another model"
        raise NoTarget(message, _other_ways(track))


def _other_ways(track: str) -> str:
    return f"take another one: dropforge history --track {track}; or bring the folder back from a backup"


def has_promoted(engine: Engine, run_id: int) -> bool:
    """Say whether a run's candidate became the champion by its verdict, though the run may not have ended yet."""
    with transaction(engine) as session:
        return promotion_of(session, run_id) is not None


def _is_intended(session: Session, run_id: int) -> bool:
    """Say whether the promotion of a run's candidate by its verdict was begun and is not over."""
    begun = select(Promotion).where(Promotion.run_id == run_id, Promotion.state == PromotionState.INTENT)
    return session.exec(begun.where(Promotion.kind == PromotionKind.PROMOTION)).first() is not None
