"""
The state database: its engines, its transactions, its migrations.

A writer begins every transaction with BEGIN IMMEDIATE: what it reads is still true when it writes, and it waits for its
turn instead of failing in the middle with "database is locked". Engines keep no connections, so they are safe to share
between threads.
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.pool import NullPool
from sqlmodel import Session

from pipeline.errors import DropforgeError

BUSY_SECONDS = 30.0
MIGRATIONS = Path(__file__).parent / "migrations"
_RESTORE = "stop the daemon and put a backup of the state folder in its place"


class DatabaseUnusable(DropforgeError):
    """The state database is missing, damaged or newer than this program."""


def open_engine(path: Path) -> Engine:
    """
    Return an engine that writes; each of its transactions holds the write lock from its first statement on.

    A commit that returned survives a power cut (synchronous EXTRA; in WAL mode the same as FULL).
    """
    return _engine(partial(_connect, path, foreign_keys=True), "BEGIN IMMEDIATE")


def open_reader(path: Path) -> Engine:
    """Return an engine that cannot write. Raises `DatabaseUnusable` if there is no database yet."""
    if not path.exists():
        message = f"there is no database {path}"
        raise DatabaseUnusable(message, "start the daemon once: dropforge run")
    return _engine(partial(_connect_read_only, path), "BEGIN")


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """Give a session whose work is committed at the end, or rolled back if an exception leaves the block."""
    with Session(engine, expire_on_commit=False) as session, session.begin():
        yield session


def migrate(path: Path) -> None:
    """
    Bring the database at `path` to this program's schema, all or nothing; create it and its folder if need be.

    Foreign keys are off meanwhile, since a table that is rebuilt would take its children's rows with it, and are
    checked before the commit. Call it while no other process has the database open: the journal mode is chosen here
    too. Raises `DatabaseUnusable` if the database is newer than the program, or is none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = _engine(partial(_connect, path, foreign_keys=False), "BEGIN IMMEDIATE")
    try:
        with engine.connect() as connection:
            _choose_journal(connection)
            with connection.begin():
                _upgrade(connection, path)
    except DatabaseError as error:
        raise _unusable(error) from error


def check(engine: Engine) -> None:
    """Read the whole database for damage. Raises `DatabaseUnusable` if SQLite finds any."""
    try:
        with engine.connect() as connection:
            found = connection.exec_driver_sql("PRAGMA quick_check").scalars().all()
    except DatabaseError as error:
        raise _unusable(error) from error
    if found != ["ok"]:
        message = f"the state database is damaged: {found[0]}"
        raise DatabaseUnusable(message, _RESTORE)


def journal_mode(version: tuple[int, int, int]) -> str:
    """
    Return the journal mode that is safe with a version of the SQLite library.

    Before 3.51.3 (mended in 3.50.7 and 3.44.6 too) a WAL that is reset while another process reads may corrupt the
    database (sqlite.org/wal.html#walresetbug).
    """
    mended = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    return "wal" if mended else "delete"


def _engine(creator: Callable[[], sqlite3.Connection], begin: str) -> Engine:
    engine = create_engine("sqlite://", creator=creator, poolclass=NullPool)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _connect(path: Path, *, foreign_keys: bool) -> sqlite3.Connection:
    # isolation_level=None: the driver begins no transaction by itself, the event above does.
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    for pragma in (f"foreign_keys={'ON' if foreign_keys else 'OFF'}", "synchronous=EXTRA", "trusted_schema=OFF"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def _connect_read_only(path: Path) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode=ro"
    return sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)


def _choose_journal(connection: Connection) -> None:
    """Set the journal mode, which stays with the file; outside of any transaction, as SQLite wants it."""
    major, minor, patch = sqlite3.sqlite_version_info
    wanted = journal_mode((major, minor, patch))
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)  # noqa: S101 - for the type checker: our own creator made it
    driver.execute(f"PRAGMA journal_mode={wanted}")


def _upgrade(connection: Connection, path: Path) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    unknown = set(MigrationContext.configure(connection).get_current_heads()) - known
    if unknown:
        message = f"the database {path} was written by a newer dropforge (schema {', '.join(sorted(unknown))})"
        raise DatabaseUnusable(message, "install that version again, or put back the backup made before it")
    command.upgrade(config, "head")
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    if broken:
        message = f"the database {path} has rows that refer to missing ones: {broken[0]}"
        raise DatabaseUnusable(message, _RESTORE)


def _unusable(error: DatabaseError) -> DatabaseUnusable:
    locked_or_closed = isinstance(error, OperationalError)
    hint = "see who else has it open, and whether this user may write there" if locked_or_closed else _RESTORE
    return DatabaseUnusable(f"the state database cannot be used: {error.orig}", hint)
