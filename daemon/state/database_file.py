"""
The state database as a file: allowed file systems, integrity check, online copy, messages for errors.

Plain `sqlite3`: it must work on a database that the rest of the program refuses.
"""

import re
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path

from daemon.system.programs import user
from pipeline import durable
from pipeline.errors import DropforgeError
from pipeline.words import shell_path

#: "DrFg": distinguishes our database from those of other programs.
APPLICATION_ID = 0x44724667
#: Version of the tables, in SQLite's user_version: a daemon uses no other.
SCHEMA = 9
BACKUPS = "backups"
BUSY_SECONDS = 30.0
_MOUNTS = Path("/proc/self/mountinfo")
#: Network file systems: no shared memory between hosts, and locks that cannot be relied on.
_NETWORK = re.compile(
    "9p|afs|beegfs|ceph|cifs|coda|gfs2|glusterfs|lustre|ncpfs|nfs4?|ocfs2|orangefs|pvfs2|s3fs|smb3|smbfs|sshfs"
)
_PRIMARY_CODE = 0xFF  # the rest of an extended code says more of the same
_DENIED = frozenset({sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH})
#: Another process holds it, or its disk is full or failing.
_HINDERED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR})
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class DatabaseUnusable(DropforgeError):
    """The state database is missing, damaged, locked, of another version, or on an unsafe file system."""


def file_system(path: Path, mounts: Path = _MOUNTS) -> str:
    """
    Return the type of the file system of `path`, or of its nearest parent that exists, as "ext4" or "fuse.sshfs".

    "unknown" if it is not in `mounts`, a file in the format of /proc/self/mountinfo.
    """
    place = path.absolute()
    while not place.exists():
        place = place.parent
    longest, kind = -1, "unknown"
    for line in mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        point = before.split(" ")[4].encode("utf-8", "surrogateescape").decode("unicode_escape")
        # A later mount on the same folder hides an earlier one.
        if len(point) >= longest and place.resolve().is_relative_to(point):
            longest, kind = len(point), after.split(" ", 1)[0]
    return kind


def is_network(kind: str) -> bool:
    """Return whether `kind`, a type that `file_system` returned, is that of a network file system."""
    return _NETWORK.fullmatch(kind.removeprefix("fuse.")) is not None


def refuse_network(folder: Path, mounts: Path = _MOUNTS) -> None:
    """Raise `DatabaseUnusable` if the state folder, which need not exist yet, lies on a network file system."""
    kind = file_system(folder, mounts)
    if is_network(kind):
        message = f"the state folder {folder} lies on a network file system ({kind}), where SQLite can lose data"
        raise DatabaseUnusable(message, 'put it on a local disk: state = "/a/local/folder" in dropforge.toml')


def how_to_restore(path: Path) -> str:
    """Return a hint for users: the command that restores the newest backup next to `path`, or "BACKUP" without any."""
    backups = path.parent / BACKUPS
    kept = [folder for folder in backups.glob("[!.]*/") if not folder.name.startswith("replaced-")]
    newest = max(kept, key=lambda folder: folder.stat().st_mtime, default="BACKUP")
    return f"stop the daemon, then put a backup in its place: dropforge restore {shell_path(newest)}"


def verify(path: Path, *, at_start: bool = False) -> dict[str, int]:
    """
    Check the integrity of a database file; return the number of rows by table name.

    With `at_start`, for the daemon's own database, indexes are not checked but CHECK constraints are, which SQLite
    skips on a read-only connection; a transaction that a crash interrupted is rolled back.
    Raises `DatabaseUnusable` if the file is missing or unreadable, SQLite finds damage or a row that refers to a
    missing one, or the application id is another program's.
    """
    try:
        with closing(open_file(path, "rw" if at_start else "ro")) as connection:
            look = "quick_check" if at_start else "integrity_check"
            faults = [row[0] for row in connection.execute(f"PRAGMA {look}")]
            orphans = connection.execute("PRAGMA foreign_key_check").fetchall()
            (owner,) = connection.execute("PRAGMA application_id").fetchone()
            tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            counts = {
                name: int(connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0])  # noqa: S608 - its own word
                for name in sorted(tables)
            }
    except sqlite3.DatabaseError as error:
        raise DatabaseUnusable(f"{path} cannot be read as a database: {error}", how_to_restore(path)) from error
    if faults != ["ok"] or orphans:
        what = faults[0] if faults != ["ok"] else f"a row of {orphans[0][0]} refers to a missing one of {orphans[0][2]}"
        raise DatabaseUnusable(f"the database {path} is damaged: {what}", how_to_restore(path))
    if owner not in {0, APPLICATION_ID}:
        message = f"the database {path} belongs to another program (application id {owner:#x})"
        hint = "name a file that dropforge made, or give the daemon a state folder of its own: state in dropforge.toml"
        raise DatabaseUnusable(message, hint)
    return counts


def schema_of(path: Path) -> int | None:
    """Return the version of the tables in a database file; 0 without tables, `None` if it is missing or unreadable."""
    if not path.exists():
        return None
    try:
        with closing(open_file(path)) as connection:
            return int(connection.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.DatabaseError:
        return None


def copy_database(source: Path, target: Path) -> dict[str, int]:
    """
    Copy a database to the file `target` while others may write; return the number of rows by table name.

    All that was committed before the call is in the copy, which is one file without a WAL. It is written under a
    temporary name, verified, made durable, and then renamed; an existing `target` is replaced.
    Raises `DatabaseUnusable` if a row of the source cannot be read, the copy is damaged or SQLite cannot write, as on a
    full disk, `OSError` if it cannot be made durable or renamed; nothing is left behind.
    """
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        # Not read-only: a transaction that a crash interrupted must be rolled back before reading.
        with closing(open_file(source, "rw")) as old:
            aside.touch(0o600)
            # SQLite's backup API begins again at each commit of others, so it may never end.
            old.execute("VACUUM INTO ?", (str(aside),))
        counts = verify(aside)
        durable.fsync_file(aside)
        aside.rename(target)
    except sqlite3.DatabaseError as error:
        raise DatabaseUnusable(f"the database {source} cannot be copied: {error}", how_to_restore(source)) from error
    finally:
        aside.unlink(missing_ok=True)
    durable.fsync_folder(target.parent)
    return counts


def open_file(path: Path, mode: str = "ro", detect_types: int = 0) -> sqlite3.Connection:
    """
    Return a connection, for any thread and in autocommit mode, to the database file `path`.

    It must exist for the modes "ro" and "rw"; "rwc" creates it. Raises `sqlite3.Error`.
    """
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(
        uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, detect_types=detect_types
    )
    return with_pragmas(connection, "cell_size_check=ON", "trusted_schema=OFF")


def with_pragmas(connection: sqlite3.Connection, *pragmas: str) -> sqlite3.Connection:
    """Set `pragmas` (as "synchronous=OFF") on `connection`, return it; on failure close it, raise `sqlite3.Error`."""
    try:
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def cause_of(error: BaseException) -> sqlite3.Error | None:
    """Return the `sqlite3.Error` that an exception is or wraps; `None` if there is none."""
    cause = getattr(error, "orig", None) or error  # SQLAlchemy wraps it, which readers do not load
    return cause if isinstance(cause, sqlite3.Error) else None


def in_words(error: BaseException, path: Path) -> DatabaseUnusable | None:
    """
    Return an error on the state database at `path` with a message and a hint for users, or `None`; raise nothing.

    `None` for errors that are not SQLite's, and for wrong statements and rows, which are defects of our own code.
    """
    cause = cause_of(error)
    code = getattr(cause, "sqlite_errorcode", 0) & _PRIMARY_CODE
    if code in _DENIED:
        what = f"user {user()} may not use the state database {path}: {cause}"
        hint = (
            "this user must be able to read and write it and its folder: "
            f"ls -ld {shell_path(path.parent)} {shell_path(path)}; "
            "or ask as the user that the daemon runs as: sudo -u USER dropforge"
        )
    elif code in _HINDERED:
        what = f"the state database {path} cannot be used: {cause}"
        hint = f"try again; who has it open: fuser -v {path}; whether its disk is full: df -h {path.parent}"
    elif code in _DAMAGED:
        what, hint = f"the state database {path} is damaged: {cause}", how_to_restore(path)
    elif str(cause).startswith(("no such table", "no such column")):
        what = f"the state database {path} is not of this version: {cause}"
        hint = f"install the version that made it; or {how_to_restore(path)}"
    else:
        return None
    return DatabaseUnusable(what, hint)
