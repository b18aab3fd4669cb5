"""
Import what a run's steps need, and fork each step of it: `python -m pipeline.preload`, whose stdin is a socket.

A request is a JSON object, the step's `argv` and `folder`, with two open files: its lifeline and its log. The
answers are the fork's process number and, once it has ended, its exit code. Python, torch and the libraries around it
take seconds to start, three times a run; a fork of them takes none.
"""

import contextlib
import gc
import importlib
import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Iterable

from setproctitle import setproctitle

from pipeline.__main__ import STOPPING, main
from pipeline.contract import LIFELINE
from pipeline.models.loading import has_gpu, is_cuda_lost

#: A process that nobody has asked for so many seconds ends: the run has ended, or waits.
IDLE_SECONDS = 60.0
_LONGEST_REQUEST = 1 << 16
#: What `train` needs, then what the later steps need, which is imported while `train` runs. They ask CUDA for nothing.
MODULES = (
    *("transformers.modeling_utils", "transformers.masking_utils", "transformers.generation", "accelerate", "datasets"),
    "pipeline.train.step",
)
LATER_MODULES = ("pipeline.merge.step", "pipeline.evaluate.step", "pipeline.decide.step")
#: It imports bitsandbytes, which asks CUDA for the GPU: a fork of a process that has done that cannot use it.
_WITH_CUDA = "pipeline.train.trainer"


def serve(connection: socket.socket) -> None:
    """
    Fork the steps that are asked for, one at a time, until the other end closes or asks nothing for `IDLE_SECONDS`.

    After the first fork it imports `LATER_MODULES`.
    """
    connection.settimeout(IDLE_SECONDS)
    while True:
        try:
            request, files, _flags, _address = socket.recv_fds(connection, _LONGEST_REQUEST, 2)
        except TimeoutError:
            return
        if not request:
            return
        pid = os.fork()
        if not pid:
            connection.close()
            _begin(**json.loads(request), lifeline=files[0], log=files[1])
        for file in files:
            os.close(file)
        with contextlib.suppress(BrokenPipeError):  # the worker has ended, and the step stops by itself
            connection.send(str(pid).encode())
            preload(LATER_MODULES)
            _pid, status = os.waitpid(pid, 0)
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def preload(modules: Iterable[str]) -> None:
    """Import `modules`, and keep all that is in memory from garbage collection: it would copy a fork's pages."""
    for module in modules:
        importlib.import_module(module)
    gc.freeze()


def _begin(argv: list[str], folder: str, lifeline: int, log: int) -> None:
    """
    Become the step `argv` in `folder`, in a new session, and end with its exit code; never returns.

    Where a fork cannot use the GPU, a new Python runs `argv`.
    """
    gc.enable()
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for file, standard in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(file, standard)
    os.close(nothing)
    os.close(log)
    os.chdir(folder)
    os.environ[LIFELINE] = str(lifeline)
    if is_cuda_lost():
        os.execv(argv[0], argv)  # noqa: S606 - the worker's argument list
    setproctitle(shlex.join(argv))
    sys.exit(main(argv[-2:]))


if __name__ == "__main__":
    # A signal of a service manager is for the steps: they unblock it, this process ends with the worker's end.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    gc.disable()  # collections are a sixth of the time of the imports
    preload(MODULES if has_gpu() else (*MODULES, _WITH_CUDA))
    serve(socket.socket(fileno=os.dup(0)))
