"""What can be wrong with a machine and a workspace, each looked at without changing anything, each with its remedy."""

import os
import shutil
import socket
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from daemon.inbox.drop_folders import watched_folders
from daemon.inbox.watcher import take_read_lease
from daemon.settings.model import Settings
from daemon.state.database import newest_revision, open_engine, open_reader
from daemon.state.database_file import file_system, in_words, is_network, journal_mode, revision, verify
from daemon.state.layout import DATABASE_NAME, LOCK_NAME, RESTORING, WORKER_LOCK
from daemon.state.ownership import may_replace, state_rights, unwritable
from daemon.storage.backup import named_files
from daemon.storage.disk_estimate import CannotTell, needed_bytes
from daemon.system.processes import lock_holder
from daemon.system.programs import user
from daemon.views import preflight
from daemon.views.overview import Overview
from pipeline.artifacts import Frozen
from pipeline.durable import open_regular
from pipeline.errors import DropforgeError
from pipeline.models.manifest import check_base, model_files
from pipeline.words import count, size_words

Level = Literal["ok", "warn", "bad"]
_LEAST_WATCHES = 1024
_BUILT = 1_750_000_000  # a clock before this (June 2025) has lost its battery
_JUDGE_SECONDS = 3.0
_NO_JUDGE = "without it runs are decided without a judge"
_SYNCHRONOUS = {0: "OFF", 1: "NORMAL", 2: "FULL", 3: "EXTRA"}
_INOTIFY = Path("/proc/sys/fs/inotify")


class Finding(Frozen):
    """One line of the examination."""

    name: str
    level: Level
    text: str
    remedy: str = ""


def examine(settings: Settings) -> list[Finding]:
    """Look at everything; a look that fails is itself a finding."""
    findings: list[Finding] = []
    looks: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
        _sqlite,
        _database,
        _file_systems,
        _rights,
        _space,
        _inbox,
        _inotify,
        bases,
        _memory,
        _champions,
        needs,
        _judge,
        _daemon,
        _clock,
    )
    for look in looks:
        name = look.__name__.strip("_").replace("_", " ")
        try:
            findings += look(settings)
        except OSError as error:
            words = f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")
            remedy = "ask as the user that the daemon runs as: sudo -u USER dropforge doctor"
            findings.append(Finding(name=name, level="bad", text=words, remedy=remedy))
        except Exception as error:  # noqa: BLE001 - the other looks are made whatever this one runs into
            path = settings.state_folder / DATABASE_NAME
            said = error if isinstance(error, DropforgeError) else in_words(error, path)
            said = said or DropforgeError(f"{type(error).__name__}: {error}", "this is a defect, please report it")
            findings.append(Finding(name=name, level="bad", text=said.message, remedy=said.hint))
    return findings


def _sqlite(_settings: Settings) -> Iterator[Finding]:
    major, minor, patch = sqlite3.sqlite_version_info
    mode = journal_mode((major, minor, patch))
    affected = "has the WAL-reset bug, so no WAL is used" if mode == "delete" else "has no WAL-reset bug"
    yield Finding(name="sqlite", level="ok", text=f"SQLite {sqlite3.sqlite_version} {affected}; journal mode {mode}")


def _database(settings: Settings) -> Iterator[Finding]:
    path = settings.state_folder / DATABASE_NAME
    if (settings.state_folder / RESTORING).exists():
        yield Finding(
            name="database", level="bad", text="a restore was cut off", remedy="do it again: dropforge restore BACKUP"
        )
        return
    if not path.exists():
        yield Finding(
            name="database", level="warn", text=f"there is none yet at {path}", remedy="start the daemon: dropforge run"
        )
        return
    counts = verify(path)
    open_reader(path)  # refuses one from between two releases
    found = revision(path)
    level: Level = "ok" if found == newest_revision() else "warn"
    rows = f"{count(counts.get('run', 0), 'run')}, {count(counts.get('drop', 0), 'drop')}"
    yield Finding(
        name="database",
        level=level,
        text=f"whole; schema {found}, this version has {newest_revision()}; {rows}",
        remedy="" if level == "ok" else "the daemon upgrades it at its next start: dropforge run",
    )
    yield _modes(path)
    missing = [
        name for name, _ in named_files(settings.state_folder, path) if not (settings.state_folder / name).exists()
    ]
    if missing:
        remedy = "put it back from a backup, or take its drop out: dropforge drops withdraw DROP --reason WHY"
        of = "that the database names"
        text = f"{count(len(missing), f'file {of} is', f'files {of} are')} not there: {missing[0]}"
        yield Finding(name="drops", level="bad", text=text, remedy=remedy)


def _modes(path: Path) -> Finding:
    with open_engine(path).connect() as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)  # noqa: S101 - for the type checker: our own creator made it
        (mode,) = driver.execute("PRAGMA journal_mode").fetchone()
        (level,) = driver.execute("PRAGMA synchronous").fetchone()
    major, minor, patch = sqlite3.sqlite_version_info
    wanted = journal_mode((major, minor, patch))
    text = f"journal mode {mode}, synchronous {_SYNCHRONOUS.get(level, level)}"
    if mode == "wal" != wanted:
        remedy = "restart the daemon, which changes it: systemctl restart dropforge"
        return Finding(name="journal", level="bad", text=f"{text}: not safe with this SQLite", remedy=remedy)
    return Finding(name="journal", level="ok", text=text)


def _file_systems(settings: Settings) -> Iterator[Finding]:
    kind = file_system(settings.state_folder)
    if is_network(kind):
        remedy = 'put it on a local disk: state = "/a/local/folder" in dropforge.toml'
        yield Finding(
            name="state", level="bad", text=f"{settings.state} lies on {kind}, of another host", remedy=remedy
        )
    else:
        yield _state(settings, kind)
    kind = file_system(settings.inbox_folder)
    if is_network(kind) and settings.observer == "native":
        remedy = 'files that other hosts drop are seen late; set observer = "polling" in dropforge.toml'
        yield Finding(name="inbox", level="warn", text=f"{settings.inbox} lies on {kind}", remedy=remedy)
    else:
        yield Finding(name="inbox", level="ok", text=f"{settings.inbox} on {kind}")


def _state(settings: Settings, kind: str) -> Finding:
    """Look for what this user may not write in the state folder: `dropforge run` ends at the first such thing."""
    refused = unwritable(settings.state_folder)
    if refused is None:
        return Finding(name="state", level="ok", text=f"{settings.state} on {kind}")
    text = f"user {user()} may not write to {refused}"
    remedy = f"ask as the daemon's user: sudo -u USER dropforge doctor; or let this user: ls -ld {refused}"
    return Finding(name="state", level="bad", text=text, remedy=remedy)


def _rights(settings: Settings) -> Iterator[Finding]:
    """Look whether others may do what is the daemon's alone to do; nothing where they may not."""
    for text, remedy in state_rights(settings.state_folder):
        yield Finding(name="state rights", level="warn", text=text, remedy=remedy)
    for folder in (one.path for one in watched_folders(settings)):
        if may_replace(folder):
            text = f"{folder}: who may drop files may take away and replace what others dropped"
            yield Finding(name="inbox rights", level="warn", text=text, remedy=f"chmod +t {folder}")


def _space(settings: Settings) -> Iterator[Finding]:
    place = settings.state_folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    needs = [0]
    for track in (settings.track(name) for name in settings.track_names):
        # Why a base model cannot be read, the look at the bases says.
        with suppress(CannotTell):
            needs.append(sum(needed_bytes(track, 0, 0).values()) if track.base_model else 0)
    need, kept = max(needs), settings.disk.low_water_bytes
    text = (
        f"{size_words(free)} free for the state folder; a run takes up to {size_words(need)} beside its drops, "
        f"and {size_words(kept)} stay free (disk.low_water_bytes)"
    )
    if free < need + kept:
        yield Finding(name="space", level="bad", text=text, remedy="free some, or move state to a larger disk")
    else:
        yield Finding(name="space", level="ok", text=text)


def _inbox(settings: Settings) -> Iterator[Finding]:
    if not settings.inbox_folder.is_dir():
        yield Finding(
            name="leases", level="warn", text=f"there is no {settings.inbox} yet", remedy="make it: dropforge init"
        )
        return
    unusable = [str(one.path) for one in watched_folders(settings) if one.path.is_dir() and not os.access(one.path, 7)]
    if unusable:
        remedy = f"let this user list and change it: ls -ld {unusable[0]}"
        yield Finding(name="inbox rights", level="bad", text=f"{unusable[0]} is not writable", remedy=remedy)
        return
    # A name that no scan takes; a file without a name has no leases on some file systems.
    with tempfile.NamedTemporaryFile(dir=settings.inbox_folder, prefix=".dropforge-doctor-") as made:
        fd = os.open(made.name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            works = not take_read_lease(fd)  # it is open for writing, by ourselves
        except OSError:
            works = False
        finally:
            os.close(fd)
    text = "the kernel says who has a file in the inbox open for writing"
    if works:
        yield Finding(name="leases", level="ok", text=text)
    else:
        remedy = "a file is taken when it has been quiet for intake.settle_seconds; senders should rename files in"
        yield Finding(name="leases", level="warn", text=f"not here: {text}", remedy=remedy)


def _inotify(settings: Settings) -> Iterator[Finding]:
    if settings.observer == "polling":
        return
    limits = {name: int((_INOTIFY / name).read_text()) for name in ("max_user_watches", "max_user_instances")}
    text = f"{limits['max_user_watches']} watches, {limits['max_user_instances']} instances allowed"
    if limits["max_user_watches"] < _LEAST_WATCHES or limits["max_user_instances"] < 1:
        remedy = "sysctl fs.inotify.max_user_watches=65536 fs.inotify.max_user_instances=128"
        yield Finding(name="inotify", level="warn", text=text, remedy=remedy)
    else:
        yield Finding(name="inotify", level="ok", text=text)


def bases(settings: Settings) -> Iterator[Finding]:
    """Say of each track whether its base model is there and can be trained."""
    for track in settings.track_names:
        name, folder = f"base of {track}", settings.track(track).base_model
        if not folder:
            remedy = "set base_model in dropforge.toml to a model folder"
            yield Finding(name=name, level="bad", text="no base model is set", remedy=remedy)
            continue
        try:
            check_base(Path(folder))
            for path in model_files(Path(folder)):
                with open_regular(path) as file:
                    file.read(1)
        except DropforgeError as error:
            yield Finding(name=name, level="bad", text=error.message, remedy=error.hint)
        except OSError as error:
            words = f"{error.filename}: {error.strerror}"
            yield Finding(name=name, level="bad", text=words, remedy="let the daemon's user read that file")
        else:
            yield Finding(name=name, level="ok", text=folder)


def _memory(settings: Settings) -> Iterator[Finding]:
    for track in (name for name in settings.track_names if settings.track(name).base_model):
        # Why a base model cannot be read, the look at the bases says.
        with suppress(OSError, ValueError):
            text, fits = preflight.memory_needs(settings, track)
            remedy = "" if fits else "free memory, lower train.max_length, or use a smaller base model"
            yield Finding(name=f"memory of {track}", level="ok" if fits else "warn", text=text, remedy=remedy)


def _champions(settings: Settings) -> Iterator[Finding]:
    """Look whether what a server loads is there; whether every byte of it is what it was, a rollback asks."""
    overview = Overview(settings.state_folder)
    for track in settings.track_names:
        champion = overview.champion(track)
        if champion is None:
            continue
        name, what = f"champion of {track}", f"generation {champion.generation}"
        link = settings.state_folder / "tracks" / track / "champion"
        if not Path(champion.path).is_dir():
            remedy = f"bring it back from a backup, or let another one serve: dropforge history --track {track}"
            yield Finding(name=name, level="bad", text=f"the model of {what} is gone: {champion.path}", remedy=remedy)
        elif not link.exists() or not link.samefile(champion.path):
            text, remedy = f"{link} does not lead to {what}, {champion.path}", "start the daemon, which mends it"
            yield Finding(name=name, level="bad", text=text, remedy=f"{remedy}: dropforge run")
        else:
            yield Finding(name=name, level="ok", text=f"{what}, {champion.path}")


def needs(settings: Settings) -> Iterator[Finding]:
    """Look for each package, program and suite that the settings need."""
    for name, look, of_steps in preflight.needs(settings):
        try:
            yield Finding(name=name, level="ok", text=look())
        except DropforgeError as error:
            # A worker of its own has an environment of its own.
            level: Level = "warn" if of_steps and settings.worker == "separate" else "bad"
            yield Finding(name=name, level=level, text=error.message, remedy=error.hint)


def _judge(settings: Settings) -> Iterator[Finding]:
    """Look whether the judges' keys are set and their hosts listen; nothing is asked, and no key is sent."""
    judges = {settings.track(name).judge for name in settings.track_names}
    for judge in sorted((one for one in judges if one.url), key=lambda one: one.url):
        name, parts = "judge", urlsplit(judge.url)
        if judge.api_key_env and not os.environ.get(judge.api_key_env):
            remedy = f"set it where the daemon runs, as in /etc/dropforge/environment; {_NO_JUDGE}"
            yield Finding(name=name, level="warn", text=f"{judge.api_key_env} is not set in this shell", remedy=remedy)
        if not judge.on_this_machine and getproxies().get(parts.scheme):
            yield Finding(name=name, level="ok", text=f"{judge.url}: behind a proxy, not tried")
            continue
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname, port), timeout=_JUDGE_SECONDS).close()
        except OSError as error:
            remedy = f"start it, or mend judge.url; {_NO_JUDGE}"
            yield Finding(name=name, level="warn", text=f"{judge.url} does not listen: {error}", remedy=remedy)
        else:
            yield Finding(name=name, level="ok", text=f"{judge.url} listens; it is asked for {judge.model}")


def _daemon(settings: Settings) -> Iterator[Finding]:
    pid = lock_holder(settings.state_folder / LOCK_NAME) if settings.state_folder.is_dir() else None
    text = "not running" if pid is None else f"running, process {pid}"
    remedy = "start it: dropforge run, or systemctl start dropforge" if pid is None else ""
    yield Finding(name="daemon", level="warn" if remedy else "ok", text=text, remedy=remedy)
    if pid and settings.worker == "separate" and lock_holder(settings.state_folder / WORKER_LOCK) is None:
        yield Finding(name="worker", level="warn", text="not running: no step begins", remedy="dropforge worker")


def _clock(settings: Settings) -> Iterator[Finding]:
    now = datetime.now().astimezone()
    text = f"{now:%Y-%m-%d %H:%M:%S} {now.tzname()}"
    if now.timestamp() < _BUILT:
        yield Finding(name="clock", level="bad", text=f"{text}: it is wrong", remedy="set it: timedatectl set-ntp true")
        return
    latest = _latest_event(settings.state_folder / DATABASE_NAME)
    if latest is not None and latest > time.time() * 1000 + 60_000:
        remedy = "it was ahead earlier, or is behind now: timedatectl status"
        yield Finding(name="clock", level="warn", text=f"{text}: events of the future are recorded", remedy=remedy)
        return
    zones = {settings.track(name).timezone for name in settings.track_names}
    yield Finding(name="clock", level="ok", text=f"{text}; schedules are in {', '.join(sorted(zones))}")


def _latest_event(path: Path) -> int | None:
    if not path.exists():
        return None
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        found: int | None = connection.execute("SELECT max(at) FROM event").fetchone()[0]
        return found
