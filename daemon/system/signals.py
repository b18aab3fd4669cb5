"""
SIGTERM and SIGINT, handled in a thread of their own.

A handler of Python's runs in the main thread between two of its steps: one that logs or sets an event can wait for a
lock that this very thread holds, and it does not run at all while that thread is in a long call of C. Here the number
of the signal goes through a pipe to a thread that may lock, log and end the process whatever the main thread does.
"""

import os
import signal
import threading
from collections.abc import Callable

_STOPPING = (signal.SIGTERM, signal.SIGINT)


def on_stop(act: Callable[[int], object]) -> None:
    """Call `act` with the number of each SIGTERM and SIGINT from now on, one at a time. For the main thread."""
    read, write = os.pipe()
    os.set_blocking(write, False)

    def listen() -> None:
        while True:
            number = os.read(read, 1)[0]
            if number in _STOPPING:
                act(number)

    threading.Thread(target=listen, name="signals", daemon=True).start()
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in _STOPPING:
        signal.signal(number, lambda _number, _frame: None)
