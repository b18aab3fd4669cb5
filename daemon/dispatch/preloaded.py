"""
Fork a run's steps from a process that has imported their libraries, `pipeline.preload`; there is one per run.

It is started with `prepare` and imports meanwhile. A step that cannot be forked, as that process was killed or has
another environment, is started as a program: so is a step for which another number of processors is free, since the
number of threads is fixed when their library is loaded.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from daemon.system.processes import identify, kill_group, wait_until_dead
from pipeline.contract import StepSpec

_LONGEST_ANSWER = 32
_KILL_SECONDS = 60.0


class Program(NamedTuple):
    """A step's argument list, the folder that it runs in, its environment, and the open file for its output."""

    argv: Sequence[str]
    folder: Path
    environment: Mapping[str, str]
    log: IO[bytes]


class CannotFork(OSError):
    """A step cannot be forked, and is to be started as a program."""


def fork_nothing(_spec: StepSpec, _program: Program, _lifeline: int) -> "Fork":
    """Raise `CannotFork`: each step is started as a program."""
    raise CannotFork


class Preloaded:
    """Per run, a process that has imported the steps' libraries, from which the run's steps are forked."""

    def __init__(self) -> None:
        """Start no process yet."""
        self._of_run: dict[int, _Preload] = {}
        self._lock = threading.Lock()

    def fork(self, spec: StepSpec, program: Program, lifeline: int) -> "Fork":
        """
        Fork a step, which inherits the file descriptor `lifeline`, from the run's process, once that has its libraries.

        Raises `CannotFork` if the run has no living process with the step's environment, if the step forked last still
        runs, and for the run's first `prepare`, with which that process is started.
        """
        with self._lock:
            for run in [run for run, preload in self._of_run.items() if preload.has_ended()]:
                self._of_run.pop(run).end()
            if spec.step == "prepare" and spec.run not in self._of_run:
                self._of_run[spec.run] = _Preload(program.environment)
                raise CannotFork
            preload = self._of_run.get(spec.run)
        if preload is None or preload.environment != program.environment:
            raise CannotFork
        return preload.fork(program, lifeline)

    def close(self) -> None:
        """Kill the processes; the caller has ended the steps that were forked."""
        for preload in self._of_run.values():
            preload.end()


class _Preload:
    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self._last: Fork | None = None
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        argv = (sys.executable, "-P", "-m", "pipeline.preload")
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - an argument list of our own, never a shell
                argv, cwd="/", env=environment, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, start_new_session=True
            )

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def fork(self, program: Program, lifeline: int) -> "Fork":
        if self._last is not None and self._last.poll() is None:
            raise CannotFork  # it waits for the last one to end
        request = json.dumps({"argv": program.argv, "folder": str(program.folder)}).encode()
        try:
            socket.send_fds(self._connection, [request], [lifeline, program.log.fileno()])
            answer = self._connection.recv(_LONGEST_ANSWER)
        except OSError as error:
            raise CannotFork from error
        if not answer:
            raise CannotFork
        self._last = Fork(int(answer), self._connection.dup())
        return self._last


class Fork:
    """
    A forked step, with the part of `subprocess.Popen` that is used of a step's process.

    If the process that forked it was killed, the step's process group is killed, too, and its exit code is -SIGKILL.
    """

    def __init__(self, pid: int, connection: socket.socket) -> None:
        """Take the exit code of the process `pid` from the `connection`."""
        self.pid = pid
        self.returncode: int | None = None
        self._identity = identify(pid)
        self._connection = connection

    def poll(self) -> int | None:
        """Return the exit code, minus the signal's number if it was killed; `None` while it runs."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code once it has ended. Raises `subprocess.TimeoutExpired` after `timeout` seconds."""
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the step has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _look(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], seconds)[0]:
            answer = self._connection.recv(_LONGEST_ANSWER)
            self._connection.close()
            self.returncode = int(answer) if answer else -signal.SIGKILL
            if not answer and self._identity is not None:
                # The process that would tell its exit code was killed: nobody else waits for it.
                kill_group(self.pid, signal.SIGKILL)
                wait_until_dead(self._identity, _KILL_SECONDS)
        return self.returncode
