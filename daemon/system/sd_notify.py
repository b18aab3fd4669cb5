"""systemd's notification protocol: datagrams to $NOTIFY_SOCKET (sd_notify(3)); nothing is sent if that is not set."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_SIGN_SECONDS = 2.0


def notify(*assignments: str) -> None:
    """Send `assignments` (`READY=1`, `STATUS=…`) in one datagram; do nothing if NOTIFY_SOCKET is unset or fails."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    # A service manager that is going away is no reason for the service to fail.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.connect(address)
        sender.sendall("\n".join(assignments).encode())


def in_background(work: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> Future[R]:
    """Run `work` in a thread that the process does not wait for at its end; return its future."""
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments, **named))
        except BaseException as error:  # noqa: BLE001 - `Future.result` raises it
            future.set_exception(error)

    threading.Thread(target=run, name=work.__name__, daemon=True).start()
    return future


def showing_life(work: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
    """
    Run `work` in a thread, wait for it, and return its result or raise its exception.

    Every two seconds meanwhile systemd is sent WATCHDOG=1 and an extension of its start or stop timeout.
    """
    future = in_background(work, *arguments, **named)
    while not wait([future], _SIGN_SECONDS).done:
        notify("WATCHDOG=1", f"EXTEND_TIMEOUT_USEC={int(10 * _SIGN_SECONDS * 1e6)}")
    return future.result()
