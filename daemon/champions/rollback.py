"""Roll a track back to a former champion."""

from collections.abc import Sequence
from pathlib import Path
from time import monotonic

from sqlalchemy import Engine

from daemon.champions.history import blocked, history, unhealthy_models
from daemon.champions.journal import alone, carry_out, champion, intend, require_generation
from daemon.champions.model_files import NoTarget, TryOut, check_files, later, other_ways, require_there
from daemon.state.database import transaction
from daemon.state.tables import Promotion, PromotionKind, Track
from pipeline.artifacts import ModelRef

#: Former champions that a refused rollback names.
_TOLD = 5


def rollback(  # noqa: PLR0913, PLR0917 - which track goes back to what, why and when
    engine: Engine, state_folder: Path, track: str, to: int | None, reason: str, now: int,
    *, by: str | None = None, over: int | None = None, try_out: TryOut = lambda _folder: None,
) -> Promotion:  # fmt: skip
    """
    Make a former champion serve again, as the next generation; return the row that says so.

    `to` is the generation of the former champion, `None` the one that today's took the place of; `over` is the one that
    has to serve now, `None` for whichever does. Before anything moves every file of its model is compared with its
    hash, and `try_out` lets it answer. The model that loses its place is blocked: no run promotes it again, only a
    person brings it back. Raises `NoTarget`, `NoChampion`, what `try_out` does, or `ChampionMoved` if another change
    came first.
    """
    with transaction(engine) as session:
        serving = champion(session, track)
        if over is not None:
            require_generation(session, track, over)
        row, past = session.get_one(Track, track), history(session, track)
    for one in past:
        if one.model_id == row.base_model_id and row.base_path is not None:
            one.model_path = row.base_path
    target = _target(past, serving, to, state_folder)
    folder, what = state_folder / target.model_path, f"the model of generation {target.generation}"
    begun = monotonic()
    check_files(state_folder, target.model_path, target.model_id, what, track)
    try_out(folder)
    now = later(now, monotonic() - begun)
    intent = Promotion(
        track=track, kind=PromotionKind.ROLLBACK, generation=serving.generation + 1, model_id=target.model_id,
        model_path=target.model_path, reason=f"rolled back to generation {target.generation}: {reason}", created_at=now,
        approved_by=by,
    )  # fmt: skip
    with alone(state_folder, track):
        with transaction(engine) as session:
            # A collection holds the write lock while it moves models away: one that is here now, stays.
            require_there(folder, what, track)
            intent = intend(session, intent, now)
        return carry_out(engine, state_folder, intent, now)


def _target(past: Sequence[Promotion], serving: ModelRef, to: int | None, state_folder: Path) -> Promotion:
    """Return the former champion of generation `to`, or the latest one that is neither blocked nor unhealthy."""
    track = past[0].track
    hint = f"see the generations: dropforge history --track {track}"
    if to is not None:
        found = next((row for row in past if row.generation == to), None)
        if found is None:
            message = f"track {track} has had no champion of generation {to}"
            raise NoTarget(message, hint)
        if found.model_id == serving.model_id:
            message = f"the model of generation {to} is the champion of track {track} already"
            raise NoTarget(message, hint)
        return found
    shut, before, chain = blocked(past) | unhealthy_models(past), serving.model_id, []
    # The last row by which a model won its place, not those by which it came back, says what it took the place of.
    won = {row.model_id: row for row in past if row.kind != PromotionKind.ROLLBACK}
    latest = {row.model_id: row for row in past}
    for _ in past:
        before = won[before].previous_model_id or ""
        if before in latest and before not in shut and before != serving.model_id:
            return latest[before]
        if before not in won:
            break
        chain.append(before)
    # Those that today's came after, the nearest first; then those that came after it, the latest first.
    others = [latest.pop(model) for model in chain if model in latest and model != serving.model_id]
    after = (row for model, row in latest.items() if model != serving.model_id)
    others += sorted(after, key=lambda row: row.generation, reverse=True)
    raise _no_target(past, others, state_folder)


def _no_target(past: Sequence[Promotion], others: Sequence[Promotion], state_folder: Path) -> NoTarget:
    """
    Return why a rollback finds nothing to go back to by itself, and the generation that a person can name.

    `others` has the latest row of each model that does not serve, the best one to name first.
    """
    track, shut, ill = past[0].track, blocked(past), unhealthy_models(past)
    bases = {row.model_id for row in past if row.kind == PromotionKind.BASE}
    if not others:
        message = f"track {track} has had no other champion than today's"
        return NoTarget(message, f"see for yourself: dropforge history --track {track}")
    told = [
        f"generation {row.generation}{' (base model)' if row.model_id in bases else ''} {_why_not(row, shut, ill)}"
        for row in others[:_TOLD]
    ]
    told += [f"and {len(others) - _TOLD} more"] if len(others) > _TOLD else []
    message = f"track {track} has no champion before today's that a rollback takes by itself: {', '.join(told)}"
    there = next((row for row in others if (state_folder / row.model_path).is_dir()), None)
    if there is None:
        return NoTarget(message, f"their models are gone: {other_ways(track)}")
    command = f"dropforge rollback --track {track} --to {there.generation} --reason TEXT"
    return NoTarget(message, f"to take one all the same: {command}; see them all: dropforge history --track {track}")


def _why_not(row: Promotion, shut: set[str], unhealthy: set[str]) -> str:
    """Say why a rollback does not take a model by itself, whose latest row this is."""
    if row.model_id in shut:
        return "was rolled back from"
    return "failed its health command" if row.model_id in unhealthy else "was skipped by a rollback"
