"""
Rebuild a backup's database from its rows alone: the schema of the new one refuses what the daemon does not expect.

Runs that were not over when the backup was made begin again.
"""

import shutil
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from daemon.state.column_rules import IN_PATHS
from daemon.state.database import create
from daemon.state.layout import DATABASE_NAME
from daemon.state.tables import EVERY
from daemon.storage.backup import named_files, refusal
from daemon.storage.disk import is_full
from pipeline import durable
from pipeline.errors import DropforgeError

#: Values that the tables take and a restore does not, by column.
_BAD = {
    **{
        name: f'SELECT 1 FROM "{name.split(".")[0]}" WHERE NOT ({rule.format(name.split(".")[1])})'  # noqa: S608 - our own
        for name, rule in IN_PATHS.items()
    },
    "run.snapshot": """
SELECT 1 FROM run, json_each(snapshot) AS held
WHERE held.type <> 'integer' OR held.value NOT IN (SELECT id FROM "drop" WHERE "drop".track = run.track)
""",
    "track.split": "SELECT 1 FROM track, json_each(split) AS held WHERE held.type NOT IN ('real', 'integer')",
    "promotion.drops": "SELECT 1 FROM promotion, json_each(drops) AS held WHERE held.type <> 'integer'",
    "track.champion_generation": """
SELECT 1 FROM track WHERE champion_generation IS NOT NULL AND champion_generation NOT IN
    (SELECT generation FROM promotion WHERE promotion.track = track.name)
""",
}
_BEGIN_AGAIN = (
    """
    INSERT INTO event (at, kind, track, run_id, detail)
    SELECT :now, 'run_interrupted', track, id, '{}' FROM run WHERE state = 'running'
    """,
    "UPDATE run SET state = 'waiting', token = NULL WHERE state = 'running'",
    # By the states: `ended_at` of a backup may have any value.
    "UPDATE run SET config = NULL WHERE state NOT IN ('succeeded', 'failed', 'crashed', 'cancelled')",
)


def rebuild(folder: Path, target: Path, files: Mapping[str, tuple[int, str]]) -> None:
    """
    Replace `target` by a new database with the rows of the backup `folder`, durably; open runs begin again.

    `files` are the backup's, with size and sha256. Raises `DropforgeError` if the backup's database has changed, or has
    a row, view or trigger that the schema does not allow, or if `files` has a file that no row names; `OSError` or
    `sqlite3.Error` if `target` cannot be written. An error may leave `target` incomplete.
    """
    target.unlink(missing_ok=True)
    copy = copy_aside(folder / DATABASE_NAME, target, files[DATABASE_NAME][1])
    try:
        create(target)
        with closing(sqlite3.connect(target)) as connection, connection:
            connection.execute("PRAGMA trusted_schema=OFF")
            connection.execute("ATTACH ? AS backup", (str(copy),))
            _copy_rows(connection, folder / DATABASE_NAME)
            for statement in _BEGIN_AGAIN:
                connection.execute(statement, {"now": round(time.time() * 1000)})
        with closing(sqlite3.connect(target)) as connection:
            connection.execute("PRAGMA journal_mode=DELETE")  # one file
    finally:
        copy.unlink()
    durable.fsync_file(target)
    for name in files.keys() - {DATABASE_NAME, *(name for name, _ in named_files(folder, target, with_models=True))}:
        raise refusal(f"{folder} holds a file that its database does not name: {name}")


def _copy_rows(connection: sqlite3.Connection, source: Path) -> None:
    """Copy all rows of the attached `backup`, named `source` in errors; raise `DropforgeError` for one not allowed."""
    other = "SELECT type, name FROM backup.sqlite_master WHERE type NOT IN ('table', 'index')"
    for kind, name in connection.execute(other):
        raise refusal(f"{source} has a {kind} of its own: {name!r}")
    for table in EVERY:
        name, columns = table.__tablename__, ", ".join(f'"{column}"' for column in table.model_fields)
        # With the table's name: SQLite takes an unknown "column" for a text.
        old_columns = ", ".join(f'old."{column}"' for column in table.model_fields)
        rows = f'SELECT {old_columns} FROM backup."{name}" AS old'  # noqa: S608 - our own words
        try:
            connection.execute(f'INSERT INTO "{name}" ({columns}) {rows}')
        except sqlite3.DatabaseError as error:
            if is_full(error):
                raise
            raise refusal(f"{source} has a row of {name} that is not allowed there: {error}") from error
    orphan = connection.execute("PRAGMA main.foreign_key_check").fetchone()
    if orphan is not None:
        raise refusal(f"a row of {orphan[0]} in {source} refers to a missing one of {orphan[2]}")
    for column, bad in _BAD.items():
        if connection.execute(f"{bad} LIMIT 1").fetchone():
            raise refusal(f"{source} has a value of {column} that is not allowed there")


def copy_aside(source: Path, target: Path, sha256: str) -> Path:
    """
    Copy a file durably to a temporary path in `target`'s folder, and return that.

    Raises `DropforgeError` if its hash is not `sha256`, `OSError` if it cannot be copied; no copy is left then.
    """
    aside = target.with_name(f".{target.name}.restore.tmp")
    try:
        with durable.open_regular(source) as old, aside.open("wb") as new:
            shutil.copyfileobj(old, new)
        aside.chmod(0o600)
        durable.fsync_file(aside)
        if durable.sha256_file(aside) == sha256:
            return aside
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    aside.unlink()
    raise DropforgeError(f"{source} changed while it was put back", "do it again, from a backup that nobody writes to")
