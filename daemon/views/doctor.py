"""Checks of a machine and a workspace: each changes nothing, and each problem found comes with a remedy."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from daemon.champions.smoke_test import can_try, try_adapter, try_gpu
from daemon.inbox.drop_folders import watched_folders
from daemon.settings.model import Settings
from daemon.state.database_file import SCHEMA, file_system, how_to_restore, in_words, is_network, schema_of, verify
from daemon.state.layout import DATABASE_NAME, LOCK_NAME, RESTORING, WORKER_LOCK
from daemon.state.ownership import ShareGone, require_share
from daemon.storage.backup import named_files
from daemon.storage.disk import Disk
from daemon.storage.disk_estimate import CannotTell, needed_bytes
from daemon.system.processes import lock_holder
from daemon.views.overview import Overview
from daemon.views.preflight import Finding, adapter_words, bad, bases, needs, ok, warn
from daemon.views.slurm_probe import slurm
from pipeline.config import TrainConfig
from pipeline.errors import DropforgeError, os_words
from pipeline.models.gpu_driver import nvidia_driver
from pipeline.words import count, shell_path, size_words


def examine(settings: Settings) -> list[Finding]:
    """
    Run all checks and return their findings; a check that raises an exception gives a finding of level "bad".

    Checked are, in this order, the database, file systems, free space, inbox, base models, champions, required packages
    and programs, the GPU, the judge's API key, Slurm by a job, and whether the daemon runs, with its troubles. If the
    shared folder is gone, only this and the daemon are reported. Nothing is changed.
    """
    findings: list[Finding] = []
    checks: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
        _database,
        _file_systems,
        _space,
        _inbox,
        _bases,
        _champions,
        needs,
        _gpu,
        _judge,
        slurm,
        _daemon,
    )
    try:
        require_share(settings)
    except ShareGone as error:  # the other checks read files in it
        findings, checks = [bad("shared folder", error.message, error.hint)], (_daemon,)
    for check in checks:
        name = check.__name__.strip("_").replace("_", " ")
        try:
            findings += check(settings)
        except OSError as error:
            remedy = "ask as the user that the daemon runs as: sudo -u USER dropforge doctor"
            findings.append(bad(name, os_words(error), remedy))
        except Exception as error:  # noqa: BLE001 - the other checks are made whatever this one runs into
            path = settings.state_folder / DATABASE_NAME
            words = error if isinstance(error, DropforgeError) else in_words(error, path)
            words = words or DropforgeError(f"{type(error).__name__}: {error}", "this is a defect, please report it")
            findings.append(bad(name, words.message, words.hint))
    return findings


def _database(settings: Settings) -> Iterator[Finding]:
    path = settings.state_folder / DATABASE_NAME
    if (settings.state_folder / RESTORING).exists():
        yield bad("database", "a restore was interrupted", "do it again: dropforge restore BACKUP")
        return
    if not path.exists():
        yield warn("database", f"there is none yet at {path}", "start the daemon: dropforge run")
        return
    counts = verify(path)
    schema = schema_of(path)
    rows = f"{count(counts.get('run', 0), 'run')}, {count(counts.get('drop', 0), 'drop')}"
    text = f"whole; schema {schema}, this version has {SCHEMA}; {rows}"
    remedy = f"install the version that made it; or {how_to_restore(path)}"
    yield ok("database", text) if schema == SCHEMA else bad("database", text, remedy)
    names = [name for name, _ in named_files(settings.work_folder, path)]
    missing = [name for name in names if not (settings.work_folder / name).exists()]
    if missing:
        of = "that the database names"
        yield bad(
            "drops",
            f"{count(len(missing), f'file {of} is', f'files {of} are')} not there: {missing[0]}",
            "put it back from a backup, or take its drop out: dropforge drops withdraw DROP --reason WHY",
        )


def _file_systems(settings: Settings) -> Iterator[Finding]:
    kind, where = file_system(settings.state_folder), settings.state
    remedy = 'put it on a local disk: state = "/a/local/folder" in dropforge.toml'
    network = bad("state", f"{where} lies on {kind}, a network file system", remedy)
    yield network if is_network(kind) else ok("state", f"{where} on {kind}")
    if settings.executor.kind == "slurm":
        kind, where = file_system(settings.work_folder), str(settings.work_folder)
        remedy = 'name a folder that all nodes see: shared = "/a/shared/folder" in [executor]'
        local = warn("shared", f"{where} lies on {kind}, which other hosts may not see", remedy)
        yield ok("shared", f"{where} on {kind}") if is_network(kind) else local
    kind, where = file_system(settings.inbox_folder), settings.inbox
    remedy = 'files that other hosts drop are seen late; set observer = "polling" in dropforge.toml'
    late = is_network(kind) and settings.observer == "native"
    yield warn("inbox", f"{where} lies on {kind}", remedy) if late else ok("inbox", f"{where} on {kind}")


def _space(settings: Settings) -> Iterator[Finding]:
    free = Disk(settings).free_bytes()
    needed = [0]
    for track in (settings.track(name) for name in settings.track_names):
        with suppress(CannotTell):  # `bases` says why a base model cannot be read
            needed.append(sum(needed_bytes(track).values()) if track.base_model else 0)
    need, kept = max(needed), settings.disk.low_water_bytes
    text = (
        f"{size_words(free)} free for {settings.executor.shared or 'the state folder'}; a run takes up to "
        f"{size_words(need)} besides its drops, and {size_words(kept)} stay free (disk.low_water_bytes)"
    )
    remedy = f"free some, or move {'executor.shared' if settings.executor.shared else 'state'} to a larger disk"
    yield bad("space", text, remedy) if free < need + kept else ok("space", text)


def _inbox(settings: Settings) -> Iterator[Finding]:
    if not settings.inbox_folder.is_dir():
        yield warn("inbox", f"there is no {settings.inbox} yet", "make it: dropforge init")
        return
    folders = [watched.path for watched in watched_folders(settings) if watched.path.is_dir()]
    unusable = [str(folder) for folder in folders if not os.access(folder, os.R_OK | os.W_OK | os.X_OK)]
    if unusable:
        remedy = f"let this user list and change it: ls -ld {shell_path(unusable[0])}"
        yield bad("inbox rights", f"{unusable[0]} is not writable", remedy)
    for folder in folders:
        mode = folder.stat().st_mode
        if mode & (stat.S_IWGRP | stat.S_IWOTH) and not mode & stat.S_ISVTX:
            text = f"{folder}: who may drop files may take away and replace what others dropped"
            yield warn("inbox rights", text, f"chmod +t {shell_path(folder)}")


def _bases(settings: Settings) -> Iterator[Finding]:
    """Yield a finding per track on its base model, as `bases` does; a training's adapter is tried, too."""

    def look(folder: str, train: TrainConfig) -> str:
        return "; ".join([folder, *adapter_words(try_adapter(folder, train))])

    yield from bases(settings, look)


def _champions(settings: Settings) -> Iterator[Finding]:
    """Yield a finding per champion: "bad" if its folder is missing or its link leads elsewhere; no file is read."""
    for champion in Overview.of(settings).champions(settings.track_names):
        track = champion.track
        name, what = f"champion of {track}", f"generation {champion.generation}"
        link = settings.work_folder / "tracks" / track / "champion"
        if not Path(champion.path).is_dir():
            remedy = f"bring it back from a backup, or let another one serve: dropforge history --track {track}"
            yield bad(name, f"the model of {what} is gone: {champion.path}", remedy)
        elif not link.exists() or not link.samefile(champion.path):
            text = f"{link} does not lead to {what}, {champion.path}"
            yield bad(name, text, "start the daemon, which mends it: dropforge run")
        else:
            yield ok(name, f"{what}, {champion.path}")


def _gpu(settings: Settings) -> Iterator[Finding]:
    """
    Yield findings on the GPUs: "ok" if the operations of a training work, else a warning for each that fails.

    If the GPU cannot be used at all, "bad", or a warning with a separate worker. None are yielded if steps use the CPU,
    or NVIDIA's driver or the training stack is missing.
    """
    if settings.device == "cpu" or not nvidia_driver() or not can_try():
        return
    try:
        answer = try_gpu()
    except DropforgeError as error:
        make = warn if settings.worker == "separate" else bad
        yield make("GPU", error.message, error.hint)
        return
    gpus = [
        f"{gpu['name']} (compute capability {gpu['capability']}, {size_words(gpu['free'])} of "
        f"{size_words(gpu['total'])} free)"
        for gpu in answer["gpus"]
    ]
    text = f"{', '.join(gpus)}; driver {answer['driver']}, torch {answer['torch']} for CUDA {answer['cuda']}"
    if answer["nf4"] or not answer["bitsandbytes"]:
        reason = answer["nf4"] or "its library is built for the CPU"
        remedy = 'pip install --upgrade bitsandbytes, or set train.quantization = "none"'
        yield warn("GPU", f"{text}; bitsandbytes cannot compute in NF4: {reason}", remedy)
    if answer["packed_attention"]:
        remedy = "trainings pad their records, which is slower; install a newer torch"
        yield warn("GPU", f"{text}; attention over packed records fails: {answer['packed_attention']}", remedy)
    if answer["bitsandbytes"] and not (answer["nf4"] or answer["packed_attention"]):
        yield ok("GPU", f"{text}; bf16, NF4 and attention over packed records work")


def _judge(settings: Settings) -> Iterator[Finding]:
    """Yield a warning for each environment variable of a judge's API key that is not set in this process."""
    judges = [settings.track(name).judge for name in settings.track_names]
    for key in sorted({judge.api_key_env for judge in judges if judge.url and judge.api_key_env} - os.environ.keys()):
        remedy = "set it where the daemon runs, as in /etc/dropforge/environment; without it there is no judge"
        yield warn("judge", f"{key} is not set in this shell", remedy)


def _daemon(settings: Settings) -> Iterator[Finding]:
    pid = lock_holder(settings.state_folder / LOCK_NAME) if settings.state_folder.is_dir() else None
    if pid is None:
        yield warn("daemon", "not running", "start it: dropforge run, or systemctl start dropforge")
    else:
        yield ok("daemon", f"running, process {pid}")
        for whose, words in Overview.of(settings).troubles().items():
            yield warn("trouble", f"{whose}: {words}", "see what the daemon does: dropforge status")
    if pid and settings.worker == "separate" and lock_holder(settings.state_folder / WORKER_LOCK) is None:
        yield warn("worker", "not running: no step begins", "dropforge worker")
