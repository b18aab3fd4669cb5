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
from functools import cached_property
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
from pipeline.steps import STEPS

#: Steps whose artifact names files that are collected; report and verdict of a succeeded run are kept.
_WITH_FILES = ("merge", "train", "prepare")
_STEPS = tuple(step.name for step in reversed(STEPS))
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


# --- what is not kept


def find_garbage(session: Session, settings: Settings, kept: Kept, now: int) -> Iterator[Item]:
    """
    Yield the models and working files that are not in `kept`, and delete nothing.

    Files that the database does not know are included if older than a day, and the oldest cached predictions beyond
    2 GB, but for those of champions and open runs. `now` is in ms since the epoch.
    """
    finder = _Finder(session, settings, kept, now)
    yield from finder.cut_off()
    yield from finder.models()
    for run in kept.ended:
        yield from finder.run(run)
    yield from finder.unknown_runs()
    yield from finder.predictions()


class _Finder:
    """Searches one state folder for files that are not kept."""

    def __init__(self, session: Session, settings: Settings, kept: Kept, now: int) -> None:
        self._session = session
        self._root = settings.work_folder
        self._limit = f"gc.keep_models = {settings.gc.keep_models}"
        self._kept = kept
        self._now = now

    def cut_off(self) -> Iterator[Item]:
        for path in sorted((self._root / TRASH_NAME).glob("*")):
            yield self._item(path, "collected before, but its deletion was cut off")

    def models(self) -> Iterator[Item]:
        for path in sorted((self._root / "models").glob("*")):
            runs = self._makers.get(path.name, [])
            if self._kept.holds(path) or (not runs and (self._kept.damaged or not self._is_old(path))):
                continue
            why = self._why(runs[0]) if runs else "a model that no run made"
            references = [name for run in runs for name in self._references(run)]
            yield self._item(path, why, references)

    def run(self, run: Ended) -> Iterator[Item]:
        """Yield the working files of an ended run; if it is kept and succeeded, only files that no artifact names."""
        if run.id not in self._kept.runs:
            for path in run.working:
                yield self._item(path, self._why(run), self._references(run))
        elif run.state == RunState.SUCCEEDED:
            for path in run.working:
                if not self._kept.holds(path):
                    yield self._item(path, f"run {run.id} has ended and nothing refers to it")

    def unknown_runs(self) -> Iterator[Item]:
        known = set(map(str, self._session.exec(select(Run.id))))
        for path in sorted((self._root / "runs").glob("*")):
            if path.name not in known and self._is_old(path):
                yield self._item(path, "of a run that the database does not know")

    def predictions(self) -> Iterator[Item]:
        """Yield the oldest cached predictions beyond 2 GB in total, never those of champions and open runs."""
        used: set[str] = set()
        for run_id in self._kept.champion_runs | self._kept.open_runs:
            keys = read_object(self._root / f"runs/{run_id}/evaluate.json").get("prediction_keys")
            used.update(map(str, keys.values()) if isinstance(keys, dict) else ())
        files = {path: [file.lstat() for file in path.glob("*")] for path in (self._root / "predictions").glob("*")}
        total = sum(stat.st_size for stats in files.values() for stat in stats)
        by_age = sorted(files, key=lambda path: (max((stat.st_mtime for stat in files[path]), default=0), path.name))
        for path in by_age:
            if total > PREDICTIONS_BYTES and path.name not in used:
                total -= sum(stat.st_size for stat in files[path])
                yield self._item(path, f"cached predictions beyond {PREDICTIONS_BYTES:,} bytes")

    # --- small parts

    @cached_property
    def _makers(self) -> dict[str, list[Ended]]:
        """Model name → ended runs that made it."""
        makers: dict[str, list[Ended]] = {}
        for run in self._kept.ended:
            for name in run.models:
                makers.setdefault(name, []).append(run)
        return makers

    def _references(self, run: Ended) -> list[str]:
        # A run without a verdict may be retried: it must not skip a step whose files are gone.
        steps = _WITH_FILES if run.state == RunState.SUCCEEDED else _STEPS
        return [f"runs/{run.id}/{step}.json" for step in steps]

    def _why(self, run: Ended) -> str:
        outcome = self._session.exec(select(Run.outcome).where(Run.id == run.id)).one()
        return f"run {run.id}: {outcome or run.state}, beyond {self._limit}"

    def _is_old(self, path: Path) -> bool:
        info = path.lstat()
        return self._now - 1000 * max(info.st_mtime, info.st_ctime) > DAY_MS

    def _item(self, path: Path, why: str, references: Iterable[str] = ()) -> Item:
        relative = path.relative_to(self._root).as_posix()
        return Item(path=relative, why=why, bytes=tree_bytes(path), references=tuple(references))
