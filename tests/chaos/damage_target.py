"""
Damages a state folder that has been lived in, starts the real daemon on it, and says what that stopped: one JSON line.

A process of its own that has imported everything and is not root: the daemon and each command run in a fork of it. It
plays the user, who drops a file into the track `good`, and the worker. Each damage lies in another track.

    python -m tests.chaos.damage_target FOLDER
    []                                                        → the damages that are possible, a list each
    [["runs/2/merge.json", "folder"]]                         → what broke, in words
    [["run", 3, "config", "no JSON"]]
"""

import contextlib
import faulthandler
import io
import json
import os
import select
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlmodel import SQLModel

from daemon import cli, service
from daemon.settings.load import load
from daemon.state.database import transaction
from daemon.state.layout import DATABASE_NAME, TROUBLES_NOTE, WORKER_LOCK
from daemon.state.tables import EVERY, Message, Outbox
from daemon.system.processes import FileLock
from pipeline import durable
from pipeline.contract import CURVE_NAME, LOG_NAME, PROGRESS_NAME, RESULT_NAME, StepError, StepResult, StepSpec
from tests.chaos.house import START, Daemon, build, records, result_of
from tests.run_owner import spool_of

_SECONDS = 20
#: What comes of the state before a damage: the nine runs that it has, one of the new file, three trials and controls.
_RUNS = 13
_TRACKS = """
[executor]
parallel = 20
[gc]
keep_champions = 1
keep_models = 0
automatic = {automatic}
[tracks.champ.suspects]
leave_one_out = {automatic}
[tracks.tried]
[tracks.waits.gate]
approval = "manual"
[tracks.ended]
[tracks.going]
[tracks.lies]
[tracks.good]
"""
#: How the daemon's user finds a file or folder; those that make a document keep its form.
_TEXTS: dict[str, Callable[[Any], Any]] = {
    "another type": lambda _: [7],
    "NUL": lambda value: "a\0b" if isinstance(value, str) else value,
    "out of range": lambda value: "x" * 5000 if isinstance(value, str) else 10**40 if isinstance(value, int) else value,
}
FILES = ("unreadable", "a folder", "no JSON", *_TEXTS, "a FIFO", "a link to itself")
#: What somebody writes into a column by hand.
COLUMNS: dict[str, object] = {
    "nothing": None,
    "no JSON": "{half",
    "another type": '[{"a": [7]}]',
    "an object": '{"a": [7]}',
    "a number": 7,
    "bytes": b"\xff\xfe",
    "NUL": "a\0b",
    "out of range": 2**62,
    "below zero": -(2**62),
}
#: Notes of all tracks; the daemon writes them anew.
_NOTES = ("watcher.json", "troubles.json", "web-token", "gpu.json")


class Case:
    """The state folder before a damage, and what the daemon makes of it."""

    def __init__(self, folder: Path) -> None:
        """Make the state before, in `folder`."""
        self._before, self._work, self._log = folder / "before", folder / "work", folder / "daemon.log"
        self._work.mkdir()
        _live(self._work)
        # Copies of it come to lie where it was made: it holds absolute links to its base model.
        self._work.rename(self._before)
        self._root = self._before / ".dropforge"
        self._tracks = self._owners()
        self._expected: dict[int, str] = {}
        self.broken([])

    def _owners(self) -> dict[str, str]:
        """Return the track of each run, model, drop and folder of a track, by its path."""
        found = {f"tracks/{name}": name for name in load(self._before / "dropforge.toml", {}).track_names}
        with closing(sqlite3.connect(self._root / DATABASE_NAME)) as base:
            found |= {f"runs/{run}": track for run, track in base.execute("SELECT id, track FROM run")}
            found |= {f"drops/{sha}.jsonl": track for sha, track in base.execute('SELECT sha256, track FROM "drop"')}
            models = base.execute("SELECT model_path, track FROM promotion WHERE generation > 0")
            found |= {str(path): track for path, track in models if path.startswith("models/")}
        return found

    def damages(self) -> list[list[object]]:
        """Return every damage of each file and column of a track or run; the track `good` has none."""
        found: list[list[object]] = []
        for path in sorted(self._root.rglob("*")):
            name = path.relative_to(self._root).as_posix()
            if self._track_of(name) not in {"good", ""} or name in _NOTES:
                kinds = ("a folder", "a FIFO", "a link to itself") if path.is_dir() or path.is_symlink() else FILES
                found += [[name, kind] for kind in kinds if kind != "a folder" or not path.is_dir()]
                found += [[name, "a file"]] if path.is_dir() else []
        with closing(sqlite3.connect(self._root / DATABASE_NAME)) as base:
            for table in EVERY:
                columns = SQLModel.metadata.tables[str(table.__tablename__)].columns.keys()
                # Of the rows of each track, or of its events of each kind, the last one.
                whose: list[str] = [name for name in ("track", "name", "run_id", "kind") if name in columns] or ["id"]
                asked = f'SELECT max(rowid) FROM "{table.__tablename__}" GROUP BY {", ".join(whose)}'
                for (row,) in base.execute(asked).fetchall():
                    cells = [[table.__tablename__, row, column, kind] for column in columns for kind in COLUMNS]
                    found += cells if self.track(cells[0]) != "good" else []
        return found

    def track(self, damage: list[Any]) -> str:
        """Return the track that a damage lies in; "" for what belongs to none, or to all."""
        if len(damage) == 2:
            return self._track_of(damage[0])
        with closing(sqlite3.connect(self._root / DATABASE_NAME)) as base:
            base.row_factory = sqlite3.Row
            row = dict(base.execute(f'SELECT * FROM "{damage[0]}" WHERE rowid = ?', (damage[1],)).fetchone())
        return str(row.get("track") or row.get("name") or self._tracks.get(f"runs/{row.get('run_id')}", ""))

    def _track_of(self, name: str) -> str:
        parts = Path(name.replace("spool/queue/", "runs/").replace("-", "/")).parts
        return next((self._tracks[one] for one in ("/".join(parts[:2]), name) if one in self._tracks), "")

    def broken(self, damages: list[list[Any]]) -> list[str]:
        """Damage a copy of the state, start the daemon, and return in words what that broke."""
        for path in (self._work, *self._work.rglob("*")) if self._work.exists() else ():
            if not path.is_symlink() and path.is_dir():
                path.chmod(0o700)
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.copytree(self._before, self._work, symlinks=True)
        done = [damage for damage in damages if _damage(self._work / ".dropforge", damage)]
        if damages and not done:
            return []
        self._log.write_bytes(b"")
        worker = FileLock(self._work / ".dropforge" / WORKER_LOCK)
        assert worker.acquire()
        daemon = _forked(self._serve, self._log)
        try:
            found = self._use(daemon, done)
            for words in (("status",), ("status", "--json")) if _is_alive(daemon) else ():
                found += self._command(words)
        finally:
            if _is_alive(daemon):
                os.kill(daemon, signal.SIGTERM)
        code = _ended(daemon)
        worker.release()
        said = self._log.read_text(errors="replace")
        found += [] if code == 0 else [f"the daemon ended with {code}: {said[-3000:]}"]
        return found

    def _serve(self) -> int:
        faulthandler.dump_traceback_later(_SECONDS)
        service._TICK_SECONDS = service._IDLE_TICK_SECONDS = 0.01
        service._STATUS_SECONDS = 0.0
        os.chdir(self._work)
        return service.run(load(self._work / "dropforge.toml", {}))

    def _command(self, words: tuple[str, ...]) -> list[str]:
        said = self._log.with_name("command.log")
        said.write_bytes(b"")
        command = _forked(lambda: _as_command(self._work, words), said)
        code = _ended(command)
        return [] if code == 0 else [f"dropforge {' '.join(words)} ended with {code}: {said.read_text()[-2000:]}"]

    def _use(self, daemon: int, damages: list[list[Any]]) -> list[str]:
        """Play user and worker until all is well or the time is over; return what is not well."""
        aside = self._work / "inbox" / "good" / ".new"
        aside.write_bytes(records("new"))
        aside.rename(aside.with_name("new.jsonl"))
        end, found = time.monotonic() + (_SECONDS if self._expected else 10 * _SECONDS), ["nothing was looked at"]
        # Between two looks the daemon has time to go on.
        while found and time.monotonic() < end and not _ends(daemon, 0.02):
            _work(self._work / ".dropforge")
            found = self._wrong(damages) if self._expected else self._open()
        if not self._expected:
            assert not found, found
            self._expected = self._runs()
        return found if _is_alive(daemon) else [*found, "the daemon is not alive"]

    def _runs(self) -> dict[int, str]:
        with closing(sqlite3.connect(self._work / ".dropforge" / DATABASE_NAME, timeout=30)) as base:
            return dict(base.execute("SELECT id, track || ' ' || state FROM run"))

    def _open(self) -> list[str]:
        """Return what the state without a damage still waits for."""
        ended = [state for state in self._runs().values() if state.endswith("succeeded")]
        return [] if len(ended) == _RUNS else [f"{len(ended)} of {_RUNS} runs have succeeded"]

    def _wrong(self, damages: list[list[Any]]) -> list[str]:
        """Return what of the expected has not come, and the damages that hinder a run and are named nowhere."""
        runs, wrong = self._runs(), []
        hindered = {self.track(damage): damage for damage in damages}
        if list(runs.values()).count("good succeeded") != list(self._expected.values()).count("good succeeded"):
            wrong.append(f"the run of good has not ended: {runs}")
        if any((self._work / ".dropforge/models").glob("*")) and (self._work / self._collected()).exists():
            wrong.append("no garbage is collected")
        for track in {state.split()[0] for state in self._expected.values()} - {"good"}:
            ended = sorted(state for state in runs.values() if state.startswith(track))
            if ended != sorted(state for state in self._expected.values() if state.startswith(track)):
                if track not in hindered:
                    wrong.append(f"track {track} has {ended}")
                elif len(hindered[track]) == 2 and not self._names(track):  # a value that the schema takes may be meant
                    wrong.append(f"{hindered[track]} is named nowhere, and track {track} has {ended}")
        return wrong

    def _collected(self) -> Path:
        """Return the model of the first run of `good`, which nothing needs."""
        run = next(path.split("/")[1] for path, track in self._tracks.items() if track == "good" and "runs/" in path)
        return Path(".dropforge/models", durable.read_object(self._root / f"runs/{run}/merge.json")["model_id"])

    def _names(self, track: str) -> bool:
        """Return whether the notes for `status` name the track or one of its runs."""
        with closing(sqlite3.connect(self._work / ".dropforge" / DATABASE_NAME, timeout=30)) as base:
            rows = base.execute("SELECT id, error FROM run WHERE track = ?", (track,)).fetchall()
        told = json.dumps(durable.read_object(self._work / ".dropforge" / TROUBLES_NOTE))
        return any(error for _, error in rows) or f"track {track}" in told or any(f"run {n}" in told for n, _ in rows)


def _live(folder: Path) -> None:
    """Make a workspace in which each track has come to another point."""
    build(folder)
    settings = folder / "dropforge.toml"
    plain = settings.read_text().replace('trigger = "both"', 'trigger = "both"\nworker = "separate"')
    settings.write_text(plain + _TRACKS.format(automatic="false"))
    daemon = Daemon(folder, START)
    inbox = daemon.settings.inbox_folder
    for track in daemon.settings.track_names[1:]:
        (inbox / track / "heldout").mkdir(parents=True, exist_ok=True)

    def drop(track: str, *names: str, outcome: str = "promoted") -> None:
        for name in names:
            (inbox / track / f"{name}.jsonl").write_bytes(records(f"{track} {name}"))
        daemon.take_in(START)
        if outcome:
            daemon.finish_runs(START, outcome)

    drop("champ", "a", "b")
    drop("tried", "a")
    drop("waits", "a")
    drop("ended", "a", outcome="not_shown_better")
    drop("good", "a", outcome="not_shown_better")
    drop("tried", "b", outcome="")
    daemon.until("decide", START, "worse")
    daemon.dispatcher.tick(START)
    drop("going", "a", outcome="")
    daemon.until("merge", START)
    daemon.dispatcher.tick(START)
    drop("lies", "a", outcome="")
    daemon.dispatcher.tick(START)
    spec = next(spec for spec in _orders(daemon.root) if spec.config.track == "lies")
    durable.write_json(daemon.root / spec.folder / RESULT_NAME, result_of(spec, "promoted").model_dump(mode="json"))
    (daemon.root / "spool/queue" / f"{spec.key}.json").unlink()
    for attempt in daemon.root.glob("runs/*/attempts/*"):
        (attempt / LOG_NAME).write_text("said\n")
        durable.write_json(attempt / PROGRESS_NAME, {"step": attempt.name.partition("-")[0], "done": 1, "total": 2})
        durable.write_json(attempt / CURVE_NAME, {"loss": [], "dev": []})
    with transaction(daemon.engine) as session:
        session.add(Outbox(event_id=1, digest_event_id=1, digest_at=START))
        told: dict[str, Any] = {"address": "a", "kind": "promoted", "level": "info", "title": "t", "body": "b"}
        session.add(Message(**told, event_id=1, created_at=START, not_before=START))
    daemon.night(START + 1)
    daemon.engine.dispose()
    settings.write_text(plain + _TRACKS.format(automatic="true"))


def _orders(root: Path) -> Iterator[StepSpec]:
    yield from spool_of(root).orders()


def _work(root: Path) -> None:
    """Do what the worker does with everything that is in the spool."""
    for spec in _orders(root):
        try:
            result = result_of(spec, "worse" if spec.config.track == "tried" else "not_shown_better")
        except Exception as error:  # noqa: BLE001 - a step's own process may meet anything
            told = {"key": spec.key, "fence": spec.fence, "status": "failed", "exit_code": 1}
            result = StepResult.model_validate({**told, "error": StepError(message=f"{type(error).__name__}: {error}")})
        with contextlib.suppress(OSError):
            durable.write_json(root / spec.folder / RESULT_NAME, result.model_dump(mode="json"))
        (root / "spool/queue" / f"{spec.key}.json").unlink(missing_ok=True)


def _damage(root: Path, damage: list[Any]) -> bool:
    """Damage a file or a cell of the database; return `False` if the schema does not take such a value."""
    if len(damage) == 2:
        _damage_file(root / damage[0], damage[1])
        return True
    table, row, column, kind = damage
    with closing(sqlite3.connect(root / DATABASE_NAME)) as base, base:
        base.execute("PRAGMA foreign_keys = ON")
        try:
            base.execute(f'UPDATE "{table}" SET "{column}" = ? WHERE rowid = ?', (COLUMNS[kind], row))
        except (sqlite3.IntegrityError, sqlite3.OperationalError):  # a rule of the schema, or JSON in it
            return False
    return True


def _damage_file(path: Path, kind: str) -> None:
    if kind == "unreadable":
        path.chmod(0)
        return
    data = path.read_bytes() if path.is_file() else b""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    else:
        path.write_bytes(b"\xff{" if kind in {"no JSON", "a file"} else _changed(data, _TEXTS[kind]))


def _changed(data: bytes, change: Callable[[Any], Any]) -> bytes:
    """Return a document with each value of its object changed; `data` without an object becomes another value."""
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        return json.dumps(change("text")).encode()
    return json.dumps({name: change(one) for name, one in value.items()}).encode()


def _as_command(work: Path, words: tuple[str, ...]) -> int:
    faulthandler.dump_traceback_later(_SECONDS // 2)
    os.chdir(work)
    sys.argv = ["dropforge", *words]
    return cli.main() or 0


def _forked(act: Callable[[], int], log: Path) -> int:
    """Do something in a fork that writes to `log`; return its process number."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        fd = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(fd, "a"), write_through=True) for _ in range(2))
        code = act()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is in the log
        os.write(2, f"{type(error).__name__}: {error} {getattr(error, 'hint', '')}\n".encode())
    finally:
        os._exit(code)


def _is_alive(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _ends(pid: int, seconds: float) -> bool:
    """Return whether a fork ends within so many seconds."""
    fd = os.pidfd_open(pid)
    try:
        return bool(select.select([fd], [], [], seconds)[0])
    finally:
        os.close(fd)


def _ended(pid: int) -> int:
    """Wait for a fork and return its exit code; kill it if it hangs."""
    if not _ends(pid, _SECONDS):
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder: Path) -> None:
    """Answer requests on standard input until it ends."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # the answers are alone there
        case = Case(folder)
        for line in sys.stdin:
            request = json.loads(line)
            print(
                json.dumps(case.broken(request) if request else [[case.track(one), one] for one in case.damages()]),
                file=answers,
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
