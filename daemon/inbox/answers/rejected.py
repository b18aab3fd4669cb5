"""
Collects what was rejected long ago: the file and its answers in `rejected/`, then its rows in the database.

Only what the rows name is looked for, and removed only if it is what the daemon put there: the file that was recorded,
and the errors that were written for its drop. What a person put under such a name stays. The rows go last, so that a
collection that was cut off goes on to the same end.
"""

import json
import os
from contextlib import suppress

from sqlalchemy import Engine, func
from sqlmodel import Session, col, delete, select

from daemon.inbox.answers import own_files
from daemon.inbox.answers.receipts import ERRORS, home_of
from daemon.inbox.answers.verdict_notes import first_event, names_of, owner_of
from daemon.inbox.folders import Folder, InboxFolders, InboxUnusable
from daemon.inbox.safe_copy import look
from daemon.settings.model import Settings
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.states import DropState, MessageState
from daemon.state.tables import Drop, Event, Message
from daemon.storage.garbage import Item
from daemon.storage.retention import DAY_MS
from pipeline.wording import printable

#: Bytes of a document of errors: an earlier version wrote them without a limit.
_LARGEST = 1 << 28
#: Drops whose rows go in one transaction, which others wait for.
_AT_ONCE = 200
#: A drop with its owner, and what told its file from others when it was recorded.
_Old = tuple[Drop, str | None, str]


def collect(engine: Engine, settings: Settings, now: int, *, dry_run: bool = False) -> tuple[Item, ...]:
    """
    Remove what was rejected more than `gc.rejected_days` before `now`, milliseconds since the epoch, and say what.

    With `dry_run` nothing is removed. Safe beside a living daemon. Raises `OSError` or `InboxUnusable` if a file
    cannot be removed, once all others are; its rows stay.
    """
    inbox, days = InboxFolders(settings.inbox_folder), settings.gc.rejected_days
    items: list[Item] = []
    refused: list[OSError | InboxUnusable] = []
    after = 0
    while inbox.path.is_dir():  # or the files would stay for ever, as on a disk that is not mounted now
        with transaction(engine) as session:
            old = _old_ones(session, now - round(days * DAY_MS), after)
        if not old:
            break
        after, gone = old[-1][0].id or 0, dict[int, Item]()
        for one in old:
            try:
                gone[one[0].id or 0] = _removed(inbox, one, days, dry_run=dry_run)
            except (OSError, InboxUnusable) as error:
                refused.append(error)
        items += gone.values()
        if gone and not dry_run:
            with transaction(engine) as session:
                _forget(session, gone, now)
    if refused:
        raise refused[0]
    return tuple(items)


def _old_ones(session: Session, before: int, after: int) -> list[_Old]:
    """Return the next drops that were rejected before that moment; none that a message is still about to tell of."""
    # SQLite would give the highest number again.
    latest = select(func.max(Drop.id)).scalar_subquery()
    told = select(Event.drop_id).join(Message).where(Message.state == MessageState.PENDING, Event.drop_id == Drop.id)
    asked = select(Drop).where(Drop.state == DropState.REJECTED, Drop.received_at < before, col(Drop.id) > after)
    asked = asked.where(col(Drop.id) < latest, ~told.exists()).order_by(col(Drop.id)).limit(_AT_ONCE)
    drops = session.exec(asked).all()
    return [(drop, owner_of(session, drop), str(first_event(session, drop).get("source"))) for drop in drops]


def _removed(inbox: InboxFolders, old: _Old, days: float, *, dry_run: bool) -> Item:
    """Remove a drop's file and then its errors, where they are found, and say what went."""
    drop, owner, source = old
    home = home_of(drop.track, rejected=True)
    size, shown, folder = 0, drop.name, inbox.answers_there(*home, user=owner)
    for name in names_of(drop):
        if folder is None:
            break
        ours = _ours(folder, name, drop, source)
        for one in ours:
            size += look(os.fsencode(one), folder.fd).st_size
            if not dry_run:
                os.unlink(one, dir_fd=folder.fd)
        if ours:
            shown = printable(name)
            os.fsync(folder.fd)
            break
    why = f"drop {drop.id} was rejected, beyond gc.rejected_days = {days:g}"
    return Item(path="/".join((inbox.path.name, *home, shown)), why=why, bytes=size)


def _ours(folder: Folder, name: str, drop: Drop, source: str) -> list[str]:
    """Return the names of a drop's file and errors, if filed away as `name`; a link is looked at, not followed."""
    found = []
    with suppress(FileNotFoundError):
        info = look(os.fsencode(name), folder.fd)
        # By the identity that was recorded, but for the ctime, which moving the file has changed.
        if [str(info.st_ino), str(info.st_size)] == source.split(":")[::2]:
            found.append(name)
    document = own_files.read(folder, name + ERRORS, _LARGEST)
    with suppress(ValueError, RecursionError):
        value = json.loads(document or b"")
        if isinstance(value, dict) and (value.get("drop"), value.get("sha256")) == (drop.id, drop.sha256):
            found.append(name + ERRORS)
    return found


def _forget(session: Session, gone: dict[int, Item], now: int) -> None:
    """Remove the rows of drops, with their events and what was sent of them."""
    # First, so that the highest number of an event is not one that goes: it would come again.
    reasons = {"rejected files": len(gone)}
    total = sum(item.bytes for item in gone.values())
    record_event(session, "garbage_collected", now, bytes=total, items=len(gone), reasons=reasons)
    events = select(Event.id).where(col(Event.drop_id).in_(gone))
    session.exec(delete(Message).where(col(Message.event_id).in_(events)))
    session.exec(delete(Event).where(col(Event.drop_id).in_(gone)))
    session.exec(delete(Drop).where(col(Drop.id).in_(gone)))
