"""
Delete files that are no longer needed: models that lost, files of ended runs, old cached predictions.

The database alone decides which files are kept; files unknown to it are collected when older than a day. Nothing is
deleted in place. They are searched for while others may write. Then, while no promotion, claim or publication can
happen, all that came into use is left out, the published artifact that refers to a file is renamed, and the file is
moved into the trash, which is emptied afterwards. If a collection is killed, the next one completes it. Stored drops,
and files outside of the state folder, are never touched.
"""

import contextlib
import fcntl
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Engine

from daemon.settings.model import Settings
from daemon.state.database import open_reader, transaction
from daemon.state.events import record_event
from daemon.state.layout import GC_LOCK_NAME, TRASH_NAME
from daemon.state.run_files import attempt_folder
from daemon.state.tables import Attempt
from daemon.storage.garbage import Item, find_garbage
from daemon.storage.retention import leftovers, what_is_in_use, what_is_kept
from daemon.system.folders import StateFolder, WorkFolder
from pipeline import durable
from pipeline.artifacts import Frozen


class Collected(Frozen):
    """The files that a collection removed, or would remove (`dry_run`)."""

    dry_run: bool
    items: tuple[Item, ...]
    bytes: int
    """Bytes given back."""


def collect(
    engine: Engine, settings: Settings, now: int, *, dry_run: bool = False, cleared: set[tuple[int, int]] | None = None
) -> Collected:
    """
    Delete the files that `find_garbage` finds, record an event if there were any, and return them.

    With `dry_run` they are only returned. `now` is in milliseconds since the epoch. `cleared`, if given, are the ended
    runs without files that earlier calls found, which makes this one quicker; it is updated. Safe while a daemon runs;
    waits while another collection or a publication holds the lock (`collecting`). Unless `dry_run`, raises the first
    error after all others were removed: `OSError` if a file cannot be moved or deleted, `DropforgeError` if the folder
    of a run cannot be read.
    """
    root, refused = settings.work_folder, list[Exception]()
    with transaction(open_reader(engine.get_execution_options()["path"])) as session:
        kept = what_is_kept(session, settings, now, set() if cleared is None else cleared)
        items = list(find_garbage(session, settings, kept, now))
    refused += kept.damaged
    if items and not dry_run:
        refused += _empty_trash(root)  # on a full disk it may have no block for one more name
        with collecting(settings.state_folder), transaction(engine) as session:
            used = what_is_in_use(session, settings)
            items = [item for item in items if not used.holds(root / item.path)]
            refused += _throw_all_away(root, items)
    collected = Collected(dry_run=dry_run, items=tuple(items), bytes=sum(item.bytes for item in items))
    if not dry_run:
        if items:
            with transaction(engine) as session:
                reasons, number = Counter(item.why for item in items), len(items)
                record_event(session, "garbage_collected", now, bytes=collected.bytes, items=number, reasons=reasons)
        refused += _empty_trash(root)
        if refused:
            raise refused[0]
    return collected


def clear_attempt(work_folder: WorkFolder, attempt: Attempt) -> None:
    """
    Delete the `leftovers` of an attempt that ended without a result: data, adapters, models; not its spec and log.

    Nothing is deleted for `evaluate` and `judge`: the next attempt resumes from the predictions and replies. Safe to
    repeat; a folder that cannot be deleted is left to a later collection.
    """
    if attempt.step in {"evaluate", "judge"}:
        return
    for path in leftovers(work_folder / attempt_folder(attempt.run_id, attempt.step, attempt.number)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def collecting(state_folder: StateFolder) -> Iterator[None]:
    """
    Hold the lock that keeps a collection and the publication of a result from running at the same time.

    Waits until it is free. It cannot be taken twice: `collect`, which takes it, must not be called within.
    """
    fd = os.open(state_folder / GC_LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _empty_trash(work_folder: Path) -> list[OSError]:
    """Delete all in the trash, if it exists; return the errors of the entries that cannot be deleted."""
    trash, refused = work_folder / TRASH_NAME, []
    for path in list(trash.iterdir()) if trash.is_dir() else ():
        try:
            _delete(path)
        except OSError as error:
            refused.append(error)
    return refused


def _delete(path: Path) -> None:
    # Another collection may delete it at the same time.
    while os.path.lexists(path):
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _throw_all_away(root: Path, items: list[Item]) -> list[OSError]:
    """Move items into the trash; remove those that fail from `items` and return their errors."""
    refused = []
    for item in list(items):
        try:
            _throw_away(root, item)
        except OSError as error:
            items.remove(item)
            refused.append(error)
    return refused


def _throw_away(root: Path, item: Item) -> None:
    """Rename the artifacts that refer to an item to `.removed.json`, then move the item into the trash."""
    place = root / item.path
    trash = root / TRASH_NAME
    if place.parent == trash:
        return
    for reference in item.references:
        path = root / reference
        if path.exists():
            path.rename(path.with_name(f"{path.stem}.removed.json"))
            durable.fsync_folder(path.parent)
    trash.mkdir(mode=0o700, exist_ok=True)
    place.rename(trash / uuid.uuid4().hex)
    durable.fsync_folder(place.parent)
