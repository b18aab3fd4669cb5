"""The page as the daemon's child: started, looked at, started again when it ends; no training depends on it."""

import contextlib
import subprocess
import sys
from pathlib import Path

import structlog

_FIRST_SECONDS, _MOST_SECONDS = 1.0, 60.0
log = structlog.get_logger()


class WebProcess:
    """`dropforge web` as our child: it lives as long as the pipe to its standard input is open."""

    def __init__(self, config: Path | None) -> None:
        """Prepare a page for the settings in `config`, or those that a command finds by itself."""
        named = [] if config is None else ["--config", str(config.absolute())]
        # -P: a folder called `daemon` where this one was started must not be taken for ours.
        self._argv = [sys.executable, "-P", "-m", "daemon", *named, "web", "--lifeline"]
        self._process: subprocess.Popen[bytes] | None = None
        self._pause = _FIRST_SECONDS
        self._begun = self._not_before = 0.0

    def keep_alive(self, monotonic: float) -> None:
        """Start the page if it is not there; after each early end it is waited for twice as long, a minute at most."""
        if self._process is not None and self._process.poll() is not None:
            lived = monotonic - self._begun
            self._pause = _FIRST_SECONDS if lived > _MOST_SECONDS else min(2 * self._pause, _MOST_SECONDS)
            self._not_before = monotonic + self._pause
            log.warning("web_died", exit_code=self._process.returncode, again_in=self._pause)
            self._process = None
        if self._process is None and monotonic >= self._not_before:
            self._begun = monotonic
            # A session of its own, so that Ctrl-C on the terminal reaches the daemon alone.
            self._process = subprocess.Popen(self._argv, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603 - our own

    @property
    def pid(self) -> int | None:
        """The number of the page's process; `None` while there is none."""
        return None if self._process is None else self._process.pid

    def stop(self) -> None:
        """Ask the page to end; nothing waits for it."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
