"""A dropforge command as the daemon's child process, restarted when it ends."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Sequence

import structlog

from daemon.system.processes import child_environment, kill_group

_FIRST_SECONDS, _LONG_SECONDS = 1.0, 60.0
log = structlog.get_logger()


class ChildProcess:
    """A `dropforge` command with `--lifeline`: it ends when its standard input closes, as when the daemon dies."""

    def __init__(self, name: str, arguments: Sequence[str], *, most_seconds: float) -> None:
        """Prepare `dropforge ARGUMENTS`; `name` is for logs, `most_seconds` the longest pause before a restart."""
        self._name = name
        # -P: a folder called `daemon` where this one was started must not be taken for ours.
        self._argv = [sys.executable, "-P", "-m", "daemon", *arguments, "--lifeline"]
        self._most_seconds = most_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._pause = _FIRST_SECONDS
        self._begun = self._not_before = 0.0

    def keep_alive(self, monotonic: float) -> None:
        """
        Start the process if it is not running and its pause is over, also after exit code 0 or `stop`.

        Call this regularly, with the time in seconds as `monotonic`. The pause doubles after each end within a minute,
        and is a second again after a later one. An end and a failure to start are logged, not raised.
        """
        if self._process is not None and self._process.poll() is not None:
            self._try_later(monotonic, exit_code=self._process.returncode)
            self._process = None
        if self._process is None and monotonic >= self._not_before:
            self._begun = monotonic
            try:
                # A session of its own: Ctrl-C on the terminal reaches the daemon alone, which stops it in order.
                self._process = subprocess.Popen(  # noqa: S603 - our own
                    self._argv, env=child_environment({}), stdin=subprocess.PIPE, start_new_session=True
                )
            except OSError as error:  # no memory, process or descriptor is free, which passes
                self._try_later(monotonic, error=str(error))

    def _try_later(self, monotonic: float, **why: object) -> None:
        lived = monotonic - self._begun
        self._pause = _FIRST_SECONDS if lived > _LONG_SECONDS else min(2 * self._pause, self._most_seconds)
        self._not_before = monotonic + self._pause
        log.warning("child_died", name=self._name, again_in=self._pause, **why)

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Ask the process to end, by closing its standard input; does not wait for it."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def kill(self) -> None:
        """Kill the process with its process group and wait for it; its children in other groups live on."""
        if self._process is not None:
            kill_group(self._process.pid, signal.SIGKILL)
            self._process.wait()
