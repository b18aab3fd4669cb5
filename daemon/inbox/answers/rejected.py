"""
Removes what was rejected long ago: the file and its errors in `rejected/`, then its rows in the database.

A file is removed if the errors beside it are those of its drop; what else lies there is somebody's own. The rows go
last, so that a collection that was cut off goes on to the same end.
"""

import os
from contextlib import suppress

from sqlalchemy import BindParameter, Engine, bindparam, func
from sqlmodel import Session, col, delete, select

from daemon.inbox.answers.receipts import ERRORS, home_of
from daemon.inbox.answers.verdict_notes import name_with, owner_of
from daemon.inbox.folders import InboxFolders, InboxUnusable
from daemon.inbox.safe_copy import look
from daemon.settings.model import Settings
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.states import DropState, MessageState
from daemon.state.tables import Drop, Event, Message
from daemon.storage.garbage import Item
from daemon.storage.retention import DAY_MS
from pipeline.words import printable


def collect(engine: Engine, settings: Settings, now: int, *, dry_run: bool = False) -> tuple[Item, ...]:
    """
    Remove what was rejected more than `gc.rejected_days` before `now`, milliseconds since the epoch, and return it.

    With `dry_run` nothing is removed. Safe beside a living daemon. Raises `OSError` or `InboxUnusable` if a file
    cannot be removed, once all others are; its rows stay.
    """
    inbox, days = InboxFolders(settings.inbox_folder), settings.gc.rejected_days
    if not inbox.path.is_dir():  # a disk that is not mounted: without their rows the files would stay for ever
        return ()
    with transaction(engine) as session:
        old = [(drop, owner_of(session, drop)) for drop in _old_drops(session, now - round(days * DAY_MS))]
    gone: dict[int, Item] = {}
    refused: list[OSError | InboxUnusable] = []
    for drop, owner in old:
        why = f"drop {drop.id} was rejected, beyond gc.rejected_days = {days:g}"
        try:
            path, size = _remove(inbox, drop, owner, dry_run=dry_run)
            gone[drop.id or 0] = Item(path=path, why=why, bytes=size)
        except (OSError, InboxUnusable) as error:
            refused.append(error)
    if gone and not dry_run:
        with transaction(engine) as session:
            _forget(session, gone, now)
    if refused:
        raise refused[0]
    return tuple(gone.values())


def _old_drops(session: Session, before: int) -> list[Drop]:
    """Return the drops that were rejected before that moment, but for those that a message will still tell of."""
    # SQLite would give the highest number again.
    latest = select(func.max(Drop.id)).scalar_subquery()
    told = select(Event.drop_id).join(Message).where(Message.state == MessageState.PENDING, Event.drop_id == Drop.id)
    old = select(Drop).where(Drop.state == DropState.REJECTED, Drop.received_at < before, col(Drop.id) < latest)
    return list(session.exec(old.where(~told.exists()).order_by(col(Drop.id))).all())


def _remove(inbox: InboxFolders, drop: Drop, owner: str | None, *, dry_run: bool) -> tuple[str, int]:
    """Remove a drop's file, then its errors; return where the file is, from the inbox on, and the bytes of both."""
    home, size = home_of(drop.track, rejected=True), 0
    folder = inbox.answers_there(*home, user=owner)
    name = folder and name_with(ERRORS, folder, drop)
    if folder and name:
        for one in (name, name + ERRORS):
            with suppress(FileNotFoundError):
                size += look(os.fsencode(one), folder.fd).st_size
                if not dry_run:
                    os.unlink(one, dir_fd=folder.fd)
                    os.fsync(folder.fd)
    return "/".join((inbox.path.name, *home, printable(name or drop.name))), size


def _forget(session: Session, gone: dict[int, Item], now: int) -> None:
    """Remove the rows of drops, with their events and messages."""
    # First, so that the highest number of an event is not one that goes: it would come again.
    reasons, total = {"rejected files": len(gone)}, sum(item.bytes for item in gone.values())
    record_event(session, "garbage_collected", now, bytes=total, items=len(gone), reasons=reasons)
    number: BindParameter[int] = bindparam("number")
    numbers = [{"number": number} for number in gone]
    events = select(Event.id).where(col(Event.drop_id) == number)
    session.connection().execute(delete(Message).where(col(Message.event_id).in_(events)), numbers)
    session.connection().execute(delete(Event).where(col(Event.drop_id) == number), numbers)
    session.connection().execute(delete(Drop).where(col(Drop.id) == number), numbers)
