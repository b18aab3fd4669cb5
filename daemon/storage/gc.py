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
from collections.abc import Iterable, Iterator
from pathlib import Path

from sqlalchemy import Engine
from sqlmodel import Session, select

from daemon.settings.model import Settings
from daemon.state.database import open_reader, transaction
from daemon.state.events import record_event
from daemon.state.layout import GC_LOCK_NAME, TRASH_NAME
from daemon.state.run_files import attempt_folder
from daemon.state.states import RunState
from daemon.state.tables import Attempt, Run
from daemon.storage.retention import DAY_MS, Ended, Kept, leftovers, tree_bytes, what_is_in_use, what_is_kept
from daemon.system.folders import StateFolder, WorkFolder
from pipeline import durable
from pipeline.artifacts import Frozen
from pipeline.durable import read_object

#: Most bytes of cached predictions that are kept.
PREDICTIONS_BYTES = 2_000_000_000


class Item(Frozen):
    """One file or folder that is no longer needed."""

    path: str
    """Relative to the work folder; of a rejected file, to the folder of the inbox."""
    why: str
    bytes: int
    references: tuple[str, ...] = ()
    """Published artifacts that lead to it, in the order in which they are renamed."""


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
    Empty the trash, delete the files that `find_garbage` finds, record an event if there were any, and return them.

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
            for item in list(items):
                try:
                    _throw_away(root, item)
                except OSError as error:
                    items.remove(item)
                    refused.append(error)
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
    Delete the `leftovers` of an attempt of which nothing was published: data, adapters, models; not its spec and log.

    Nothing is deleted for `evaluate` and `judge`: the next attempt resumes from the predictions and replies. Safe to
    repeat; what cannot be deleted is left to a later collection.
    """
    if attempt.step in {"evaluate", "judge"}:
        return
    for path in leftovers(work_folder / attempt_folder(attempt.run_id, attempt.step, attempt.number)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


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


def _throw_away(root: Path, item: Item) -> None:
    """Rename the artifacts that refer to an item to `.removed.json`, then move it into the trash, if not there yet."""
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


# --- what is not kept


def find_garbage(session: Session, settings: Settings, kept: Kept, now: int) -> Iterator[Item]:
    """
    Yield what lies in the trash, then the models and working files that are not in `kept`; delete nothing.

    Files that the database does not know are included if older than a day, and the oldest cached predictions beyond
    2 GB, but for those of champions and open runs. `now` is in ms since the epoch.
    """
    root: Path = settings.work_folder
    beyond = f"beyond gc.keep_models = {settings.gc.keep_models}"
    for path in sorted((root / TRASH_NAME).glob("*")):
        yield _item(root, path, "collected before, but its deletion was cut off")
    yield from _models(root, kept, now, beyond)
    for run in kept.ended:
        for path in run.working:
            if run.id not in kept.runs:
                yield _item(root, path, f"run {run.id}: {run.outcome or run.state}, {beyond}", run.references)
            elif run.state == RunState.SUCCEEDED and not kept.holds(path):
                yield _item(root, path, f"run {run.id} has ended and nothing refers to it")
    known = set(map(str, session.exec(select(Run.id))))
    for path in sorted((root / "runs").glob("*")):
        if path.name not in known and _is_old(path, now):
            yield _item(root, path, "of a run that the database does not know")
    yield from _predictions(root, kept)


def _models(root: Path, kept: Kept, now: int, beyond: str) -> Iterator[Item]:
    makers: dict[str, list[Ended]] = {}
    for run in kept.ended:
        for name in run.models:
            makers.setdefault(name, []).append(run)
    for path in sorted((root / "models").glob("*")):
        runs = makers.get(path.name, [])
        if kept.holds(path) or (not runs and (kept.damaged or not _is_old(path, now))):
            continue
        why = f"run {runs[0].id}: {runs[0].outcome or runs[0].state}, {beyond}" if runs else "a model that no run made"
        yield _item(root, path, why, [name for run in runs for name in run.references])


def _predictions(root: Path, kept: Kept) -> Iterator[Item]:
    """Yield the oldest cached predictions beyond 2 GB in total, never those of champions and open runs."""
    used: set[str] = set()
    for run_id in kept.champion_runs | kept.open_runs:
        keys = read_object(root / f"runs/{run_id}/evaluate.json").get("prediction_keys")
        used.update(map(str, keys.values()) if isinstance(keys, dict) else ())
    files = {path: [file.lstat() for file in path.glob("*")] for path in (root / "predictions").glob("*")}
    total = sum(stat.st_size for stats in files.values() for stat in stats)
    by_age = sorted(files, key=lambda path: (max((stat.st_mtime for stat in files[path]), default=0), path.name))
    for path in by_age:
        if total > PREDICTIONS_BYTES and path.name not in used:
            total -= sum(stat.st_size for stat in files[path])
            yield _item(root, path, f"cached predictions beyond {PREDICTIONS_BYTES:,} bytes")


def _is_old(path: Path, now: int) -> bool:
    info = path.lstat()
    return now - 1000 * max(info.st_mtime, info.st_ctime) > DAY_MS


def _item(root: Path, path: Path, why: str, references: Iterable[str] = ()) -> Item:
    relative = path.relative_to(root).as_posix()
    return Item(path=relative, why=why, bytes=tree_bytes(path), references=tuple(references))
