"""The worker as the daemon's child: started, looked at, started again when it ends."""

import contextlib
import signal
import subprocess
import sys

import structlog

from daemon.dispatch.worker import end_steps_now
from daemon.settings.model import Settings
from daemon.system.processes import kill_group

_WORKER_RESTART_SECONDS = 1.0
log = structlog.get_logger()


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

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End it in any case, and its step with it."""
        if self._process is not None:
            self.let_go()
            end_steps_now(self._settings.state_folder)

    def let_go(self) -> None:
        """End the worker alone; its step notices, and stops by itself."""
        if self._process is not None:
            kill_group(self._process.pid, signal.SIGKILL)
            self._process.wait()
