"""
Back up the state folder while the daemon may write to it; `restore` puts a backup back.

    BACKUP/manifest.json     written last: schema, rows by table, size and sha256 of every file
    BACKUP/dropforge.db      the database, verified
    BACKUP/drops/            the files of its accepted, proposed, withdrawn and suspended drops
    BACKUP/runs/<id>/*.json  what its succeeded runs published: verdicts and numbers
    BACKUP/runs/<id>/attempts/decide-<n>/report/  their evidence cards
    BACKUP/models/<id>/      the merged models that are champion or previous, or wait for approval, if asked for

Files are copied, not linked: a backup that shares its bytes with the original shares their damage. Not in a backup:
checkpoints and logs, so a run that was not over begins again from its drops.

A backup lies on disks that others write to. So before anything in it is copied or followed, each name in it must be
relative and stay below the root, and no file may be a link or a device; `restore` lets the tables judge its rows.
"""

import contextlib
import hashlib
import os
import shutil
import socket
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from daemon.settings.model import Settings
from daemon.state.database_file import BACKUPS, copy_database, schema_of, verify
from daemon.state.layout import DATABASE_NAME
from daemon.state.ownership import require_share
from daemon.system.folders import StateFolder, WorkFolder
from daemon.system.processes import FileLock
from daemon.system.programs import user
from pipeline import durable
from pipeline.artifacts import JSON_NAME, PAGE_NAME, Frozen
from pipeline.durable import read_object
from pipeline.errors import DropforgeError

MANIFEST = "manifest.json"
#: Endings of SQLite's files next to an open database.
SIDECARS = ("-journal", "-wal", "-shm")
_JOURNALS = {f"{DATABASE_NAME}{suffix}" for suffix in SIDECARS[:2]}
#: Largest manifest, verdict or card, in bytes: they are read whole.
_MOST_BYTES = durable.MOST_BYTES
_LOCK = "backup.lock"
_ANOTHER = "use another backup, each is a folder that `dropforge backup` made"
_KEPT_FILES = "SELECT DISTINCT sha256, quarantined FROM \"drop\" WHERE state NOT IN ('rejected', 'duplicate')"
#: Folders of the models of wins that wait for approval.
_AWAITED = """
SELECT 'models/' || json_extract(verdict, '$.candidate_model_id') AS path FROM run
WHERE outcome = 'awaiting_approval' AND length(path) = 71 AND path NOT GLOB 'models/*[^0-9a-f]*'
"""
#: Of each track: the current champion, and the champion that a rollback would restore.
_CHAMPIONS = """
SELECT champion_path FROM track WHERE champion_path LIKE 'models/%'
UNION SELECT p.previous_path FROM promotion p JOIN track t ON t.name = p.track AND t.champion_generation = p.generation
WHERE p.previous_path LIKE 'models/%'
"""


class Manifest(Frozen):
    """The contents of a backup: its `manifest.json`."""

    version: int = 1
    made_at: str
    """UTC, ISO 8601."""
    schema_version: int
    counts: dict[str, int]
    """Rows of the database by table."""
    champions: tuple[str, ...]
    """Folders of the current and previous champions' merged models, relative to the work folder."""
    with_models: bool
    missing: tuple[str, ...]
    """Files that the database names and that were missing or had another hash, and damaged verdicts."""
    files: dict[str, tuple[int, str]]
    """Size and sha256 of every other file, by its path below the backup."""


class Made(NamedTuple):
    """A finished backup: its folder and manifest."""

    folder: Path
    manifest: Manifest


def make(settings: Settings, target: Path | None = None, *, with_models: bool = False) -> Made:
    """
    Back up the state folder to `target`, or to a new folder in `target` if that exists; the daemon may be running.

    Without a target the backup is made in `backups/` of the state folder. With `with_models` it includes the models of
    current and previous champions and of wins that wait for approval. It gets its name only after all of it is durable
    and verified; a failed backup leaves nothing. Files that the database names and that are missing are no error: the
    manifest lists them. Raises `DropforgeError` if there is no database or only an empty one, `target` is unusable, or
    another backup of this folder is being made, `DatabaseUnusable` if the database is damaged or cannot be copied,
    `OSError` if another file cannot be copied.
    """
    root = settings.state_folder
    if not (root / DATABASE_NAME).exists():
        message = f"there is nothing to back up in {root}: no daemon ever ran there"
        raise DropforgeError(message, "name the settings of the right one: dropforge --config FILE backup")
    require_share(settings)
    lock = FileLock(root / _LOCK)
    if not lock.acquire():
        raise DropforgeError("another backup of this state folder is being made", "wait for it, then try again")
    with contextlib.ExitStack() as ended:
        ended.callback(lock.release)
        try:
            final, aside = _paths(root, target)
            # The remains of a killed backup: while we hold the lock no other backup of this state folder is being made.
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(mode=0o700)
        except PermissionError as error:
            message = f"user {user()} may not make {Path(error.filename).absolute()}"
            example = "/srv/dropforge-backups"
            hint = f"name a folder of its own: install -d -o {user()} -m 700 {example}; dropforge backup {example}"
            raise DropforgeError(message, hint) from error
        ended.callback(shutil.rmtree, aside, ignore_errors=True)
        manifest = _fill(aside, root, settings.work_folder, with_models=with_models)
        check(aside)
        durable.fsync_tree(aside)
        aside.rename(final)
        durable.fsync_folder(final.parent)
    return Made(final, manifest)


def check(folder: Path) -> Manifest:
    """
    Verify a backup, the hash of every file in its manifest and the number of rows by table, and return the manifest.

    Raises `DropforgeError` for the first thing that is wrong, `OSError` if a folder cannot be entered. Other files and
    the version of the schema are not checked. Nothing is followed or trusted before: others may write to a backup.
    """
    # Before the manifest is opened: it may be a FIFO, or too large.
    _refuse_other_kinds(folder)
    try:
        manifest = Manifest.model_validate(durable.read_json(folder / MANIFEST))
    except (ValueError, OSError) as error:
        raise DropforgeError(f"{folder} is no whole backup: it has no readable {MANIFEST}", _ANOTHER) from error
    for name in (*manifest.files, *manifest.champions):
        if not _is_below(name):
            raise refusal(f"{folder} names a file that no backup holds: {name!r}")
    for name, seen in manifest.files.items():
        whole = False
        with contextlib.suppress(OSError):  # it is missing or cannot be read
            whole = _seen(folder / name) == seen
        if not whole:
            raise DropforgeError(f"the backup is damaged: {folder / name} is missing or has changed", _ANOTHER)
    database = folder / DATABASE_NAME
    if DATABASE_NAME not in manifest.files or verify(database) != manifest.counts:
        raise DropforgeError(f"the backup is damaged: {database} has not the rows that were backed up", _ANOTHER)
    return manifest


def _refuse_other_kinds(folder: Path) -> None:
    """Raise `DropforgeError` for a link, FIFO, device, document too large to be read whole, or database's journal."""
    for directory, folders, files in os.walk(folder):
        for path in (Path(directory, name) for name in (*folders, *files)):
            info = path.lstat()
            if not stat.S_ISDIR(info.st_mode) and not stat.S_ISREG(info.st_mode):
                raise refusal(f"{path} is a link, FIFO or device, not a file")
            if path.suffix in {".json", ".html"} and info.st_size > _MOST_BYTES:
                raise refusal(f"{path} has more than {_MOST_BYTES:,} bytes")
            if path.name in _JOURNALS and info.st_size:
                raise refusal(f"{path} lies next to the database, so {DATABASE_NAME} is only a part of it")


def _is_below(name: str) -> bool:
    return name.isprintable() and all(part not in {"", ".", ".."} for part in name.split("/"))


def refusal(message: str) -> DropforgeError:
    """Return the error, to be raised, for a backup that somebody changed."""
    return DropforgeError(message, f"somebody changed it; {_ANOTHER}")


def stamp() -> str:
    """Return the current time in UTC as a part of file names: 20260131T020000Z."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())


def _paths(root: Path, target: Path | None) -> tuple[Path, Path]:
    """
    Return the path of the new backup and a temporary one, by host and state folder: several may keep backups there.

    Creates `backups/` if `target` is `None`. Raises `DropforgeError` if the backup exists or its parent does not.
    """
    name = f"dropforge-{stamp()}"
    if target is None:
        (root / BACKUPS).mkdir(mode=0o700, exist_ok=True)
        final = root / BACKUPS / name
    else:
        final = target.absolute() / name if target.is_dir() else target.absolute()
    if final.exists() or not final.parent.is_dir():
        why = "is there already" if final.exists() else "has no folder above it"
        message = f"no backup can be made at {final}: it {why}"
        raise DropforgeError(message, "name a folder that is there, or a new one in it: dropforge backup /mnt/monday")
    whose = hashlib.sha256(f"{socket.gethostname()}:{root.resolve()}".encode("utf-8", "surrogateescape"))
    return final, final.with_name(f".dropforge-{whose.hexdigest()[:16]}.tmp")


def _fill(aside: Path, root: StateFolder, work: WorkFolder, *, with_models: bool) -> Manifest:
    # The database first: a file that its rows name was durable before they were committed.
    counts = copy_database(root / DATABASE_NAME, aside / DATABASE_NAME)
    schema = schema_of(aside / DATABASE_NAME)
    if not schema:
        message = f"{root / DATABASE_NAME} has no tables: a daemon is at its first start"
        raise DropforgeError(message, "try again when it is ready")
    files = {DATABASE_NAME: _seen(aside / DATABASE_NAME)}
    missing = []
    for name, expected in named_files(work, aside / DATABASE_NAME, with_models=with_models):
        if not (work / name).is_file():
            missing.append(name)
            continue
        (aside / name).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        shutil.copyfile(work / name, aside / name)
        files[name] = _seen(aside / name)
        if expected not in {None, files[name][1]}:
            missing.append(name)
    missing.extend(unreadable_verdicts(work, aside / DATABASE_NAME))
    manifest = Manifest(
        made_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        schema_version=schema,
        counts=counts,
        champions=champions(aside / DATABASE_NAME),
        with_models=with_models,
        missing=tuple(missing),
        files=files,
    )
    durable.write_json(aside / MANIFEST, manifest.model_dump(mode="json"))
    return manifest


def named_files(root: Path, database: Path, *, with_models: bool = False) -> Iterator[tuple[str, str | None]]:
    """
    Yield the paths, relative to `root`, of the files for a backup of `database`, with their expected sha256 or `None`.

    These are stored drops, which may be missing; JSON artifacts and evidence cards of succeeded runs, as far as they
    exist; and, with `with_models`, all files of the models of current and previous champions and of wins that wait for
    approval, or `models/<id>/` if such a model has none. Only drops without quarantined rows have an expected sha256.
    """
    with closing(sqlite3.connect(database)) as connection:
        drops = connection.execute(_KEPT_FILES).fetchall()
    for sha256, quarantined in sorted(drops):
        # Bad rows that were set aside are not in the file, so its bytes are not those that were dropped.
        yield f"drops/{sha256}.jsonl", None if quarantined else sha256
    for run in succeeded(database):
        for pattern in ("[!.]*.json", *(f"attempts/decide-*/report/{name}" for name in (JSON_NAME, PAGE_NAME))):
            for path in sorted((root / "runs" / str(run)).glob(pattern)):
                yield path.relative_to(root).as_posix(), None
    models = {*champions(database), *_first_column(database, _AWAITED)} if with_models else set()
    for model in sorted(models):
        paths = [path for path in sorted((root / model).rglob("*")) if path.is_file()]
        yield from ((path.relative_to(root).as_posix(), None) for path in paths)
        if not paths:
            yield f"{model}/", None


def unreadable_verdicts(root: Path, database: Path) -> Iterator[str]:
    """
    Yield the paths, relative to `root`, of a database's succeeded runs' verdicts that exist but are damaged.

    A sound one is not empty and names its report and candidate by relative paths, if at all.
    """
    for run in succeeded(database):
        name = f"runs/{run}/decide.json"
        verdict = read_object(root / name)
        named = [verdict.get(key) for key in ("report", "candidate_model_id")]
        is_sound = verdict and all(path is None or (isinstance(path, str) and _is_below(path)) for path in named)
        if (root / name).exists() and not is_sound:
            yield name


def succeeded(database: Path) -> list[int]:
    """Return the ids of a database's runs that have succeeded."""
    return _first_column(database, "SELECT id FROM run WHERE state = 'succeeded'")


def champions(database: Path) -> tuple[str, ...]:
    """Return the folders, `models/<id>`, of merged models that are a track's current or previous champion, sorted."""
    return tuple(sorted(_first_column(database, _CHAMPIONS)))


def _first_column(database: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(database)) as connection:
        return [row[0] for row in connection.execute(query)]


def _seen(path: Path) -> tuple[int, str]:
    with durable.open_regular(path) as file:
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
