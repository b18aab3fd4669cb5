"""
Each track's champion: which model serves, and the rules by which one takes another's place.

`journal` has the mechanics. A model that was rolled back from is blocked: no run promotes it again, only a person
brings it back.
"""

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from daemon.champions.history import blocked, forcing
from daemon.champions.journal import change_champion, history
from daemon.champions.model_files import require_there
from daemon.queue.claims import Claim, held_run, require_not_cancelled
from daemon.state.database import transaction
from daemon.state.tables import Promotion, Run, promotion_of
from pipeline.errors import DropforgeError


class Blocked(DropforgeError):
    """The model was rolled back from: only a person brings it back."""


@dataclass(frozen=True)
class Candidate:
    """The model that a run made, and where it lies: `path` is relative to the state folder."""

    track: str
    run_id: int
    model_id: str
    path: str
    over: int
    """The generation of the champion that it was compared with."""
    reason: str
    """Why it won."""
    token: str | None = None
    """The claim of the daemon that promotes its run's model; without one nobody's claim is asked for."""
    approved_by: str | None = None
    """The person who said yes, where one was asked."""


def promote(engine: Engine, state_folder: Path, candidate: Candidate, now: int) -> Promotion:
    """
    Make the candidate its track's champion and return the row that says so.

    For a run that did this already nothing happens and its row is returned. Raises `ChampionMoved` if the champion is
    not the one that it was compared with, `Blocked` if the model was rolled back from, `Cancelled` if the run was
    cancelled, `DropforgeError` if the model is not there, `LostClaim` if the run is not the owner's.
    """
    with transaction(engine) as session:
        done = promotion_of(session, candidate.run_id)
        if done is not None:
            return done
        if candidate.token is not None:
            held_run(session, Claim(candidate.run_id, candidate.token))
        require_not_cancelled(session.get_one(Run, candidate.run_id))
        if candidate.model_id in blocked(history(session, candidate.track)):
            message = f"model {candidate.model_id[:12]} was rolled back from and does not come back by itself"
            see = f"see why: dropforge history --track {candidate.track}"
            raise Blocked(message, f"{see}; to bring it back: {forcing(candidate.run_id)}")
        require_there(state_folder / candidate.path, f"the model of run {candidate.run_id}", candidate.track)
        change = Promotion(
            track=candidate.track,
            run_id=candidate.run_id,
            generation=candidate.over + 1,
            model_id=candidate.model_id,
            model_path=candidate.path,
            reason=candidate.reason,
            created_at=now,
            approved_by=candidate.approved_by,
        )
        return change_champion(session, state_folder, change)


def has_promoted(engine: Engine, run_id: int) -> bool:
    """Say whether a run's candidate became the champion by its verdict, though the run may not have ended yet."""
    with transaction(engine) as session:
        return promotion_of(session, run_id) is not None
