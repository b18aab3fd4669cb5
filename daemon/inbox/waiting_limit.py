"""
Limit how many drops of one owner wait: training drops for a run, held-out drops for approval.

Counted per owner of the files, so that one user cannot use up the limit for the others.
"""

import os
import stat

from sqlalchemy import Engine
from sqlmodel import Session

from daemon.inbox.folders import InboxFolders, InboxUnusable
from daemon.inbox.safe_copy import look
from daemon.inbox.watcher import Settled
from daemon.queue.snapshots import proposed_drops, waiting_drops
from daemon.settings.model import Settings
from daemon.state.database import transaction
from daemon.system.programs import name_of, user
from pipeline.words import count

_LIMIT = "the limit (intake.max_waiting_drops)"


class WaitingLimit:
    """Enforces `intake.max_waiting_drops`, the most drops of an owner that wait in a track; used by a single thread."""

    def __init__(self, engine: Engine, settings: Settings, inbox: InboxFolders) -> None:
        """Use the database of `engine`; nothing is counted yet."""
        self._engine, self._settings, self._inbox = engine, settings, inbox
        self._most = settings.intake.max_waiting_drops
        #: Tracks and user ids whose limit of waiting training drops is reached.
        self._full: set[tuple[str, int]] = set()

    def is_full(self, settled: Settled, info: os.stat_result) -> bool:
        """Return whether a training file's owner was at the limit at the last count; `False` for held-out files."""
        return settled.role == "train" and (settled.track, info.st_uid) in self._full

    def full_tracks(self) -> list[str]:
        """Recount for the owners that `why_full` found at the limit of training drops; return the tracks still full."""
        if self._full:
            with transaction(self._engine) as session:
                self._full = {(track, uid) for track, uid in self._full if self._wait(session, track, uid)}
        return sorted({track for track, _uid in self._full})

    def why_full(self, session: Session, settled: Settled, info: os.stat_result) -> str:
        """
        Return why no further file of this owner is taken in the file's track now; empty if it may be.

        Held-out files are limited only while they would wait for approval. An owner whose waiting training drops have
        reached the limit is remembered for `is_full`.
        """
        track, owner = settled.track, name_of(info.st_uid)
        if settled.role == "train":
            if self._wait(session, track, info.st_uid):
                self._full.add((track, info.st_uid))
                return self.words(info)
        elif self.why_it_waits(settled, info) and proposed_drops(session, track, owner) >= self._most:
            files = count(self._most, "held-out file")
            return f"{files} of {owner} wait for approval, {_LIMIT}: dropforge drops accept DROP"
        return ""

    def words(self, info: os.stat_result) -> str:
        """Return the message that the file's owner has reached the limit of drops that wait for a run."""
        return f"{count(self._most, 'drop')} of {name_of(info.st_uid)} wait for a run, {_LIMIT}"

    def why_it_waits(self, settled: Settled, info: os.stat_result) -> str | None:
        """
        Return why a held-out file waits for approval; `None` if it is accepted at once.

        It changes the evaluation set, and anybody who may write into the inbox can put a file there. So it is accepted
        only with `gate.on = "pinned"`, if its owner is in `gate.pinned_by` (by default the settings' owner) and by its
        mode, and the inbox's, nobody else may write to it. `info` is of the very file whose bytes were taken. Raises
        `InboxUnusable`.
        """
        gate, owner = self._settings.track(settled.track).gate, name_of(info.st_uid)
        # A track may name nobody; without a settings file it is the daemon's own user.
        names = gate.pinned_by or self._settings.gate.pinned_by or (user(),)
        if gate.on != "pinned":
            why = f'gate.on is "{gate.on}"'
        elif not {owner, str(info.st_uid)} & set(names):
            why = f"gate.pinned_by is {', '.join(names)}"
        elif info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            why = f"others may write into it (mode {stat.S_IMODE(info.st_mode):o})"
        else:
            return self._inbox.why_movable()
        return f"it is {owner}'s, and {why}"

    def needs_approval(self, settled: Settled) -> bool:
        """Return whether a file needs approval; `False` for training files, or if its owner and mode cannot be read."""
        if settled.role != "heldout":
            return False
        try:
            folder = self._inbox.shared(*settled.folders)  # held: its descriptor is closed with it
            info = look(settled.name, folder.fd)
        except (OSError, InboxUnusable):
            return False
        return self.why_it_waits(settled, info) is not None

    def _wait(self, session: Session, track: str, uid: int) -> bool:
        # The count by owner is slower, and rarely needed.
        most = self._most
        return waiting_drops(session, track) >= most and waiting_drops(session, track, name_of(uid)) >= most
