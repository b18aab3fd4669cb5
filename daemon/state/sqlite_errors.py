"""What SQLite's errors mean to a person: which file, for which user, what is expected, and what to do."""

import sqlite3
from pathlib import Path

from daemon.state.database_file import DatabaseUnusable, how_to_restore
from daemon.system.programs import user

_PRIMARY_CODE = 0xFF  # the rest of an extended code says more of the same
_DENIED = frozenset({sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH})
#: What a process that died had begun: a writer takes it back first, and whoever only reads may not.
_BEGUN = frozenset({sqlite3.SQLITE_READONLY_ROLLBACK, sqlite3.SQLITE_READONLY_RECOVERY})
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_NO_ROOM = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR})
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


def cause_of(error: BaseException) -> sqlite3.Error | None:
    """Return SQLite's own error behind an exception; `None` if it is of another kind."""
    cause = getattr(error, "orig", None) or error  # SQLAlchemy wraps it; whoever only reads does not load that
    return cause if isinstance(cause, sqlite3.Error) else None


def in_words(error: BaseException, path: Path) -> DatabaseUnusable | None:
    """
    Return what an error on the state database at `path` is to a person.

    `None` for errors of other kinds, and what no person causes: statements and rows that our own code got wrong.
    """
    cause = cause_of(error)
    whole = getattr(cause, "sqlite_errorcode", 0)
    code = whole & _PRIMARY_CODE
    if whole in _BEGUN:
        what = f"what a killed process began in the state database {path} is to be undone"
        hint = "the daemon does that at its start: dropforge run; if it is starting, try again"
    elif code in _DENIED:
        what = f"user {user()} may not use the state database {path}: {cause}"
        hint = (
            f"this user must be able to read and write it and its folder: ls -ld {path.parent} {path}; "
            "or ask as the user that the daemon runs as: sudo -u USER dropforge"
        )
    elif code in _BUSY:
        what = f"another process holds the state database {path}: {cause}"
        hint = f"try again; who has it open: fuser -v {path}"
    elif code in _NO_ROOM:
        what = f"the state database {path} cannot be used: {cause}"
        hint = f"see whether its disk is full or failing: df -h {path.parent}; dmesg"
    elif code in _DAMAGED:
        what, hint = f"the state database {path} is damaged: {cause}", how_to_restore(path)
    elif str(cause).startswith(("no such table", "no such column")):
        what = f"the state database {path} is not of this version: {cause}"
        hint = "the daemon brings it up to date at its start: dropforge run"
    else:
        return None
    return DatabaseUnusable(what, hint)
