"""
Engines and transactions of the state database.

A writer begins every transaction with BEGIN IMMEDIATE: what it reads is still true when it writes, and it waits for its
turn instead of failing in the middle with "database is locked". Readers do not delay it (WAL). Engines are safe to
share between threads.
"""

import sqlite3
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, Engine, ScalarResult, TextClause, create_engine, event, text
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import NullPool, Pool, QueuePool
from sqlmodel import Session, SQLModel, select

import daemon.state.tables  # noqa: F401 - fills the metadata
from daemon.settings.model import Settings
from daemon.state.database_file import (
    APPLICATION_ID,
    SCHEMA,
    DatabaseUnusable,
    how_to_restore,
    in_words,
    open_file,
    with_pragmas,
)
from daemon.state.layout import DATABASE_NAME
from daemon.state.ownership import require_share
from daemon.state.questions import AWAITS_APPROVAL

T = TypeVar("T")


def open_engine(path: Path, *, keep: bool = False) -> Engine:
    """
    Return a read-write engine; each of its transactions holds the write lock from its first statement on.

    The first transaction opens the file, or creates it if it is missing, without tables. Each waits for the lock for up
    to 30 s. A commit that returned survives a power cut (synchronous EXTRA). With `keep` the engine pools its
    connections until it is disposed of: for a process that queries all day; otherwise each session opens its own.
    """
    return _engine(path, partial(_connect, path), "BEGIN IMMEDIATE", QueuePool if keep else NullPool)


def open_reader(path: Path) -> Engine:
    """Return a read-only engine; the content is not checked. Raises `DatabaseUnusable` if the file is missing."""
    if not path.exists():
        raise DatabaseUnusable(f"there is no database {path}", "start the daemon once: dropforge run")
    return _engine(path, partial(open_file, path), "BEGIN")


def open_writer(settings: Settings) -> Engine:
    """Return an engine like `open_engine`. Raises `DatabaseUnusable` if the file is missing, and as `require_share`."""
    path = settings.state_folder / DATABASE_NAME
    open_reader(path)  # raises if there is no database, which the writer would create
    require_share(settings)
    return open_engine(path)


class ChangeWatch:
    """Detects whether the database has changed, at a hundredth of the cost of a transaction; for one thread."""

    def __init__(self, engine: Engine) -> None:
        """Connect to the database of `engine`, whose changes count, too. Raises `sqlite3.Error` if it is missing."""
        self._connection = open_file(engine.get_execution_options()["path"])
        weakref.finalize(self, self._connection.close)
        self._seen: int | None = None

    def changed(self) -> bool:
        """Return whether any process has committed a change since the last call; `True` for the first or if unknown."""
        try:
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        except sqlite3.OperationalError:  # on a full disk a WAL's index cannot grow: who reads next says so
            return True
        before, self._seen = self._seen, int(version)
        return before != self._seen


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """Yield a session; commit at the block's end, or roll back after an exception. Committed rows stay readable."""
    with Session(engine, expire_on_commit=False) as session, session.begin():
        yield session


def rows_of(session: Session, table: type[T], question: str, **values: object) -> ScalarResult[T]:
    """Return an iterator over the rows of `table` that `question`, SQL with `values` as its parameters, selects."""
    return session.scalars(select(table).from_statement(text(question)), values)


def waits() -> TextClause:
    """Return the SQL condition, for a query of `Run`, that selects runs whose win waits for approval."""
    return text(AWAITS_APPROVAL)


def create(path: Path) -> None:
    """
    Create the database at `path`, with its folder, unless it has tables; either way its journal becomes a WAL.

    Call it while no other process has the database open. Raises `DatabaseUnusable` if the database is of another
    version, locked or cannot be written, or the file is no database.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = _engine(path, partial(_connect, path, "journal_mode=WAL"), "BEGIN IMMEDIATE")
    try:
        with engine.begin() as connection:
            schema = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one() == 0:
                SQLModel.metadata.create_all(connection, checkfirst=False)
                connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
                connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA}")
            elif schema != SCHEMA:
                message = f"the database {path} has schema {schema}, and this version of dropforge has {SCHEMA}"
                raise DatabaseUnusable(message, f"install the version that made it; or {how_to_restore(path)}")
    except DatabaseError as error:
        raise in_words(error, path) or error from error


def _engine(path: Path, creator: Callable[[], sqlite3.Connection], begin: str, pool: type[Pool] = NullPool) -> Engine:
    engine = create_engine("sqlite://", creator=creator, poolclass=pool, execution_options={"path": path})

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _connect(path: Path, *pragmas: str) -> sqlite3.Connection:
    return with_pragmas(open_file(path, "rwc"), "foreign_keys=ON", "synchronous=EXTRA", *pragmas)
