"""Ask the kernel, by a lease, whether a process has a file open for writing."""

import errno
import fcntl
import os
import signal

#: Errors if no lease is possible: the file system has none, or we neither own the file nor have CAP_LEASE.
_NO_ANSWER = frozenset({errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP})


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
