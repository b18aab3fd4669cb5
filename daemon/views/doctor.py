"""Checks of a machine and a workspace: each changes nothing, and each problem found comes with a remedy."""

import os
import shutil
import socket
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
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
from daemon.views.reader import reading
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
    """The result of one check."""

    name: str
    level: Level
    text: str
    remedy: str = ""


def _ok(name: str, text: str) -> Finding:
    return Finding(name=name, level="ok", text=text)


def _warn(name: str, text: str, remedy: str) -> Finding:
    return Finding(name=name, level="warn", text=text, remedy=remedy)


def _bad(name: str, text: str, remedy: str) -> Finding:
    return Finding(name=name, level="bad", text=text, remedy=remedy)


def examine(settings: Settings) -> list[Finding]:
    """Run all checks and return their findings; a check that raises an exception gives a finding of level "bad"."""
    findings: list[Finding] = []
    checks: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
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
    for check in checks:
        name = check.__name__.strip("_").replace("_", " ")
        try:
            findings += check(settings)
        except OSError as error:
            words = f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")
            findings.append(_bad(name, words, "ask as the user that the daemon runs as: sudo -u USER dropforge doctor"))
        except Exception as error:  # noqa: BLE001 - the other checks are made whatever this one runs into
            path = settings.state_folder / DATABASE_NAME
            said = error if isinstance(error, DropforgeError) else in_words(error, path)
            said = said or DropforgeError(f"{type(error).__name__}: {error}", "this is a defect, please report it")
            findings.append(_bad(name, said.message, said.hint))
    return findings


def _sqlite(_settings: Settings) -> Iterator[Finding]:
    major, minor, patch = sqlite3.sqlite_version_info
    mode = journal_mode((major, minor, patch))
    affected = "has the WAL-reset bug, so no WAL is used" if mode == "delete" else "has no WAL-reset bug"
    yield _ok("sqlite", f"SQLite {sqlite3.sqlite_version} {affected}; journal mode {mode}")


def _database(settings: Settings) -> Iterator[Finding]:
    path = settings.state_folder / DATABASE_NAME
    if (settings.state_folder / RESTORING).exists():
        yield _bad("database", "a restore was interrupted", "do it again: dropforge restore BACKUP")
        return
    if not path.exists():
        yield _warn("database", f"there is none yet at {path}", "start the daemon: dropforge run")
        return
    counts = verify(path)
    open_reader(path)  # refuses one from between two releases
    found, newest = revision(path), newest_revision()
    rows = f"{count(counts.get('run', 0), 'run')}, {count(counts.get('drop', 0), 'drop')}"
    text = f"whole; schema {found}, this version has {newest}; {rows}"
    upgrades = "the daemon upgrades it at its next start: dropforge run"
    yield _ok("database", text) if found == newest else _warn("database", text, upgrades)
    yield _modes(path)
    names = [name for name, _ in named_files(settings.state_folder, path)]
    missing = [name for name in names if not (settings.state_folder / name).exists()]
    if missing:
        of = "that the database names"
        yield _bad(
            "drops",
            f"{count(len(missing), f'file {of} is', f'files {of} are')} not there: {missing[0]}",
            "put it back from a backup, or take its drop out: dropforge drops withdraw DROP --reason WHY",
        )


def _modes(path: Path) -> Finding:
    with open_engine(path).connect() as connection:
        mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
        level = connection.exec_driver_sql("PRAGMA synchronous").scalar_one()
    major, minor, patch = sqlite3.sqlite_version_info
    text = f"journal mode {mode}, synchronous {_SYNCHRONOUS.get(level, level)}"
    if mode == "wal" != journal_mode((major, minor, patch)):
        remedy = "restart the daemon, which changes it: systemctl restart dropforge"
        return _bad("journal", f"{text}: not safe with this SQLite", remedy)
    return _ok("journal", text)


def _file_systems(settings: Settings) -> Iterator[Finding]:
    kind = file_system(settings.state_folder)
    if is_network(kind):
        remedy = 'put it on a local disk: state = "/a/local/folder" in dropforge.toml'
        yield _bad("state", f"{settings.state} lies on {kind}, a network file system", remedy)
    elif (refused := unwritable(settings.state_folder)) is not None:
        # `dropforge run` ends at the first file or folder that it may not write.
        remedy = f"ask as the daemon's user: sudo -u USER dropforge doctor; or let this user: ls -ld {refused}"
        yield _bad("state", f"user {user()} may not write to {refused}", remedy)
    else:
        yield _ok("state", f"{settings.state} on {kind}")
    kind = file_system(settings.inbox_folder)
    if is_network(kind) and settings.observer == "native":
        remedy = 'files that other hosts drop are seen late; set observer = "polling" in dropforge.toml'
        yield _warn("inbox", f"{settings.inbox} lies on {kind}", remedy)
    else:
        yield _ok("inbox", f"{settings.inbox} on {kind}")


def _rights(settings: Settings) -> Iterator[Finding]:
    """Yield a warning for each permission with which other users could change the state or others' drops."""
    for text, remedy in state_rights(settings.state_folder):
        yield _warn("state rights", text, remedy)
    for folder in (one.path for one in watched_folders(settings)):
        if may_replace(folder):
            text = f"{folder}: who may drop files may take away and replace what others dropped"
            yield _warn("inbox rights", text, f"chmod +t {folder}")


def _space(settings: Settings) -> Iterator[Finding]:
    folder = settings.state_folder
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = [0]
    for track in (settings.track(name) for name in settings.track_names):
        with suppress(CannotTell):  # `bases` says why a base model cannot be read
            needed.append(sum(needed_bytes(track, 0, 0).values()) if track.base_model else 0)
    need, kept = max(needed), settings.disk.low_water_bytes
    text = (
        f"{size_words(free)} free for the state folder; a run takes up to {size_words(need)} besides its drops, "
        f"and {size_words(kept)} stay free (disk.low_water_bytes)"
    )
    remedy = "free some, or move state to a larger disk"
    yield _bad("space", text, remedy) if free < need + kept else _ok("space", text)


def _inbox(settings: Settings) -> Iterator[Finding]:
    if not settings.inbox_folder.is_dir():
        yield _warn("leases", f"there is no {settings.inbox} yet", "make it: dropforge init")
        return
    unusable = [str(one.path) for one in watched_folders(settings) if one.path.is_dir() and not os.access(one.path, 7)]
    if unusable:
        remedy = f"let this user list and change it: ls -ld {unusable[0]}"
        yield _bad("inbox rights", f"{unusable[0]} is not writable", remedy)
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
    remedy = "a file is taken when it has been quiet for intake.settle_seconds; senders should rename files in"
    yield _ok("leases", text) if works else _warn("leases", f"not here: {text}", remedy)


def _inotify(settings: Settings) -> Iterator[Finding]:
    if settings.observer == "polling":
        return
    watches, instances = (int((_INOTIFY / f"max_user_{name}").read_text()) for name in ("watches", "instances"))
    text = f"{watches} watches, {instances} instances allowed"
    remedy = "sysctl fs.inotify.max_user_watches=65536 fs.inotify.max_user_instances=128"
    few = watches < _LEAST_WATCHES or instances < 1
    yield _warn("inotify", text, remedy) if few else _ok("inotify", text)


def bases(settings: Settings) -> Iterator[Finding]:
    """Yield a finding per track: whether its base model exists, is readable and can be trained."""
    for track in settings.track_names:
        name, folder = f"base of {track}", settings.track(track).base_model
        if not folder:
            yield _bad(name, "no base model is set", "set base_model in dropforge.toml to a model folder")
            continue
        try:
            check_base(Path(folder))
            for path in model_files(Path(folder)):
                with open_regular(path) as file:
                    file.read(1)
        except DropforgeError as error:
            yield _bad(name, error.message, error.hint)
        except OSError as error:
            yield _bad(name, f"{error.filename}: {error.strerror}", "let the daemon's user read that file")
        else:
            yield _ok(name, folder)


def _memory(settings: Settings) -> Iterator[Finding]:
    for track in (name for name in settings.track_names if settings.track(name).base_model):
        with suppress(OSError, ValueError):  # `bases` says why a base model cannot be read
            text, fits = preflight.memory_needs(settings, track)
            remedy = "free memory, lower train.max_length, or use a smaller base model"
            yield _ok(f"memory of {track}", text) if fits else _warn(f"memory of {track}", text, remedy)


def _champions(settings: Settings) -> Iterator[Finding]:
    """Yield a finding per champion: whether its folder exists and its link leads there; contents are not checked."""
    overview = Overview(settings.state_folder)
    for track in settings.track_names:
        champion = overview.champion(track)
        if champion is None:
            continue
        name, what = f"champion of {track}", f"generation {champion.generation}"
        link = settings.state_folder / "tracks" / track / "champion"
        if not Path(champion.path).is_dir():
            remedy = f"bring it back from a backup, or let another one serve: dropforge history --track {track}"
            yield _bad(name, f"the model of {what} is gone: {champion.path}", remedy)
        elif not link.exists() or not link.samefile(champion.path):
            text = f"{link} does not lead to {what}, {champion.path}"
            yield _bad(name, text, "start the daemon, which mends it: dropforge run")
        else:
            yield _ok(name, f"{what}, {champion.path}")


def needs(settings: Settings) -> Iterator[Finding]:
    """Yield a finding for each package, program and suite that the settings need: found, or missing or unusable."""
    for name, look, of_steps in preflight.needs(settings):
        try:
            yield _ok(name, look())
        except DropforgeError as error:
            # A separate worker has its own environment.
            make = _warn if of_steps and settings.worker == "separate" else _bad
            yield make(name, error.message, error.hint)


def _judge(settings: Settings) -> Iterator[Finding]:
    """Yield findings on judges: whether the API key is set and the host accepts connections; no request is sent."""
    judges = {settings.track(name).judge for name in settings.track_names}
    for judge in sorted((one for one in judges if one.url), key=lambda one: one.url):
        parts = urlsplit(judge.url)
        if judge.api_key_env and not os.environ.get(judge.api_key_env):
            remedy = f"set it where the daemon runs, as in /etc/dropforge/environment; {_NO_JUDGE}"
            yield _warn("judge", f"{judge.api_key_env} is not set in this shell", remedy)
        if not judge.on_this_machine and getproxies().get(parts.scheme):
            yield _ok("judge", f"{judge.url}: behind a proxy, not tried")
            continue
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname, port), timeout=_JUDGE_SECONDS).close()
        except OSError as error:
            yield _warn("judge", f"{judge.url} does not listen: {error}", f"start it, or mend judge.url; {_NO_JUDGE}")
        else:
            yield _ok("judge", f"{judge.url} listens; requests are for the model {judge.model}")


def _daemon(settings: Settings) -> Iterator[Finding]:
    pid = lock_holder(settings.state_folder / LOCK_NAME) if settings.state_folder.is_dir() else None
    if pid is None:
        yield _warn("daemon", "not running", "start it: dropforge run, or systemctl start dropforge")
    else:
        yield _ok("daemon", f"running, process {pid}")
    if pid and settings.worker == "separate" and lock_holder(settings.state_folder / WORKER_LOCK) is None:
        yield _warn("worker", "not running: no step begins", "dropforge worker")


def _clock(settings: Settings) -> Iterator[Finding]:
    now, path = datetime.now().astimezone(), settings.state_folder / DATABASE_NAME
    text = f"{now:%Y-%m-%d %H:%M:%S} {now.tzname()}"
    if now.timestamp() < _BUILT:
        yield _bad("clock", f"{text}: it is wrong", "set it: timedatectl set-ntp true")
        return
    latest = None
    if path.exists():
        with reading(path) as base:
            latest = base.execute("SELECT max(at) AS at FROM event").fetchone().at
    if latest is not None and latest > time.time() * 1000 + 60_000:
        remedy = "it was ahead earlier, or is behind now: timedatectl status"
        yield _warn("clock", f"{text}: events of the future are recorded", remedy)
        return
    zones = {settings.track(name).timezone for name in settings.track_names}
    yield _ok("clock", f"{text}; schedules are in {', '.join(sorted(zones))}")
