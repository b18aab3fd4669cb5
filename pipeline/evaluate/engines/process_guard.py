"""
Run a program and kill all its processes when it ends: python -I process_guard.py PROGRAM ARGUMENT...

It exits with the program's status, or ends the program once standard input is closed: the process that holds the other
end may be killed at any moment. All of the program's descendants end with it, including those that left its session:
this process adopts orphans. It uses only the standard library, so that it starts at once.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.1
#: From SIGTERM to SIGKILL: the program may release shared memory.
_GRACE_SECONDS = 20.0


def main(argv: Sequence[str]) -> int:
    """Run a program until it ends or standard input closes; return its exit status."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603 - no shell
    except OSError as error:
        sys.stderr.write(f"{argv[0]} cannot be started: {error.strerror}\n")
        return 127
    while child.poll() is None:
        if select.select([0], [], [], _POLL_SECONDS)[0] and not os.read(0, 1):
            _end(child)
    _sweep()
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.terminate()
    try:
        child.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _sweep() -> None:
    """Kill all remaining descendants: children of killed processes are adopted, generation after generation."""
    while children := _children():
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        time.sleep(0)


def _children() -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        # The second field is the command in brackets, which may contain spaces and brackets.
        with contextlib.suppress(OSError):
            if int(stat.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
