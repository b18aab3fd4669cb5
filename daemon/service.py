"""
Composition root: builds the daemon from its settings, runs it until it is told to stop, and shuts it down in order.

The main thread runs schedule and dispatcher; further threads take files in, send messages and receive signals. The
heavy work is done by the worker, which is a child process or a systemd unit.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import structlog

from daemon.champions.hooks.changes import Hooks
from daemon.dispatch.dispatcher import Dispatcher
from daemon.dispatch.slurm import SlurmExecutor
from daemon.dispatch.spool import LocalExecutor, Spool, refuse_moved
from daemon.dispatch.worker import end_steps
from daemon.inbox.loop import TROUBLE_SECONDS, IntakeLoop
from daemon.messages.outbox import Messenger
from daemon.queue import states
from daemon.queue.nightly import Schedule
from daemon.settings.in_force import WHOSE, SettingsInForce
from daemon.settings.model import Settings, SettingsError
from daemon.state.database import create, open_engine, transaction
from daemon.state.database_file import refuse_network, verify
from daemon.state.layout import DATABASE_NAME, LOCK_NAME, TRASH_NAME, TROUBLES_NOTE, WORKER_LOCK
from daemon.state.ownership import OwnFolder, ShareGone, StateFolderGone, installation_id, require_share
from daemon.state.troubles import Troubles
from daemon.storage.disk import is_full
from daemon.storage.restore import refuse_half_restored
from daemon.system.child_process import ChildProcess
from daemon.system.clock import now_ms
from daemon.system.processes import FileLock, lock_holder, on_stop
from daemon.system.sd_notify import notify, showing_life
from daemon.views.overview import Overview
from pipeline import durable
from pipeline.contract import GRACE_SECONDS
from pipeline.errors import EXIT_FAILED, DropforgeError

_TICK_SECONDS = 0.25
_IDLE_TICK_SECONDS = 0.5
_STATUS_SECONDS = 2.0
_WORKER_AGAIN_SECONDS, _PAGE_AGAIN_SECONDS = 1.0, 60.0
log = structlog.get_logger()


class Service:
    """The daemon: intake, schedule, dispatcher, hooks, messenger, and worker and web server as child processes."""

    def __init__(self, settings: Settings, config: Path | None = None) -> None:
        """
        Make the folders, take the lock, create or verify the database, and build the parts; only Slurm's thread starts.

        Raises `DropforgeError` if folder, lock or database cannot be used, or if steps with open attempts are to run
        elsewhere now (`refuse_moved`).
        """
        self._settings = settings
        self._in_force = SettingsInForce(settings, config)
        root, work = settings.state_folder, settings.work_folder
        self._folder, self._lock = _open_folders(settings)
        create(root / DATABASE_NAME)
        self._engine = open_engine(root / DATABASE_NAME, keep=True)
        weakref.finalize(self, self._engine.dispose)  # for one that never comes to its end
        verify(root / DATABASE_NAME, at_start=True)
        self.stop = threading.Event()
        self.exit_code = 0
        #: Whether the daemon is to begin again after the shutdown, with the settings as they are then.
        self.begins_again = False
        self._wake = threading.Event()
        self._troubles = Troubles()
        self._spool = Spool(root, work)
        on_nodes = settings.executor.steps_on_nodes
        refuse_moved(self._spool, on_nodes)
        self._slurm: SlurmExecutor | None = None
        if on_nodes:
            self._slurm = SlurmExecutor(installation_id(settings), work, settings.executor, self._troubles)
        nodes = dict.fromkeys(on_nodes, self._slurm) if self._slurm else {}
        local = LocalExecutor(self._spool)
        self._dispatcher = Dispatcher(self._engine, settings, local, self._troubles, nodes)
        self._intake = IntakeLoop(self._engine, settings, self._folder, self._wake.set)
        self._hooks = Hooks(self._engine, settings, troubles=self._troubles)
        self._messenger = Messenger(self._engine, settings, self._troubles)
        self._schedule = Schedule(self._engine, settings, self._night_began)
        here = ("--state", settings.state, "--work", str(work), "--parallel", str(settings.executor.parallel_here))
        self._worker = ChildProcess("worker", ["worker", *here], most_seconds=_WORKER_AGAIN_SECONDS)
        named = [] if config is None else ["--config", str(config.absolute())]
        self._web = ChildProcess("web", [*named, "web"], most_seconds=_PAGE_AGAIN_SECONDS)
        self._noted: dict[str, str] = {}
        self._status = ""
        self._described_at = 0.0

    def on_signal(self, number: int) -> None:
        """
        Begin an orderly shutdown; at a second signal exit at once, with 128 plus the signal's number.

        In that case a child worker and its step are killed: what is on disk is as safe as after a power cut, and the
        run waits without a failure being counted. At SIGHUP set `begins_again`, too, unless the settings file cannot be
        used, which becomes a trouble; during a shutdown SIGHUP does nothing.
        """
        if number == signal.SIGHUP:
            problem = self._in_force.difference()
            if isinstance(problem, SettingsError):
                log.warning("reload_refused", error=problem.message, hint=problem.hint)
            elif not self.stop.is_set():
                log.info("reload_requested")
                self.begins_again = True
                self.stop.set()
                self._wake.set()
            return
        if self.begins_again:
            self.begins_again = False
        elif self.stop.is_set():
            log.warning("stopping_now", signal=signal.Signals(number).name)
            # The main thread may come to its end before this one does.
            self.exit_code = 128 + number
            try:
                self._kill_worker()
            finally:  # a full disk must not keep it from ending
                os._exit(self.exit_code)
        log.info("stop_requested", signal=signal.Signals(number).name)
        self.stop.set()
        self._wake.set()

    def run(self) -> None:
        """
        Recover from a crash, work until `stop` is set, then shut down in order.

        Raises `DropforgeError` at once if the inbox cannot be used, after the shutdown if the intake fails. If the
        state folder is taken away, one error is logged and the process exits with code 1 at once, without a shutdown.
        """
        with transaction(self._engine) as session:
            for name in self._settings.track_names:
                states.ensure_track(session, name, now_ms())
        self._dispatcher.recover(now_ms())
        self._messenger.start(now_ms())
        self._intake.start()
        notify("READY=1", "STATUS=ready")
        log.info("daemon_ready", inbox=self._settings.inbox, state=self._settings.state)
        try:
            while not self.stop.is_set():
                self._beat()
                self._wake.wait(_IDLE_TICK_SECONDS if self._dispatcher.idle else _TICK_SECONDS)
                self._wake.clear()
        except StateFolderGone as error:
            self._end_without_folder(error)
        finally:
            self._end()

    def _end_without_folder(self, error: StateFolderGone) -> None:
        """Log one error and exit at once with code 1: nothing can be recorded, and no folder may be created again."""
        log.error("state_folder_gone", error=error.message, hint=error.hint)
        self._worker.kill()  # its step notices, and stops by itself
        self._web.stop()
        os._exit(EXIT_FAILED)

    def _beat(self) -> None:
        """
        Run one turn of the main loop; pause if a part of it failed.

        Raises `StateFolderGone`, or `DropforgeError` if the intake has failed.
        """
        self._folder.require_there()
        self._intake.require_alive()
        monotonic = time.monotonic()
        if self._settings.worker == "child":
            self._worker.keep_alive(monotonic)
        if self._settings.web.enabled:
            self._web.keep_alive(monotonic)
        is_well = self._tick()
        # Waiting for room on the disk is being alive, too: systemd's watchdog must not end the training over it.
        notify("WATCHDOG=1")
        if not is_well:
            self.stop.wait(TROUBLE_SECONDS)

    def _look_for_worker(self) -> None:
        """Note a trouble if a run is claimed and no worker runs, unless the worker is a child, which is restarted."""
        root = self._settings.state_folder
        if self._settings.worker == "child" or self._dispatcher.idle or lock_holder(root / WORKER_LOCK) is not None:
            self._troubles.clear("the worker")
        else:
            words = 'no worker runs, so runs wait: start the unit of `dropforge worker`, or set worker = "child"'
            self._troubles.note("the worker", DropforgeError(words))

    def _tick(self) -> bool:
        """Call schedule, dispatcher, hooks and status report; log exceptions, and return whether there were none."""
        # Call each of them, whether or not the previous one failed.
        schedule = () if self.stop.is_set() else (self._schedule.tick,)
        parts = (*schedule, self._dispatch, self._run_hooks, self._tell)
        well = [self._does(part) for part in parts]
        return all(well)

    def _dispatch(self, now: int) -> None:
        before = self._dispatcher.claimed
        self._dispatcher.tick(now)
        if before - self._dispatcher.claimed:
            # The intake then writes the run's outcome into the notes beside the drops' files.
            self._intake.wake.set()

    def _run_hooks(self, now: int) -> None:
        require_share(self._settings, renew=True)
        self._troubles.clear("shared folder")
        self._hooks.tick(now)

    def _tell(self, _now: int) -> None:
        """Note a missing worker; tell systemd a changed status, and write changed troubles for `dropforge status`."""
        monotonic = time.monotonic()
        if not self.stop.is_set() and monotonic - self._described_at >= _STATUS_SECONDS:
            self._described_at = monotonic
            self._look_for_worker()
            self._troubles.note(WHOSE, self._in_force.difference())
            status, self._status = self._status, self._dispatcher.describe()
            if status != self._status:
                notify(f"STATUS={self._status}")
        if self._troubles.words != self._noted:
            self._noted = self._troubles.words
            with contextlib.suppress(OSError):
                durable.write_hint(self._settings.state_folder / TROUBLES_NOTE, self._noted)

    def _does(self, part: Callable[[int], object]) -> bool:
        try:
            part(now_ms())
        except ShareGone as error:  # nothing is changed until it is back
            self._troubles.note("shared folder", error, message=True)
            return False
        except Exception as error:  # a full disk or a locked database passes; the daemon must outlive it
            self._folder.require_there()
            if is_full(error):
                log.warning("disk_full", error=str(error))
                # A restart by systemd's watchdog would not help.
                notify("WATCHDOG=1", "STATUS=the disk is full: nothing can be recorded until there is room")
            else:
                log.exception("dispatch_trouble")
            return False
        return True

    def _night_began(self) -> None:
        """Allow a garbage collection before the night's first run, and wake the main loop."""
        self._dispatcher.upkeep.may_collect = True
        self._wake.set()

    def _end(self) -> None:
        """
        Shut down: stop the page, hooks, intake and messages, and release the lock.

        A child worker stops after its steps left checkpoints, and the claimed runs are set to waiting; the steps of a
        worker unit, or of Slurm, go on.
        """
        if self.begins_again:
            notify("RELOADING=1", "STATUS=reloading: running steps leave checkpoints")
        else:
            notify("STOPPING=1", "STATUS=stopping: running steps leave checkpoints")
        self._web.stop()
        self._dispatcher.draining = True
        if self._settings.worker == "child":
            # First of all: a large file that is being read may take minutes, and the checkpoint need not wait for it.
            self._worker.stop()
        showing_life(self._hooks.stop)
        showing_life(self._intake.finish)
        showing_life(self._dispatcher.upkeep.finish)
        if self._settings.worker == "child":
            self._end_worker()
            self._tick()
            self._dispatcher.abandon(now_ms())
        if self._slurm is not None:
            showing_life(self._slurm.stop)
        showing_life(self._dispatcher.give_gpu_back)
        showing_life(self._messenger.finish)
        self._engine.dispose()
        try:
            left = Overview.of(self._settings).open_runs()
        except (DropforgeError, OSError):
            left = []  # reported before; the shutdown goes on
        self._lock.release()
        words = [", ".join(filter(None, (f"run {run.id}", run.state, run.step))) for run in left]
        log.info("daemon_stopped", open_runs=words)
        notify("STATUS=stopped")

    def _end_worker(self) -> None:
        self._worker.stop()
        end = time.monotonic() + GRACE_SECONDS + TROUBLE_SECONDS
        while self._worker.alive and time.monotonic() < end:
            self._tick()
            notify("WATCHDOG=1")
            self._wake.wait(_TICK_SECONDS)
            self._wake.clear()
        self._kill_worker()

    def _kill_worker(self) -> None:
        """Kill the child worker and its steps, whose results become "interrupted"; do nothing for a worker unit."""
        if self._settings.worker == "child":
            self._worker.kill()
            end_steps(self._spool, now=True)


def _open_folders(settings: Settings) -> tuple[OwnFolder, FileLock]:
    """Make the folders, lock and tidy the state folder; return it and its lock. Raises `DropforgeError` if unusable."""
    root, work = settings.state_folder, settings.work_folder
    refuse_network(root)
    folder = OwnFolder(root, "run")
    OwnFolder(work, "run").close()
    if settings.executor.steps_on_nodes or settings.executor.shared:
        installation_id(settings)
    require_share(settings, renew=True)
    for path in (work / "drops", work / "runs", work / "models", work / "tracks", work / TRASH_NAME):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(root / LOCK_NAME)
    if not lock.acquire():
        message = f"another daemon (process {lock_holder(root / LOCK_NAME)}) works on {root}"
        raise DropforgeError(message, "see what it does: dropforge status; or give this one a state folder of its own")
    refuse_half_restored(root)
    with contextlib.suppress(OSError):  # of a daemon that is gone; `_tell` replaces the note
        (root / TROUBLES_NOTE).unlink(missing_ok=True)
        for used in (root, work):
            durable.remove_leftovers(used)
    return folder, lock


def run(settings: Settings, config: Path | None = None) -> int:
    """
    Run the daemon until SIGTERM or SIGINT; return the exit code: 0, or 128 plus the number of a second signal.

    At SIGHUP this program is executed anew in the same process, which reads its settings. `config` is the path of the
    settings file, if one was named. Raises `DropforgeError` if state folder or inbox cannot be used or the intake
    fails. If the state folder is taken away, the process exits at once with code 1.
    """
    service = Service(settings, config)
    on_stop(service.on_signal, signal.SIGHUP)
    service.run()
    if service.begins_again:
        # Until the new program handles it.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - as this process was started
    return service.exit_code
