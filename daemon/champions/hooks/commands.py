"""
Run a user's command in the background: no shell, a new process group, a time limit.

The last 4 kB of its output are kept.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass

from daemon.system.processes import kill_group, signal_name
from pipeline.words import printable

#: Bytes of output that are kept.
KEPT_OUTPUT = 4096
#: Characters of a line of output that are shown beside an error.
_LONGEST_LINE = 200
_LOOK_SECONDS = 0.1
#: How long the rest of the output is waited for after the end of a command that leaves processes in the background.
_LAST_SECONDS = 1.0
_CHUNK = 1 << 16


def last_line(output: str | None) -> str:
    """Return the last line of `output`, at most 200 characters, escaped; skip blank and "hint: " lines; "" if none."""
    lines = [line.strip() for line in (output or "").splitlines() if line.strip() and not line.startswith("hint: ")]
    words = printable(lines[-1]) if lines else ""
    return words if len(words) <= _LONGEST_LINE else f"{words[: _LONGEST_LINE - 1]}…"


@dataclass(frozen=True)
class Ended:
    """Result of a command: its error, if any, and the end of its output."""

    error: str | None
    """Why it failed; `None` if it ended with exit code 0."""
    output: str
    """The last 4 kB that it printed, standard output and error together."""


class Command:
    """
    A started command and the thread that watches it.

    Its background processes go on after its end, unless it ran out of time or was killed. Their later output is read
    and discarded until this process ends.
    """

    def __init__(self, argv: tuple[str, ...], environment: dict[str, str], seconds: float) -> None:
        """
        Start `argv` in a thread, in the folder where the daemon was started; `seconds` is the time limit.

        A command that cannot be started raises nothing: `ended` has the error.
        """
        self._argv = argv
        self._environment = environment
        self._seconds = seconds
        self._tail = b""
        self._ended = Ended("it could not be followed", "")
        self._killed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hook")
        self._thread.start()

    def ended(self) -> Ended | None:
        """Return the command's result; `None` while it runs."""
        return None if self._thread.is_alive() else self._ended

    def wait(self) -> Ended:
        """Wait for the command to end, at its time limit at the latest, and return its result."""
        self._thread.join()
        return self._ended

    def kill(self) -> None:
        """Kill the command with its process group, if it still runs, and wait for its end."""
        self._killed.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            process = subprocess.Popen(  # noqa: S603 - the user's own argument list, never a shell
                self._argv,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            # Of a script that is there, "No such file" is said of its interpreter.
            if shutil.which(self._argv[0], path=self._environment.get("PATH")) is not None:
                words = f"{words}; if it is a script, look at its #! line"
            self._ended = Ended(f"it could not be started: {self._argv[0]}: {words}", "")
            return
        # It reads to the end of the pipe, which background processes may hold open: a closed or full one would end or
        # stop them.
        reader = threading.Thread(target=self._read, args=(process,), name="hook output", daemon=True)
        reader.start()
        wrong = self._follow(process)
        reader.join(_LAST_SECONDS)
        self._ended = Ended(wrong, self._tail.decode("utf-8", "replace"))

    def _follow(self, process: subprocess.Popen[bytes]) -> str | None:
        """Wait for the command's end, or kill it at its time limit; return its error, or `None`."""
        end = time.monotonic() + self._seconds
        while True:
            left = end - time.monotonic()
            if left <= 0 or self._killed.is_set():
                kill_group(process.pid, signal.SIGKILL)
                process.wait()
                return "it was stopped with the daemon" if left > 0 else f"no end within {self._seconds:g} s"
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(min(left, _LOOK_SECONDS))
                break
        if code < 0:
            return f"killed by {signal_name(-code)}"
        return f"exit code {code}" if code else None

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        """Read the output to its end; keep the last 4 kB."""
        assert process.stdout is not None  # noqa: S101 - it was given a pipe
        with process.stdout as pipe:
            while chunk := os.read(pipe.fileno(), _CHUNK):
                self._tail = (self._tail + chunk)[-KEPT_OUTPUT:]
