"""
Restore a backup into a state folder, while no daemon runs.

Only the rows of a backup's database are taken (`rebuild`).

The old database, and folders of runs that the backup does not have as succeeded, go to `backups/replaced-<time>/`;
other files that differ from the backup's are overwritten, all others stay. Links are not touched: they are derived
from the rows afterwards (`promotion.mend_links`). A marker file is in the state folder from the first change
to the last, and no daemon starts while it is there, so that an interrupted restore must be repeated.
"""

import contextlib
import shutil
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from daemon.settings.model import Settings
from daemon.state.database_file import BACKUPS, SCHEMA, open_file, refuse_network
from daemon.state.layout import DATABASE_NAME, LOCK_NAME, RESTORING, WORKER_LOCK
from daemon.state.ownership import require_share
from daemon.state.run_files import open_jobs
from daemon.storage.backup import SIDECARS, Manifest, check, named_files, stamp, succeeded, unreadable_verdicts
from daemon.storage.disk import is_full
from daemon.storage.rebuild import copy_aside, rebuild
from daemon.system.folders import StateFolder, WorkFolder
from daemon.system.processes import FileLock, lock_holder
from daemon.system.programs import user
from pipeline import durable
from pipeline.errors import DropforgeError
from pipeline.words import shell_path

_ACCEPTED = "SELECT track, role, sha256, name FROM \"drop\" WHERE state = 'accepted'"


class Restored(NamedTuple):
    """The result of a restore."""

    manifest: Manifest
    replaced: Path
    """The folder with the database and the runs that were there before."""
    lost: tuple[str, ...]
    """Files that were accepted after the backup was made, as `track/name`: they are in the inbox's `done/`."""
    missing: tuple[str, ...]
    """Files that the restored database names and that are neither in backup nor state folder, or damaged verdicts."""


def refuse_half_restored(root: Path) -> None:
    """Raise `DropforgeError` if a restore into the state folder `root` was interrupted and not repeated."""
    mark = durable.read_json(root / RESTORING)
    if mark is not None:
        hint = f"do it again: dropforge restore {shell_path(mark['backup'])}"
        raise DropforgeError(f"a restore into {root} was cut off", hint)


def restore(settings: Settings, source: Path, *, without_models: bool = False) -> Restored:
    """
    Verify the backup `source`, a folder of `dropforge backup`, and restore it into the state folder of `settings`.

    The old database, and the folders of runs that had not succeeded in the backup, move to `backups/replaced-<time>/`;
    other files of the backup overwrite theirs if they differ. A run that was not over when the backup was made begins
    again, with the current settings. Champions' links are not changed. Raises `DropforgeError` with nothing changed
    while a daemon, worker or job runs, for a backup that is unreadable, damaged (any row) or of another version's
    schema, for a state folder on a network file system or with a link in the place of a folder, and if neither backup
    nor state folder has a champion's model (unless `without_models`). Any error after that (`DropforgeError` for a full
    disk or a backup that changed, else `OSError` or `sqlite3.Error`) means that the restore must be repeated.
    """
    root, work = settings.state_folder, settings.work_folder
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    refuse_network(root)
    require_share(settings)
    with _alone(root, work):
        manifest = _open_backup(source)
        _refuse_links(work, manifest.files)
        lost_models = [
            model
            for model in manifest.champions
            if not (work / model).is_dir() and not any(name.startswith(f"{model}/") for name in manifest.files)
        ]
        if lost_models and not without_models:
            message = f"the champion {lost_models[0]} is neither in the backup nor in {work}"
            raise DropforgeError(message, "put that folder there; or restore without it: --without-models")
        database = root / f".{DATABASE_NAME}.restore.tmp"
        try:
            rebuild(source, database, manifest.files)
            replaced = _put_all_back(root, work, source.absolute(), database, manifest.files)
        except (OSError, sqlite3.Error) as error:
            if not is_full(error):
                raise
            raise _full(work, source, sum(size for size, _ in manifest.files.values())) from error
        finally:
            database.unlink(missing_ok=True)
        missing = [name for name, _ in named_files(work, root / DATABASE_NAME) if not (work / name).exists()]
        missing += [*unreadable_verdicts(work, root / DATABASE_NAME), *lost_models]
        return Restored(manifest, replaced, _lost(replaced, source), tuple(missing))


def _put_all_back(
    root: StateFolder, work: WorkFolder, source: Path, database: Path, files: Mapping[str, tuple[int, str]]
) -> Path:
    """
    Put the files of a backup back while the marker file exists; return the folder of replaced files.

    Other files stay. `database` is moved into place, so it must lie on the state folder's disk.
    """
    durable.write_json(root / RESTORING, {"backup": str(source)})
    replaced = root / BACKUPS / f"replaced-{stamp()}-{uuid.uuid4().hex[:6]}"
    replaced.mkdir(parents=True, mode=0o700)
    _put_runs_aside(root, work, source / DATABASE_NAME, replaced)
    for name, (size, sha256) in files.items():
        if name != DATABASE_NAME:
            _put_back(source / name, work / name, size, sha256)
    _replace_database(root, database, replaced)
    (root / RESTORING).unlink()
    durable.fsync_folder(root)
    return replaced


def _refuse_links(root: Path, names: Iterable[str]) -> None:
    """Raise `DropforgeError` if a folder to restore into is a link, which may lead out of the state folder."""
    for folder in sorted({root / parent for name in names for parent in PurePosixPath(name).parents} - {root}):
        if folder.is_symlink():
            message = f"{folder} is a link to {folder.readlink()}, and a restore writes into the state folder alone"
            raise DropforgeError(message, f"put a folder in its place: rm {shell_path(folder)}")


def _full(root: Path, source: Path, size: int) -> DropforgeError:
    mount = next(place for place in (root.absolute(), *root.absolute().parents) if place.is_mount())
    free = shutil.disk_usage(root).free
    message = f"the disk of the state folder {root} is full ({mount}, {free:,} bytes free): the restore was cut off"
    hint = f"free up to {size:,} bytes on {mount}, then do it again: dropforge restore {shell_path(source)}"
    return DropforgeError(message, hint)


@contextmanager
def _alone(root: StateFolder, work: WorkFolder) -> Iterator[None]:
    """Hold the daemon's lock. Raises `DropforgeError` if a daemon, a worker or a job of a cluster runs."""
    lock = FileLock(root / LOCK_NAME)
    try:
        holder = None if lock.acquire() else lock_holder(root / LOCK_NAME)
        worker = None if holder is not None else lock_holder(root / WORKER_LOCK)
        if holder is not None or worker is not None:
            message = f"a {'daemon' if worker is None else 'worker'} (process {holder or worker}) works on {root}"
            raise DropforgeError(message, "stop it first: systemctl stop dropforge, or Ctrl-C where it runs")
        jobs = open_jobs(work)
        if jobs:
            hint = "start the daemon and cancel that run first; if there is no such job any more, delete this file"
            raise DropforgeError(f"a job of the cluster may still write next to {jobs[0]}", hint)
        yield
    finally:
        lock.release()


def _open_backup(source: Path) -> Manifest:
    """Verify a backup and return its manifest. Raises `DropforgeError`, also for the schema of another version."""
    try:
        if not source.is_dir():
            hint = "name a folder that `dropforge backup` made, by its whole path: dropforge restore /mnt/monday"
            raise DropforgeError(f"there is no backup {source.absolute()}", hint)
        manifest = check(source)
    except PermissionError as error:
        hint = f"let it, and enter the folders above: chown -R {user()} {source.absolute()}"
        raise DropforgeError(f"user {user()} may not read {Path(error.filename).absolute()}", hint) from error
    if manifest.schema_version != SCHEMA:
        message = f"the backup {source} has another version's schema: {manifest.schema_version}"
        raise DropforgeError(message, "install the version that made it")
    return manifest


def _put_runs_aside(root: StateFolder, work: WorkFolder, database: Path, replaced: Path) -> None:
    """
    Move the folders of runs that have not succeeded in the backup, and the worker's spool, to `replaced`.

    The folders of runs go to the folder of that name in `work`: a rename stays on one disk.
    """
    over = {str(run) for run in succeeded(database)}
    runs = work / replaced.relative_to(root) / "runs"
    runs.mkdir(parents=True, mode=0o700)
    later = [folder for folder in (work / "runs").glob("*") if folder.name not in over]
    for folder in later:
        folder.rename(runs / folder.name)
    with contextlib.suppress(FileNotFoundError):
        (root / "spool").rename(replaced / "spool")
    durable.fsync_folder(root)
    durable.fsync_folder(work)


def _put_back(source: Path, target: Path, size: int, sha256: str) -> None:
    """Copy a file of the backup to `target`, unless it has this size and sha256. Raises `DropforgeError`, `OSError`."""
    if target.is_file() and target.stat().st_size == size and durable.sha256_file(target) == sha256:
        return
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    copy_aside(source, target, sha256).rename(target)
    durable.fsync_folder(target.parent)


def _replace_database(root: Path, database: Path, replaced: Path) -> None:
    path = root / DATABASE_NAME
    # As it is: it may be damaged, which may be why somebody restores. Nobody has it open.
    for suffix in ("", *SIDECARS):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(f"{path}{suffix}", replaced / f"{DATABASE_NAME}{suffix}")
    durable.fsync_tree(replaced)
    # Before the new file has the name: SQLite would apply the old one's journal to it.
    for suffix in SIDECARS:
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    durable.fsync_folder(root)
    database.rename(path)
    durable.fsync_folder(root)


def _lost(replaced: Path, source: Path) -> tuple[str, ...]:
    """Return the accepted drops of the old database that the backup lacks, as `track/name`; empty if unreadable."""
    try:
        with (
            closing(open_file(replaced / DATABASE_NAME, "rw")) as before,
            closing(open_file(source / DATABASE_NAME)) as after,
        ):
            known = {row[:3] for row in after.execute(_ACCEPTED)}
            return tuple(f"{row[0]}/{row[3]}" for row in before.execute(_ACCEPTED) if row[:3] not in known)
    except sqlite3.DatabaseError:
        return ()
