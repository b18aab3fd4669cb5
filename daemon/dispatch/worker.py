"""
The worker: takes step specs from the spool and runs each in a process of its own, at most `parallel` at once.

The worker touches no database, and takes neither a path nor a program from a spool entry (`spool`). When it dies in
any way, its steps notice and stop (`step_process`); a new worker starts nothing before they have ended.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

import structlog

from daemon.dispatch.spool import Order, Spool
from daemon.dispatch.step_process import StepCommand, StepProcess, result_of_dead, step_command
from daemon.state.ownership import OwnFolder, StateFolderGone
from daemon.system.folders import StateFolder, WorkFolder
from daemon.system.processes import FileLock, is_alive, kill_group, on_stop, wait_until_dead
from pipeline import durable
from pipeline.contract import RESULT_NAME, SPEC_NAME, StepResult, StepSpec
from pipeline.errors import EXIT_FAILED, is_disk_full

_POLL_SECONDS = 0.2
_KILL_SECONDS = 10.0
_FULL_SECONDS = 1.0
#: No memory, process or descriptor is free just now.
_PASSING = frozenset({errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE})
log = structlog.get_logger()


class Worker:
    """Runs the steps of one spool folder. Setting `stop` ends it after each running step has left its checkpoint."""

    def __init__(
        self,
        spool: Spool,
        command: StepCommand = step_command,
        look: Callable[[], None] = lambda: None,
        *,
        parallel: int = 1,
    ) -> None:
        """
        Serve `spool`: `command` runs a step, at most `parallel` at once, and of each run one.

        `look` is called before each look at the queue and may raise.
        """
        self._parallel = parallel
        self._spool = spool
        self._command = command
        self._look = look
        self._lock = FileLock(self._spool.worker_lock)
        self.stop = threading.Event()
        self.exit_code = 0
        self.owns_spool = False

    def serve(self) -> None:
        """
        Run the spool's steps until `stop` is set; first wait until no other worker, and none of its steps, is running.

        A dead worker's step that does not stop in time is killed. `stop` stops the running steps, too. Raises what the
        files of a step raise, after the other steps were stopped.
        """
        waited = False
        while not self._lock.acquire():
            if not waited:
                log.info("worker_waits", for_="another worker on the same state folder")
                waited = True
            if self.stop.wait(_POLL_SECONDS):
                return
        self.owns_spool = True
        try:
            self._clear_leftovers()
            log.info("worker_started", pid=os.getpid())
            with ThreadPoolExecutor(self._parallel, "step") as steps:
                try:
                    self._work_off(steps)
                finally:
                    self.stop.set()
        finally:
            self._lock.release()

    def _work_off(self, steps: Executor) -> None:
        """Run the queue's steps until `stop` is set."""
        #: The run of each running step.
        running: dict[Future[None], int] = {}
        while not self.stop.is_set():
            self._look()
            for ended in [step for step in running if step.done()]:
                del running[ended]
                ended.result()
            order = self._take(running.values()) if len(running) < self._parallel else None
            if order is None:
                wait(running, _POLL_SECONDS) if running else self.stop.wait(_POLL_SECONDS)
            else:
                running[steps.submit(self._run_apart, order)] = order.spec.run
        for step in running:
            step.result()

    def _clear_leftovers(self) -> None:
        """Wait until the steps of a dead worker have stopped, kill those that have not, and delete their entries."""
        for order in self._spool.accept(self._spool.running):
            process = order.process
            if process is not None and is_alive(process):
                log.warning("orphan_found", key=order.spec.key, pid=process.pid)
                if not wait_until_dead(process, order.spec.grace_seconds + 5):
                    kill_group(process.pid, signal.SIGKILL)
                while not wait_until_dead(process, 60):
                    log.error("orphan_will_not_die", key=order.spec.key, pid=process.pid)
            order.entry.unlink()

    def _take(self, busy: Collection[int]) -> Order | None:
        """Move the oldest order of a run not in `busy` to `running` and return it; `None` if there is none."""
        for order in self._spool.accept(self._spool.queue):
            if order.spec.run in busy:
                continue
            # It may be cancelled meanwhile.
            with contextlib.suppress(FileNotFoundError):
                order.entry.rename(self._spool.running / order.entry.name)
                return order
        return None

    def _run_apart(self, order: Order) -> None:
        """Call `_run`; an attempt whose files cannot be used loses its entry, and the steps of other runs go on."""
        try:
            self._run(order)
        except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
            log.warning("step_lost", key=order.spec.key, error=str(error))
            (self._spool.running / order.entry.name).unlink(missing_ok=True)

    def _run(self, order: Order) -> None:
        """Run one attempt to its end, unless it has a result already; make sure it has one, and delete its entry."""
        spec = order.spec
        entry = self._spool.running / f"{spec.key}.json"
        folder = self._spool.root / spec.folder
        if not (folder / RESULT_NAME).exists():
            process = self._begin_with_room(entry, spec, folder)
            if process is None:
                return
            result = process.go(lambda: self.stop.is_set() or (self._spool.cancelled / spec.key).exists())
            if not (folder / RESULT_NAME).exists():
                self._word(folder, result)
        (self._spool.cancelled / spec.key).unlink(missing_ok=True)
        entry.unlink(missing_ok=True)

    def _begin_with_room(self, entry: Path, spec: StepSpec, folder: Path) -> StepProcess | None:
        """Call `_begin` until disk and memory suffice; once `stop` is set, put the order back and return `None`."""
        while True:
            try:
                return self._begin(entry, spec, folder)
            except OSError as error:
                if not is_disk_full(error) and error.errno not in _PASSING:
                    raise
                log.warning("step_not_begun", key=spec.key, error=str(error))
            # The order stays in `running` meanwhile: one that moves back could be taken for lost.
            if self.stop.wait(_FULL_SECONDS):
                entry.rename(self._spool.queue / entry.name)
                return None

    def _begin(self, entry: Path, spec: StepSpec, folder: Path) -> StepProcess:
        """Start the step's process and record it in the entry; kill it, before it does anything, if that fails."""
        process = StepProcess(spec, folder, self._command(spec, folder / SPEC_NAME))
        try:
            identity = process.identity
            durable.write_json(entry, {"fence": spec.fence, "process": asdict(identity) if identity else None})
        except BaseException:
            process.kill()
            raise
        return process

    def _word(self, folder: Path, result: StepResult) -> None:
        """Write the result of a step that left none, retrying while the disk is full; give up once `stop` is set."""
        while True:
            try:
                durable.write_json(folder / RESULT_NAME, result.model_dump())
            except OSError as error:
                if not is_disk_full(error):
                    raise
                # Told to stop, it gives up: the daemon, which stops too, lets the run wait.
                if self.stop.wait(_FULL_SECONDS):
                    return
            else:
                return


def end_steps_now(spool: Spool) -> None:
    """
    Kill the running steps with all their processes, and write the result "interrupted" for each without one.

    Their spool entries are deleted, and no failure is counted for the runs. The caller is the worker or has ended it.
    """
    for order in spool.accept(spool.running):
        if order.process is not None and is_alive(order.process):
            kill_group(order.process.pid, signal.SIGKILL)
            wait_until_dead(order.process, _KILL_SECONDS)
        folder = spool.root / order.spec.folder
        if not (folder / RESULT_NAME).exists():
            durable.write_json(folder / RESULT_NAME, result_of_dead(order.spec, 0, stopped=True).model_dump())
        order.entry.unlink(missing_ok=True)


def serve(
    state_folder: StateFolder,
    work_folder: WorkFolder,
    *,
    with_lifeline: bool,
    parallel: int = 1,
    command: StepCommand = step_command,
) -> int:
    """
    Run a worker until SIGTERM, SIGINT or, `with_lifeline`, until standard input closes; return the exit code.

    Standard input is then a pipe from the daemon: it closes when the daemon ends in any way. A second signal kills the
    step and ends the process at once, with 128 plus the signal's number.

    Raises `DropforgeError` if the state folder is not this user's own. If it is taken away, returns 1 `with_lifeline`,
    else raises `StateFolderGone`.
    """
    folder = OwnFolder(state_folder, "worker")
    spool = Spool(state_folder, work_folder)
    worker = Worker(spool, command, folder.require_there, parallel=parallel)

    asked = threading.Event()

    def act(number: int) -> None:
        if asked.is_set():
            # The main thread may come to its end before this one does.
            worker.exit_code = 128 + number
            try:
                if worker.owns_spool:
                    end_steps_now(spool)
            finally:  # a full disk must not keep it from ending
                os._exit(worker.exit_code)
        asked.set()
        worker.stop.set()

    on_stop(act)
    if with_lifeline:

        def wait_for_end() -> None:
            while os.read(sys.stdin.fileno(), 1):
                pass
            worker.stop.set()

        threading.Thread(target=wait_for_end, name="lifeline", daemon=True).start()
    try:
        worker.serve()
    except StateFolderGone:
        if not with_lifeline:
            raise
        return EXIT_FAILED  # the daemon says so
    return worker.exit_code
