"""
Kills one operation at one system call, recovers, and says what does not hold then: one JSON line a request.

A process of its own that has imported everything: each operation runs in a fork of it, and strace is attached to that
fork when the state before is there, so that the counted calls are the operation's own and a point costs no import.

    python -m tests.chaos.kill_target FOLDER
    {"operation": "promote"}                                              → {"fsync": 3, "pwrite64": 124, …}
    {"operation": "promote", "call": "fsync", "when": 3, "error": null}   → {"end": "killed", "broken": []}
"""

import contextlib
import ctypes
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import DatabaseError

from daemon.dispatch import publication
from pipeline.errors import DropforgeError
from tests.chaos.house import Daemon
from tests.chaos.invariants import broken, unnamed
from tests.chaos.operations import NOW, OPERATIONS, Operation

CALLS = (
    "fsync",
    "fdatasync",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "symlink",
    "symlinkat",
    "unlink",
    "unlinkat",
    "rmdir",
    "mkdir",
    "mkdirat",
    "pwrite64",
    "write",
    "ftruncate",
    "sendfile",
    "copy_file_range",
)
_SECONDS = 60
_PR_SET_PTRACER = 0x59616D61


class Bench:
    """One operation and the state before it."""

    def __init__(self, operation: Operation, folder: Path) -> None:
        """Make the state before, in `folder`."""
        self._complete = operation.complete
        self._before, self._work, self._log = folder / "before", folder / "work", folder / "strace.log"
        self._work.mkdir()
        operation.prepare(self._work)
        self._deed = operation.ready(self._work)
        # Copies of it come to lie where it was made: it holds absolute links to its base model.
        self._work.rename(self._before)

    def count(self) -> dict[str, int]:
        """Return how often the operation makes each call."""
        self._act(["-e", f"trace={','.join(CALLS)}"])
        return Counter(re.findall(r"^(?:\d+ +)?(\w+)\(", self._log.read_text(), re.MULTILINE))

    def strike(self, call: str, when: int, error: str | None) -> dict[str, Any]:
        """Kill the operation at its `when`-th `call`, or let that call fail with `error`; recover; return what came."""
        deed = f"error={error}" if error else "signal=SIGKILL"
        end = self._act(["-e", f"trace={call}", "-e", f"inject={call}:{deed}:when={when}"])
        found = self._in_a_fork(self._recover)
        return {"end": end, "broken": found}

    def _act(self, options: list[str]) -> str:
        """Do the operation in a copy of the state before, under strace; say how it ended."""
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.copytree(self._before, self._work, symlinks=True)
        pid, ready, go, said = self._start()
        assert os.read(ready, 1) == b"r"
        tracer = subprocess.Popen(["strace", "-f", "-qq", "-o", self._log, *options, "-p", str(pid)])
        _wait_until(lambda: _tracer_of(pid) == tracer.pid, "strace does not attach")
        os.write(go, b"g")
        words = _read_all(said)
        _, status = os.waitpid(pid, 0)
        tracer.wait()
        for fd in (ready, go, said):
            os.close(fd)
        return "killed" if os.WIFSIGNALED(status) else words

    def _start(self) -> tuple[int, int, int, int]:
        (ready, say_ready), (wait, go), (said, say) = os.pipe(), os.pipe(), os.pipe()
        pid = os.fork()
        if pid:
            for fd in (say_ready, wait, say):
                os.close(fd)
            return pid, ready, go, said
        for fd in (ready, go, said):
            os.close(fd)
        words = "broke before it began"
        with contextlib.suppress(BaseException):
            ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(2**64 - 1), 0, 0, 0)
            os.write(say_ready, b"r")
            os.read(wait, 1)
            words = _carry_out(self._deed)
        os.writev(say, [words.encode()])  # no call that is counted
        os._exit(0)

    def _recover(self) -> list[str]:
        """Start the daemon twice, which must come to the same; let it carry on; return what does not hold."""
        found = unnamed(self._work)
        Daemon(self._work, NOW)
        # Whoever writes a result may be a step that lives.
        found += [one for one in broken(self._work) if "/.result.json." not in one]
        first = _picture(self._work)
        daemon = Daemon(self._work, NOW)
        if _picture(self._work) != first:
            found.append("a second recovery changed something")
        self._complete(daemon)
        return [*found, *broken(self._work)]

    @staticmethod
    def _in_a_fork(function: Callable[[], list[str]]) -> list[str]:
        out, into = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                words = function()
            except BaseException:  # noqa: BLE001 - whatever it is, it is reported
                words = [traceback.format_exc()]
            os.write(into, json.dumps(words).encode())
            os._exit(0)
        os.close(into)
        text = _read_all(out)
        os.close(out)
        os.waitpid(pid, 0)
        found: list[str] = json.loads(text) if text else ["it died"]
        return found


def _carry_out(deed: Callable[[], object]) -> str:
    """Do it as the daemon's loops do: what a disk may do to it is survived, and it is done again at the next turn."""
    try:
        deed()
    except (OSError, DatabaseError, DropforgeError) as error:
        words = f"failed: {type(error).__name__}"
    except Exception:  # noqa: BLE001 - nothing else may come out of it
        return f"broke: {traceback.format_exc()}"
    else:
        return "done"
    try:
        deed()
    except (OSError, DatabaseError, DropforgeError):
        return words
    except Exception:  # noqa: BLE001
        return f"broke: {traceback.format_exc()}"
    return words


def _picture(folder: Path) -> dict[str, object]:
    """Return every file, folder and link but the database and locks, and what is in it."""
    paths = [path for path in folder.rglob("*") if ".db" not in path.name and not path.name.endswith(".lock")]
    return {
        str(path): path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        for path in paths
    }


def _tracer_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^TracerPid:\s+(\d+)$", status, re.MULTILINE)[1])  # type: ignore[index]


def _wait_until(holds: Callable[[], bool], message: str) -> None:
    end = time.monotonic() + _SECONDS
    while not holds():
        if time.monotonic() > end:
            raise AssertionError(message)
        # The kernel sends no event when a tracer attaches: its answer is asked for again.
        time.sleep(0.001)


def _read_all(fd: int) -> str:
    data = b""
    while select.select([fd], [], [], _SECONDS)[0]:
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            return data.decode()
        data += chunk
    message = "the operation hangs"
    raise AssertionError(message)


def _at_once(work: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Do it in this thread: strace counts each thread's calls for itself."""
    future: Future[Any] = Future()
    future.set_result(work(*arguments))
    return future


def main(folder: Path) -> None:
    """Answer requests on standard input until it ends."""
    assert "in_background" in vars(publication)
    vars(publication)["in_background"] = _at_once
    # Whatever the operation logs is no call of its own.
    # Without the library's own tracebacks, which show every local of SQLAlchemy's and take ten seconds each.
    processors = structlog.processors
    structlog.configure(
        processors=[processors.format_exc_info, processors.JSONRenderer()],
        logger_factory=structlog.ReturnLoggerFactory(),
    )
    benches: dict[str, Bench] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("operation")
        if name not in benches:
            place = folder / str(len(benches))
            place.mkdir()
            benches[name] = Bench(OPERATIONS[name], place)
        answer = benches[name].strike(**request) if request else benches[name].count()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
