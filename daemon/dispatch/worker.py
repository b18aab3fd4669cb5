"""
The worker: works on the attempts that the spool orders, each step in a new process, `parallel` at once.

The worker touches no database, and takes neither a path nor a program from a spool entry (`spool`). When it dies in
any way, its steps notice and stop (`step_process`); a new worker starts nothing before they have ended.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait

import structlog

from daemon.dispatch.attempt import listed, process_of, work_on
from daemon.dispatch.preloaded import Preloaded, fork_nothing
from daemon.dispatch.spool import Spool
from daemon.dispatch.step_process import StepCommand, result_of_dead, step_command
from daemon.state.ownership import OwnFolder, StateFolderGone
from daemon.system.folders import StateFolder, WorkFolder
from daemon.system.processes import FileLock, is_alive, kill_group, on_end_of_input, on_stop, wait_until_dead
from pipeline import durable
from pipeline.contract import CLAIM_NAME, RESULT_NAME, StepSpec
from pipeline.errors import EXIT_FAILED

_POLL_SECONDS = 0.2
_KILL_SECONDS, _ORPHAN_SECONDS = 10.0, 60.0
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
        Serve `spool`: `command` gives a step's argument list; at most `parallel` steps run at once, of each run one.

        `look` is called before each look at the queue; what it raises ends `serve`.
        """
        self._parallel = parallel
        self._spool = spool
        self._command = command
        # A test's own programs are no steps of the pipeline.
        self._preloaded = Preloaded()
        self._fork = self._preloaded.fork if command is step_command else fork_nothing
        self._look = look
        self._lock = FileLock(self._spool.worker_lock)
        self.stop = threading.Event()
        self.exit_code = 0
        self._owns_spool = self._is_interrupted = False

    def serve(self) -> None:
        """
        Run the spool's steps until `stop` is set; first wait until no other worker, and none of its steps, is running.

        A dead worker's step that does not stop in time is killed. `stop` stops the running steps, too. Raises what
        `look` and `_run` raise, after the other steps were stopped.
        """
        waited = False
        while not self._lock.acquire():
            if not waited:
                log.info("worker_waits", for_="another worker on the same state folder")
                waited = True
            if self.stop.wait(_POLL_SECONDS):
                return
        self._owns_spool = True
        try:
            end_steps(self._spool)
            log.info("worker_started", pid=os.getpid())
            with ThreadPoolExecutor(self._parallel, "step") as steps:
                try:
                    self._work_off(steps)
                finally:
                    self.stop.set()
        finally:
            self._preloaded.close()
            self._lock.release()

    def interrupt(self, number: int) -> None:
        """Set `stop`; called again, kill the running steps and end the process with the exit code 128 + `number`."""
        if self._is_interrupted:
            # The main thread may come to its end before this one does.
            self.exit_code = 128 + number
            try:
                if self._owns_spool:
                    end_steps(self._spool, now=True)
            finally:  # a full disk must not keep it from ending
                os._exit(self.exit_code)
        self._is_interrupted = True
        self.stop.set()

    def _work_off(self, steps: Executor) -> None:
        """Run the queue's steps until `stop` is set, then wait for the running ones; raise what `_run` raises."""
        #: The run of each running step.
        running: dict[Future[None], int] = {}
        while not self.stop.is_set():
            self._look()
            for ended in [step for step in running if step.done()]:
                del running[ended]
                ended.result()
            # The oldest order of a run without a running step.
            spec = next(self._spool.orders(running.values()), None) if len(running) < self._parallel else None
            if spec is None:
                wait(running, _POLL_SECONDS) if running else self.stop.wait(_POLL_SECONDS)
            else:
                running[steps.submit(self._run, spec)] = spec.run
        for step in running:
            step.result()

    def _run(self, spec: StepSpec) -> None:
        """
        Work on an attempt, or end it if it is claimed already, and delete its entry once it has a result.

        An attempt whose files are missing, closed or of another kind gets the result "failed". Raises other `OSError`.
        """
        folder = self._spool.root / spec.folder
        try:
            if CLAIM_NAME in listed(folder):  # whoever cancelled it died before it had a result
                self._spool.end_dead(spec)
            else:
                work_on(spec, self._command, self.stop, self._fork)
        except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
            log.warning("step_lost", key=spec.key, error=str(error))
            failed = result_of_dead(spec, EXIT_FAILED, stopped=False)
            with contextlib.suppress(OSError):
                durable.write_json(folder / RESULT_NAME, failed.model_dump(), first=True)
        with contextlib.suppress(NotADirectoryError):
            if RESULT_NAME in listed(folder):
                self._spool.entry(spec.key).unlink(missing_ok=True)


def end_steps(spool: Spool, *, now: bool = False) -> None:
    """
    Wait until the steps that a dead worker has left have stopped, kill those that do not, and end their attempts.

    A step is killed 5 s after its grace time, and waited for without a limit. With `now` all are killed at once, and
    the result of each without one is "interrupted", so that no failure is counted; the caller is the worker or has
    ended it.
    """
    for spec in spool.orders():
        folder = spool.root / spec.folder
        process = process_of(folder)
        if process is not None and is_alive(process):
            if not now:
                log.warning("orphan_found", key=spec.key, pid=process.pid)
            if now or not wait_until_dead(process, spec.grace_seconds + 5):
                kill_group(process.pid, signal.SIGKILL)
            while not wait_until_dead(process, _KILL_SECONDS if now else _ORPHAN_SECONDS) and not now:
                log.error("orphan_will_not_die", key=spec.key, pid=process.pid)
        if CLAIM_NAME in listed(folder):
            spool.end_dead(spec, stopped=now)


def serve(
    state_folder: StateFolder,
    work_folder: WorkFolder,
    *,
    with_lifeline: bool,
    parallel: int = 1,
    command: StepCommand = step_command,
) -> int:
    """
    Run a worker until SIGTERM, SIGINT or, `with_lifeline`, until standard input closes; return 0.

    Standard input is then a pipe from the daemon: it closes when the daemon ends in any way. A second signal kills the
    steps and ends the process at once (`Worker.interrupt`).

    Raises `DropforgeError` if the state folder is not this user's own. If it is taken away, returns 1 `with_lifeline`,
    else raises `StateFolderGone`.
    """
    folder = OwnFolder(state_folder, "worker")
    spool = Spool(state_folder, work_folder)
    worker = Worker(spool, command, folder.require_there, parallel=parallel)
    on_stop(worker.interrupt)
    if with_lifeline:
        on_end_of_input(worker.stop.set)
    try:
        worker.serve()
    except StateFolderGone:
        if not with_lifeline:
            raise
        return EXIT_FAILED  # the daemon says so
    return worker.exit_code
