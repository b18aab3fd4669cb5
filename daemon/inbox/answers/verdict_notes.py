"""
What became of each drop, in `NAME.verdict.txt` beside its receipt, replaced whenever that changes.

The database is the whole state: a text that differs from the file is written, so a crash costs nothing, and at its
start the daemon goes through all drops once. After that it looks at the drops that an event may be about.
"""

import json
import os
from collections.abc import Iterator

import structlog
from sqlalchemy import Engine, func
from sqlalchemy.orm import defer
from sqlmodel import Session, col, select

from daemon.inbox.answers import own_files
from daemon.inbox.answers.receipts import RECEIPT, home_of, names_for
from daemon.inbox.answers.story import TrackPast, tell
from daemon.inbox.folders import Folder, InboxFolders, InboxUnusable
from daemon.queue.snapshots import snapshot_ids
from daemon.settings.model import Settings
from daemon.state.database import ChangeWatch, transaction
from daemon.state.questions import TAKEN_IN
from daemon.state.states import DropState
from daemon.state.tables import Drop, Event, Run, rows_of
from pipeline import durable
from pipeline.errors import is_disk_full

VERDICT = ".verdict.txt"
#: Of the others everything is said when they are taken.
_TOLD = (DropState.ACCEPTED, DropState.PROPOSED, DropState.WITHDRAWN, DropState.SUSPENDED)
#: Drops that are looked at before files are taken in again, and names that a receipt is looked for under.
_AT_ONCE, _MOST_NAMES = 20, 25
log = structlog.get_logger()


class VerdictNotes:
    """Keeps the notes of all drops; used by one thread."""

    def __init__(self, engine: Engine, settings: Settings, inbox: InboxFolders) -> None:
        """Read from the database of `engine`, and begin with all drops."""
        self._engine, self._settings, self._inbox = engine, settings, inbox
        self._changes = ChangeWatch(engine)
        with transaction(engine) as session:
            self._seen = session.exec(select(func.max(Event.id))).one() or 0
            told = select(Drop.id).where(col(Drop.state).in_(_TOLD))
            self._pending = {number for number in session.exec(told) if number}
            self._champions = {track: TrackPast(session, track).champion for track in settings.track_names}
        self._pasts: dict[str, TrackPast] = {}
        #: Whether there are changes that nobody has looked at to the end: a look may fail at a locked database.
        self._changed = False
        #: The tracks whose champion or verdicts may have changed; who has told of one takes it out.
        self.touched = set(settings.track_names)

    def refresh(self) -> bool:
        """
        Write what has changed, of so many drops at once; say whether more are waiting.

        After an error, as of a full disk or a locked database, the next call does what this one left.
        """
        self._changed |= self._changes.changed()
        if not self._changed and not self._pending:
            return False
        with transaction(self._engine) as session:
            if self._changed:
                self._pasts.clear()
                self._look_at_events(session)
            batch = sorted(self._pending, reverse=True)[:_AT_ONCE]
            drops = session.exec(select(Drop).where(col(Drop.id).in_(batch))).all()
            texts = [
                (drop, owner_of(session, drop), tell(session, self._settings, drop, self._past(session, drop.track)))
                for drop in drops
                if drop.state in _TOLD
            ]
        self._changed = False
        for drop, owner, text in texts:
            self._write(drop, owner, text)
        self._pending.difference_update(batch)
        return bool(self._pending)

    def _look_at_events(self, session: Session) -> None:
        """Note the drops that the events since the last look may be about."""
        asked = select(Event).where(col(Event.id) > self._seen, col(Event.kind).not_like("step!_%", escape="!"))
        asked = asked.options(defer(Event.detail))  # type: ignore[arg-type]
        events = session.exec(asked.order_by(col(Event.id))).all()
        if not events:
            return
        tracks = {event.track for event in events if event.track}
        champions = {track: self._past(session, track).champion for track in tracks}
        self.touched |= tracks
        self._pending |= {event.drop_id for event in events if event.drop_id}
        # A drop that comes in changes no other one's text: of a thousand each would be worded a thousand times.
        of_runs = [event for event in events if event.run_id and not event.kind.startswith("drop_")]
        for number in {event.run_id for event in of_runs}:
            run = session.get(Run, number)
            if run is not None:
                # What the champion was trained on has its verdict.
                self._pending |= snapshot_ids(run) - champions.get(run.track, frozenset())
        for track, champion in champions.items():
            self._pending |= champion ^ self._champions.get(track, frozenset())
        for track in {event.track for event in of_runs if event.track}:
            waiting = select(Drop.id).where(Drop.track == track, Drop.role == "train", Drop.state == DropState.ACCEPTED)
            self._pending |= {number for number in session.exec(waiting.where(col(Drop.first_run).is_(None))) if number}
        self._champions |= champions
        self._seen = events[-1].id or self._seen

    def _past(self, session: Session, track: str) -> TrackPast:
        if track not in self._pasts:
            self._pasts[track] = TrackPast(session, track)
        return self._pasts[track]

    def _write(self, drop: Drop, owner: str | None, text: str) -> None:
        """Put a drop's text beside its receipt, unless it is there; a drop without a receipt gets none."""
        try:
            folder = self._inbox.answers_there(*home_of(drop.track, rejected=False), user=owner)
            name = None if folder is None else name_with(RECEIPT, folder, drop)
            if folder is not None and name is not None:
                data, path = text.encode(), folder.path / f"{name}{VERDICT}"
                if own_files.read(folder, path.name) != data:
                    durable.write_bytes(path, data)
        except (InboxUnusable, OSError) as error:
            if isinstance(error, OSError) and is_disk_full(error):
                raise
            log.warning("verdict_not_written", drop=drop.id, error=str(error))


def owner_of(session: Session, drop: Drop) -> str | None:
    """Return the user who dropped a file, by the event that recorded it."""
    first = rows_of(session, Event, TAKEN_IN, drop=drop.id).first()
    owner = first.detail.get("owner") if first is not None else None
    return owner if isinstance(owner, str) else None


def name_with(ending: str, folder: Folder, drop: Drop) -> str | None:
    """Return the name under which a drop was filed away: the document with this ending beside it names the drop."""
    for name in _names(drop):
        document = own_files.read(folder, name + ending)
        if document is not None and _is_about(document, drop):
            return name
    return None


def _names(drop: Drop) -> Iterator[str]:
    for _number, name in zip(range(_MOST_NAMES), names_for(drop.name_bytes, drop.id or 0), strict=False):
        yield os.fsdecode(name)


def _is_about(document: bytes, drop: Drop) -> bool:
    """Return whether this is a document of a drop; a dropped file may have such a name, too."""
    try:
        value = json.loads(document)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict):
        return False
    return (value.get("drop"), value.get("content_sha256", value.get("sha256"))) == (drop.id, drop.sha256)
