"""Asks the kernel whether anybody has a file open for writing."""

import errno
import fcntl
import os
import signal

#: The file system has no leases, or we neither own the file nor have CAP_LEASE.
_NO_ANSWER = frozenset({errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP})


def has_writer(name: bytes, dir_fd: int) -> bool | None:
    """
    Say whether the regular file `name` in a folder is open for writing, or mapped so, by any process.

    `None` if there is no answer: not allowed, not supported, not readable, or not a regular file. Local file systems
    only: network ones may refuse a lease for reasons of their own.
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
    Take a read lease on an open file and return whether it was granted; a writer anywhere prevents it.

    A writer that comes while the lease is held would send SIGIO, which ends a process that does not expect it; the
    signal is changed to one that is ignored unless asked for. Raises `OSError` where leases do not work.
    """
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return False
    return True
