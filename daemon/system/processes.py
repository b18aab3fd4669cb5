"""Processes: identity beyond the pid, whether one is alive, signals, locks and leases that end with the process."""

import contextlib
import errno
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

#: Variables for the daemon only: those of the service manager, and message addresses, which contain passwords.
_NOT_FOR_CHILDREN = (
    *("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID", "INVOCATION_ID", "JOURNAL_STREAM"),
    "DROPFORGE_MESSAGES",
)
_PR_SET_DUMPABLE = 4
_STOPPING = (signal.SIGTERM, signal.SIGINT)
_POLL_SECONDS = 0.05
#: Errors if no lease is possible: the file system has none, or we neither own the file nor have CAP_LEASE.
_NO_ANSWER = frozenset({errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP})
_TRIES = 4


@dataclass(frozen=True)
class Identity:
    """Identifies a process even if its pid is reused: pid, start time (clock ticks since boot) and boot id."""

    pid: int
    started: int
    boot: str


def child_environment(added: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment without the variables for the daemon only, and with those `added`."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith(_NOT_FOR_CHILDREN)}, **added}


def close_to_others() -> None:
    """Deny other processes of this user, such as the steps, access to this process's memory and environment."""
    import ctypes  # noqa: PLC0415 - a quick start for the commands that do not need it

    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def signal_name(number: int) -> str:
    """Return the name of signal `number`, or "signal NUMBER" if it has none (most real-time signals)."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def boot_id() -> str:
    """Return the kernel's random id of the current boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def identify(pid: int) -> Identity | None:
    """Return the identity of the living process `pid`; `None` if there is none, or only its zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command in brackets and may itself hold blanks and brackets.
    fields = stat.rpartition(")")[2].split()
    state, started = fields[0], int(fields[19])
    return None if state in {"Z", "X"} else Identity(pid, started, boot_id())


def is_alive(identity: Identity) -> bool:
    """Return whether the process with this identity is still running."""
    return identity.boot == boot_id() and identify(identity.pid) == identity


def wait_until_dead(identity: Identity, seconds: float) -> bool:
    """Wait up to `seconds` for the process to end; return whether it has ended."""
    end = time.monotonic() + seconds
    while is_alive(identity):
        if time.monotonic() >= end:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def kill_group(pid: int, number: signal.Signals) -> None:
    """Send signal `number` to the process group that `pid` leads; do nothing if it is gone or this is not permitted."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def on_stop(act: Callable[[int], object], *further: signal.Signals) -> None:
    """
    Call `act` in a thread with the number of each SIGTERM, SIGINT and signal in `further` from now on.

    Call this in the main thread. The signals then do nothing else: SIGINT raises no `KeyboardInterrupt`. `act` must not
    raise. Unlike a signal handler, which runs between two bytecodes of the main thread and may wait for a lock that
    this very thread holds, it may lock, log and end the process at any time.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)

    def listen() -> None:
        while True:
            number = os.read(read, 1)[0]
            if number in (*_STOPPING, *further):
                act(number)

    threading.Thread(target=listen, name="signals", daemon=True).start()
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in (*_STOPPING, *further):
        signal.signal(number, lambda _number, _frame: None)


def on_end_of_input(act: Callable[[], object]) -> None:
    """Call `act` once, in a thread, when standard input closes: a pipe from the daemon, which may end in any way."""

    def listen() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        act()

    threading.Thread(target=listen, name="lifeline", daemon=True).start()


class FileLock:
    """
    An exclusive flock on a file, held until it is released or the process ends in any way.

    Lock files that are merely created and deleted would outlive a crash.
    """

    def __init__(self, path: Path) -> None:
        """Prepare a lock on `path`; its folder must exist."""
        self.path = path
        self._fd: int | None = None

    def acquire(self) -> bool:
        """
        Try for 0.2 s to take the lock, and return whether it was taken; then this process's pid is in the file.

        Creates the file. Raises `OSError` if that fails or it is a link.
        """
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        for _ in range(_TRIES):  # `lock_holder` may lock it for a moment
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_POLL_SECONDS)
                continue
            os.ftruncate(fd, 0)
            # The number is for people; the lock itself holds on a full disk too.
            with contextlib.suppress(OSError):
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            self._fd = fd
            return True
        os.close(fd)
        return False

    def release(self) -> None:
        """Release the lock, leaving the file; do nothing if it is not held."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def lock_holder(path: Path) -> int | None:
    """Return the pid that locks `path`, even this one; 0 if it is not in the file, `None` if unlocked or missing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(fd, 32, 0).decode("ascii", errors="replace").strip()
        return int(text) if text.isdigit() else 0
    finally:
        os.close(fd)
    return None


def has_writer(name: bytes, dir_fd: int) -> bool | None:
    """
    Return whether any process has the regular file `name` open or mapped for writing; `None` if not known.

    Not known: not allowed, not supported, not readable, or not a regular file. For local file systems only: a network
    file system may refuse a lease for other reasons.
    """
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, dir_fd=dir_fd)
    except OSError:
        return None
    try:
        return not take_read_lease(fd)
    except OSError as error:
        if error.errno in _NO_ANSWER:
            return None
        raise
    finally:
        # Closing gives the lease back.
        os.close(fd)


def take_read_lease(fd: int) -> bool:
    """
    Take a read lease on an open file, held until it is closed; return `False` if a process has it open for writing.

    A process that opens the file for writing while the lease is held would cause SIGIO here, which ends this process by
    default; the signal is changed to SIGURG, which is ignored. Raises `OSError` where leases do not work.
    """
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return False
    return True
