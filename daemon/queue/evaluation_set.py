"""
The evaluation set of a track: which pinned files are accepted at once, and when their records start a run.

A file in heldout/ changes the evaluation set, and anybody who may write into the inbox can put a file there. So a file
is accepted at once only if the settings judge on pinned files and name its owner; every other waits for approval.
"""

import stat

from sqlmodel import Session, col, select

from daemon.settings.model import Settings
from daemon.state.states import DropState
from daemon.state.tables import Drop, Run
from daemon.system.programs import name_of, user

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def why_it_waits(settings: Settings, track: str, uid: int, mode: int) -> str | None:
    """
    Return why a file in a track's heldout folder waits for approval; `None` if it is accepted at once.

    It is accepted only with `gate.on = "pinned"`, if its owner `uid` is in `gate.pinned_by` (by default the settings'
    owner) and by its `mode` nobody else may write to it. Both are those of the very file whose bytes were taken.
    """
    gate = settings.track(track).gate
    # A track may name nobody; without a settings file it is the daemon's own user.
    names = gate.pinned_by or settings.gate.pinned_by or (user(),)
    owner = name_of(uid)
    if gate.on != "pinned":
        why = f'gate.on is "{gate.on}"'
    elif not {owner, str(uid)} & set(names):
        why = f"gate.pinned_by is {', '.join(names)}"
    elif mode & _OTHERS_MAY_WRITE:
        why = f"others may write into it (mode {stat.S_IMODE(mode):o})"
    else:
        return None
    return f"it is {owner}'s, and {why}"


def records_came(session: Session, settings: Settings, track: str) -> bool:
    """
    Return whether an accepted pinned drop is unused, and the last run with an outcome had `insufficient_evidence`.

    Always `False` unless the track is declared and its `gate.on` is "pinned".
    """
    if track not in settings.track_names or settings.track(track).gate.on != "pinned":
        return False
    waiting = select(Drop.id).where(Drop.track == track, Drop.role == "heldout", Drop.state == DropState.ACCEPTED)
    new = session.exec(waiting.where(col(Drop.first_run).is_(None)).limit(1)).first()
    ended = select(Run.outcome).where(Run.track == track, col(Run.outcome).is_not(None))
    last = session.exec(ended.order_by(col(Run.id).desc()).limit(1)).first()
    return new is not None and last == "insufficient_evidence"
