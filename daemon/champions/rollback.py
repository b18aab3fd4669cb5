"""Roll a track back to a former champion."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from daemon.champions.history import blocked, unhealthy_models
from daemon.champions.promotion import TryOut, champion, champions_of, change_by_hand, other_ways, require_generation
from daemon.state.database import transaction
from daemon.state.events import Word
from daemon.state.states import PromotionKind
from daemon.state.tables import Promotion, Track
from pipeline.artifacts import ModelRef
from pipeline.errors import DropforgeError

#: Former champions that a refused rollback names.
_TOLD = 5
_GONE = "is not there any more"


@dataclass(frozen=True)
class Target:
    """Which former champion is to serve again on a track."""

    track: str
    generation: int | None = None
    """`None` for the one that today's took the place of, if nothing speaks against it."""
    over: int | None = None
    """The generation that has to serve now; `None` for whichever does."""


def rollback(
    engine: Engine, state_folder: Path, to: Target, word: Word, *, try_out: TryOut = lambda _folder: None
) -> Promotion:
    """
    Make a former champion serve again, as the next generation; return the row that says so.

    Before anything moves every file of its model is compared with its hash, and `try_out` lets it answer. The model
    that loses its place is blocked: no run promotes it again, only a person brings it back. Raises `DropforgeError`,
    `NoChampion`, what `try_out` does, or `ChampionMoved` if another change came first.
    """
    track = to.track
    with transaction(engine) as session:
        serving = champion(session, track)
        if to.over is not None:
            require_generation(session, track, to.over)
        row, past = session.get_one(Track, track), champions_of(session, track)
    for one in past:
        if one.model_id == row.base_model_id and row.base_path is not None:
            one.model_path = row.base_path
    target = _target(past, serving, to.generation, state_folder)
    change = Promotion(
        track=track,
        kind=PromotionKind.ROLLBACK,
        generation=serving.generation + 1,
        model_id=target.model_id,
        model_path=target.model_path,
        reason=f"rolled back to generation {target.generation}: {word.reason}",
        created_at=word.at,
        approved_by=word.by,
    )
    return change_by_hand(engine, state_folder, change, f"the model of generation {target.generation}", try_out)


def _target(past: Sequence[Promotion], serving: ModelRef, to: int | None, state_folder: Path) -> Promotion:
    """Return the former champion of generation `to`, or the one that today's took the place of."""
    track = past[0].track
    hint = f"see the generations: dropforge history --track {track}"
    if to is not None:
        found = next((row for row in past if row.generation == to), None)
        if found is None:
            raise DropforgeError(f"track {track} has had no champion of generation {to}", hint)
        if found.model_id == serving.model_id:
            raise DropforgeError(f"the model of generation {to} is the champion of track {track} already", hint)
        return found
    # A run can make the very model that serves, and promote it again.
    others = {row.model_id: row for row in past if row.model_id != serving.model_id}
    former = max(others.values(), key=lambda row: row.generation, default=None)
    if former is None:
        raise DropforgeError(f"track {track} has had no other champion than today's", hint)
    against = _against(former, past, state_folder)
    if against:
        message = f"no rollback without --to: the model of generation {former.generation} {against}"
        raise DropforgeError(message, _choices(list(others.values()), past, state_folder))
    return former


def _against(row: Promotion, past: Sequence[Promotion], state_folder: Path) -> str:
    """Say why a rollback does not take a former champion by itself; empty if it does."""
    if not (state_folder / row.model_path).is_dir():
        return _GONE
    if row.model_id in blocked(past):
        return "was rolled back from"
    return "failed its health command" if row.model_id in unhealthy_models(past) else ""


def _choices(others: Sequence[Promotion], past: Sequence[Promotion], state_folder: Path) -> str:
    """Return the command for a person, and what it takes: first the generations that nothing speaks against."""
    track, bases = past[0].track, {row.model_id for row in past if row.kind == PromotionKind.BASE}
    against = {row.generation: _against(row, past, state_folder) for row in others}
    there = [row for row in others if against[row.generation] != _GONE]
    if not there:
        return f"the models of all former champions are gone: {other_ways(track)}"
    there.sort(key=lambda row: (bool(against[row.generation]), -row.generation))
    told = []
    for row in there[:_TOLD]:
        remarks = ["base model"] * (row.model_id in bases) + [against[row.generation]] * bool(against[row.generation])
        told.append(f"{row.generation} ({', '.join(remarks)})" if remarks else str(row.generation))
    command = f"dropforge rollback --track {track} --to {there[0].generation} --reason TEXT"
    return f"name one: {command}; --to takes {', '.join(told)}; see them all: dropforge history --track {track}"
