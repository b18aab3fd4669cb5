"""
Delete old rejected drops: the file and its error list in `rejected/`, then the rows in the database.

A file is deleted only if the error list next to it belongs to its drop; other files there are left alone. The rows are
deleted last, so that an interrupted collection can be repeated.
"""

import os
from contextlib import suppress

from sqlalchemy import BindParameter, Engine, bindparam, func
from sqlmodel import Session, col, delete, select

from daemon.inbox.answers.receipts import ERRORS, home_of
from daemon.inbox.answers.verdict_notes import name_with
from daemon.inbox.folders import InboxFolders, InboxUnusable
from daemon.inbox.safe_copy import look
from daemon.settings.model import Settings
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.states import DropState, MessageState
from daemon.state.tables import Drop, Event, Message
from daemon.storage.gc import Item
from daemon.storage.retention import DAY_MS
from pipeline.words import printable


def collect(engine: Engine, settings: Settings, now: int, *, dry_run: bool = False) -> tuple[Item, ...]:
    """
    Delete rejected drops received over `gc.rejected_days` before `now`, in ms; return an item for each, oldest first.

    Deleted are the drop's row, events and messages, and, if the error list is found, this and the file; an event
    records the sum. The newest drop, and drops with a message still to be sent, are kept. With `dry_run` nothing is
    deleted. Safe while a daemon runs. Returns an empty tuple if there is no inbox. If files cannot be deleted, their
    drops stay, and the first `OSError` or `InboxUnusable` is raised after all others were deleted.
    """
    inbox, days = InboxFolders(settings.inbox_folder), settings.gc.rejected_days
    if not inbox.path.is_dir():  # a disk that is not mounted: without their rows the files would stay for ever
        return ()
    with transaction(engine) as session:
        old = _old_drops(session, now - round(days * DAY_MS))
    gone: dict[int, Item] = {}
    refused: list[OSError | InboxUnusable] = []
    for drop in old:
        why = f"drop {drop.id} was rejected, beyond gc.rejected_days = {days:g}"
        try:
            path, size = _remove(inbox, drop, dry_run=dry_run)
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
    """Return rejected drops received before `before` (ms), by id, save the newest and those with pending messages."""
    # Not the drop with the highest id: SQLite would assign that id again.
    latest = select(func.max(Drop.id)).scalar_subquery()
    to_send = select(Event.drop_id).join(Message).where(Message.state == MessageState.PENDING, Event.drop_id == Drop.id)
    old = select(Drop).where(Drop.state == DropState.REJECTED, Drop.received_at < before, col(Drop.id) < latest)
    return list(session.exec(old.where(~to_send.exists()).order_by(col(Drop.id))).all())


def _remove(inbox: InboxFolders, drop: Drop, *, dry_run: bool) -> tuple[str, int]:
    """
    Delete a drop's file, then its error list; return the file's path, from the inbox on, and the bytes of both.

    Without an error list of this drop nothing is deleted, and the bytes are 0.
    """
    home, size = home_of(drop), 0
    folder = inbox.answers_there(*home, user=drop.owner)
    name = folder and name_with(ERRORS, folder, drop)
    if folder and name:
        for file in (name, name + ERRORS):
            with suppress(FileNotFoundError):
                size += look(os.fsencode(file), folder.fd).st_size
                if not dry_run:
                    os.unlink(file, dir_fd=folder.fd)
                    os.fsync(folder.fd)
    return "/".join((inbox.path.name, *home, printable(name or drop.name))), size


def _forget(session: Session, gone: dict[int, Item], now: int) -> None:
    """Delete the rows of the drops in `gone` with their events and messages, and record one event about it."""
    # Recorded first: if the event with the highest id were deleted, SQLite would assign that id again.
    reasons, total = {"rejected files": len(gone)}, sum(item.bytes for item in gone.values())
    record_event(session, "garbage_collected", now, bytes=total, items=len(gone), reasons=reasons)
    number: BindParameter[int] = bindparam("number")
    numbers = [{"number": number} for number in gone]
    events = select(Event.id).where(col(Event.drop_id) == number)
    session.connection().execute(delete(Message).where(col(Message.event_id).in_(events)), numbers)
    session.connection().execute(delete(Event).where(col(Event.drop_id) == number), numbers)
    session.connection().execute(delete(Drop).where(col(Drop.id) == number), numbers)
