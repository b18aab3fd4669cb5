"""
The composition root: builds the daemon from its settings, runs it until it is told to stop, and takes it down in order.

Three threads of ours: the main one dispatches, one takes files in, APScheduler's own one pokes both. The worker is a
child process (or a unit of its own) and holds everything that is heavy.
"""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import structlog
from sqlalchemy import Engine

from daemon import queue
from daemon.clock import now_ms
from daemon.database import check, migrate, open_engine, transaction
from daemon.dispatcher import Dispatcher
from daemon.executors.local import LocalExecutor, Spool
from daemon.intake import Intake
from daemon.processes import FileLock, kill_group, lock_holder
from daemon.scheduler import Schedule
from daemon.sd_notify import notify
from daemon.settings import Settings
from daemon.state_folder import DATABASE_NAME, LOCK_NAME, WATCHER_NOTE
from daemon.watcher import Watcher
from pipeline import durable
from pipeline.errors import DropforgeError

_TICK_SECONDS = 0.25
_IDLE_TICK_SECONDS = 0.5
_STATUS_SECONDS = 2.0
_WORKER_RESTART_SECONDS = 1.0
_TROUBLE_SECONDS = 5.0
log = structlog.get_logger()


class AlreadyRunning(DropforgeError):
    """Another daemon works on the same state folder."""


class WorkerProcess:
    """`dropforge worker` as our child: it lives as long as the pipe to its standard input is open."""

    def __init__(self, settings: Settings) -> None:
        """Prepare a worker for the state folder of `settings`."""
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._not_before = 0.0

    def keep_alive(self, monotonic: float) -> None:
        """Start the worker if it is not there, at most once a second."""
        if self._process is not None and self._process.poll() is not None:
            log.warning("worker_died", exit_code=self._process.returncode)
            self._process = None
        if self._process is None and monotonic >= self._not_before:
            self._not_before = monotonic + _WORKER_RESTART_SECONDS
            # -P: a folder called `daemon` where this one was started must not be taken for ours.
            argv = [sys.executable, "-P", "-m", "daemon", "worker", "--lifeline", "--state", self._settings.state]
            # A session of its own, so that Ctrl-C on the terminal reaches the daemon alone, which stops it in order.
            self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603 - our own

    def stop(self) -> None:
        """Ask the worker to end: its step leaves a checkpoint first."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def stop_now(self) -> None:
        """Ask the worker to end its step without grace."""
        if self._process is not None:
            for _ in range(2):
                kill_group(self._process.pid, signal.SIGTERM)
                time.sleep(_TICK_SECONDS)

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End it in any case; its step notices through its own pipe."""
        if self._process is not None:
            kill_group(self._process.pid, signal.SIGKILL)
            self._process.wait()


class IntakeLoop:
    """The thread that turns settled files into drops."""

    def __init__(self, engine: Engine, settings: Settings, poke: Callable[[], None]) -> None:
        """Watch the inbox of `settings`; `poke` is called after each file taken."""
        self._poke = poke
        self.wake = threading.Event()
        self.stop = threading.Event()
        self._settings = settings
        self._watcher = Watcher(settings, self.wake)
        self._intake = Intake(engine, settings)
        self._note: object = None
        self._thread = threading.Thread(target=self._run, name="intake")

    def start(self) -> None:
        """Begin to watch."""
        self._watcher.start()
        self._thread.start()

    def finish(self) -> None:
        """Stop after the file in hand; what has not been taken stays in the inbox."""
        self.stop.set()
        self.wake.set()
        self._thread.join()
        self._watcher.stop()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self.stop.is_set():
            pause = self._settings.reconcile_seconds
            try:
                self._scan()
                due = self._watcher.next_due(time.monotonic())
                pause = pause if due is None else min(pause, max(due, 0.05))
            except DropforgeError as error:
                log.warning("intake_trouble", error=error.message, hint=error.hint)
                pause = _TROUBLE_SECONDS
            except Exception:  # the thread must outlive whatever one file or a full disk does to it
                log.exception("intake_trouble")
                pause = _TROUBLE_SECONDS
            self.wake.wait(pause)
            self.wake.clear()

    def _scan(self) -> None:
        for settled in self._watcher.scan(time.monotonic()):
            if self.stop.is_set():
                return
            outcome = self._intake.take(settled, now_ms())
            if outcome.kind in {"accepted", "rejected", "duplicate"}:
                log.info("file_taken", outcome=str(outcome))
                self._poke()
            else:
                log.debug("file_left", outcome=str(outcome))
        self._write_note()

    def _write_note(self) -> None:
        """Tell `dropforge status` what the inbox holds that is not taken, when that has changed."""
        note = {
            "waiting": self._watcher.waiting(),
            "unknown_folders": self._watcher.unknown_folders(),
            "full_tracks": self._intake.full_tracks(),
        }
        if note != self._note:
            self._note = note
            durable.write_hint(self._settings.state_folder / WATCHER_NOTE, note)


class Service:
    """The whole daemon."""

    def __init__(self, settings: Settings) -> None:
        """
        Take the state folder's lock and open the database.

        Raises `AlreadyRunning` if another daemon has the lock.
        """
        self._settings = settings
        root = settings.state_folder
        for folder in (root, root / "drops", root / "runs", root / "models", root / "tracks"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = FileLock(root / LOCK_NAME)
        if not self._lock.acquire():
            message = f"another daemon (process {lock_holder(root / LOCK_NAME)}) works on {root}"
            raise AlreadyRunning(
                message, "see what it does: dropforge status; or give this one a state folder of its own"
            )
        durable.remove_leftovers(root, WATCHER_NOTE)
        migrate(root / DATABASE_NAME)
        self._engine = open_engine(root / DATABASE_NAME)
        check(self._engine)
        self.stop = threading.Event()
        self.stop_now = threading.Event()
        self._wake = threading.Event()
        self._dispatcher = Dispatcher(self._engine, settings, LocalExecutor(root))
        self._intake = IntakeLoop(self._engine, settings, self._wake.set)
        self._schedule = Schedule(self._engine, settings, self._wake.set)
        self._worker = WorkerProcess(settings)
        self._said = ""
        self._said_at = 0.0

    def on_signal(self, number: int, _frame: object) -> None:
        """Begin an orderly end; a second signal ends it without grace."""
        if self.stop.is_set():
            self.stop_now.set()
        log.info("stop_requested", signal=signal.Signals(number).name)
        self.stop.set()
        self._wake.set()

    def run(self) -> None:
        """Recover, then work until `stop` is set, then end in order."""
        Spool(self._settings.state_folder)
        with transaction(self._engine) as session:
            for name in self._settings.track_names:
                queue.ensure_track(session, name, now_ms())
        self._dispatcher.recover(now_ms())
        self._intake.start()
        self._schedule.start()
        notify("READY=1", "STATUS=ready")
        log.info("daemon_ready", inbox=self._settings.inbox, state=self._settings.state)
        try:
            while not self.stop.is_set():
                self._beat()
                self._wake.wait(_IDLE_TICK_SECONDS if self._dispatcher.idle else _TICK_SECONDS)
                self._wake.clear()
        finally:
            self._end()

    def _beat(self) -> None:
        """One turn of the main loop."""
        monotonic = time.monotonic()
        if self._settings.worker == "child":
            self._worker.keep_alive(monotonic)
        try:
            self._dispatcher.tick(now_ms())
        except Exception:  # a full disk or a locked database passes; the daemon must outlive it
            log.exception("dispatch_trouble")
            self.stop.wait(_TROUBLE_SECONDS)
            return
        if self._intake.alive:
            notify("WATCHDOG=1")
        if monotonic - self._said_at >= _STATUS_SECONDS:
            self._said_at = monotonic
            said = self._dispatcher.describe()
            if said != self._said:
                self._said = said
                notify(f"STATUS={said}")

    def _end(self) -> None:
        """Stop taking, stop the worker with a checkpoint, let the run wait, give the lock back."""
        notify("STOPPING=1", "STATUS=stopping: the running step leaves a checkpoint")
        self._schedule.stop()
        self._intake.finish()
        self._dispatcher.draining = True
        if self._settings.worker == "child":
            self._end_worker()
            self._dispatcher.tick(now_ms())
            self._dispatcher.abandon(now_ms())
        self._engine.dispose()
        self._lock.release()
        log.info("daemon_stopped")

    def _end_worker(self) -> None:
        self._worker.stop()
        end = time.monotonic() + self._settings.grace_seconds + _TROUBLE_SECONDS
        while self._worker.alive and time.monotonic() < end:
            self._dispatcher.tick(now_ms())
            notify("WATCHDOG=1")
            if self.stop_now.is_set():
                self._worker.stop_now()
                self.stop_now.clear()
            self._wake.wait(_TICK_SECONDS)
            self._wake.clear()
        self._worker.kill()


def run(settings: Settings) -> int:
    """Run the daemon until SIGTERM or SIGINT; return the exit code. Raises `AlreadyRunning`."""
    service = Service(settings)
    signal.signal(signal.SIGTERM, service.on_signal)
    signal.signal(signal.SIGINT, service.on_signal)
    service.run()
    return 0
