"""
Takes step specs from the spool, one at a time, and runs each in a process of its own.

The worker touches no database. Each step gets a session and process group of its own, and one end of a pipe: when the
worker dies, however it dies, the step notices and stops. A new worker starts nothing before the old one's step is gone.
"""

import fnmatch
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import structlog

from daemon.executors.local import Spool
from daemon.processes import FileLock, identify, is_alive, kill_group, signal_name, wait_until_dead
from daemon.signals import on_stop
from pipeline import durable
from pipeline.contract import LIFELINE, LOG_NAME, RESULT_NAME, SPEC_NAME, StepError, StepResult, StepSpec
from pipeline.errors import EXIT_BAD_DATA, EXIT_DISK_FULL, EXIT_INTERRUPTED, is_disk_full
from pipeline.foreign_code import ENDED_BY, SECONDS

#: What of the worker's own environment a step may see: where things are and how the hardware is used, no secrets.
ALLOWED_ENVIRONMENT = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_*", "TZ", "TMPDIR", "XDG_*", "LD_*", "PYTHON*", "VIRTUAL_ENV",
    "CUDA*", "NVIDIA*", "HIP*", "ROCR*", "HF_HOME", "HF_HUB_CACHE", "TORCH*", "PYTORCH*", "TRITON*", "OMP_*", "MKL_*",
    "OPENBLAS*", "BNB_*",
)  # fmt: skip
#: What a step that speaks to a network sees beside this and its key.
NETWORK_ENVIRONMENT = (
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy",
    "SSL_CERT_FILE", "SSL_CERT_DIR",
)  # fmt: skip
_POLL_SECONDS = 0.2
_KILL_SECONDS = 10.0
_FULL_SECONDS = 1.0
log = structlog.get_logger()


class Worker:
    """Serves one spool folder. `stop` ends it after the running step has left its checkpoint."""

    def __init__(self, state_folder: Path) -> None:
        """Serve the spool in `state_folder`."""
        self._spool = Spool(state_folder)
        self._lock = FileLock(self._spool.worker_lock)
        self.stop = threading.Event()
        self.exit_code = 0
        self.owns_spool = False

    def serve(self) -> None:
        """Run steps until `stop` is set; wait first until no other worker, and no step of one, is left."""
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
            while not self.stop.is_set():
                key = self._take()
                if key is None:
                    self.stop.wait(_POLL_SECONDS)
                else:
                    self._run(key)
        finally:
            self._lock.release()

    def _clear_leftovers(self) -> None:
        """Wait for the steps of a dead worker, which are stopping by themselves, and end those that do not."""
        for entry in sorted(self._spool.running.glob("*.json")):
            key = entry.name.removesuffix(".json")
            process = self._spool.process_of(key)
            if process is not None and is_alive(process):
                log.warning("orphan_found", key=key, pid=process.pid)
                spec = self._spec(durable.read_json(entry)["folder"])
                if not wait_until_dead(process, spec.grace_seconds + 5):
                    kill_group(process.pid, signal.SIGKILL)
                while not wait_until_dead(process, 60):
                    log.error("orphan_will_not_die", key=key, pid=process.pid)
            entry.unlink()

    def _take(self) -> str | None:
        """Move the oldest entry of the queue to `running`; return its key."""
        waiting = [path for path in self._spool.queue.glob("*.json") if not path.name.startswith(".")]
        if not waiting:
            return None
        oldest = min(waiting, key=lambda path: path.stat().st_mtime_ns)
        oldest.rename(self._spool.running / oldest.name)
        return oldest.name.removesuffix(".json")

    def _spec(self, folder: str) -> StepSpec:
        return StepSpec.model_validate_json((self._spool.root / folder / SPEC_NAME).read_bytes())

    def _run(self, key: str) -> None:
        """Run one attempt to its end and see to it that it has a result."""
        entry = self._spool.running / f"{key}.json"
        folder = durable.read_json(entry)["folder"]
        spec = self._spec(folder)
        place = self._spool.root / folder
        begun = self._begin_with_room(entry, spec, place)
        if begun is None:
            return
        process, keep = begun
        try:
            os.write(keep, b"g")
            log.info("step_started", key=key, pid=process.pid)
            stopped = self._watch(process, spec)
        finally:
            os.close(keep)
        if not (place / RESULT_NAME).exists():
            self._word(place, _result_of_dead(spec, process.returncode, stopped=stopped))
        log.info("step_ended", key=key, exit_code=process.returncode)
        (self._spool.cancelled / key).unlink(missing_ok=True)
        entry.unlink(missing_ok=True)

    def _begin_with_room(self, entry: Path, spec: StepSpec, place: Path) -> tuple[subprocess.Popen[bytes], int] | None:
        """Do as `_begin` once the disk has room for it; told to stop before, put the order back and return `None`."""
        while True:
            try:
                return self._begin(entry, spec, place)
            except OSError as error:
                if not is_disk_full(error):
                    raise
                log.warning("disk_full", key=spec.key, error=str(error))
            # The order stays in `running` meanwhile: one that moves back could be taken for lost.
            if self.stop.wait(_FULL_SECONDS):
                entry.rename(self._spool.queue / entry.name)
                return None

    def _begin(self, entry: Path, spec: StepSpec, place: Path) -> tuple[subprocess.Popen[bytes], int]:
        """
        Start the step's process and write it down; return it with our end of its lifeline, on which it waits.

        If that cannot be written the process ends before it has done anything: our end is closed without a word.
        """
        lifeline, keep = os.pipe()
        process = None
        try:
            process = self._start(spec, place, lifeline)
            identity = identify(process.pid)
            record = {"folder": spec.folder, "process": asdict(identity) if identity else None}
            durable.write_json(entry, record)
        except BaseException:
            os.close(keep)
            if process is not None:
                kill_group(process.pid, signal.SIGKILL)
                process.wait()
            raise
        finally:
            os.close(lifeline)
        return process, keep

    def _word(self, place: Path, result: StepResult) -> None:
        """Leave a result for a step that could not, as soon as the disk has room for it."""
        while True:
            try:
                durable.write_json(place / RESULT_NAME, result.model_dump())
            except OSError as error:
                if not is_disk_full(error):
                    raise
                # Told to stop, it gives up: the daemon, which stops too, lets the run wait.
                if self.stop.wait(_FULL_SECONDS):
                    return
            else:
                return

    def _start(self, spec: StepSpec, place: Path, lifeline: int) -> subprocess.Popen[bytes]:
        environment = {**_allowed(os.environ, _patterns(spec)), **spec.env, LIFELINE: str(lifeline)}
        with (place / LOG_NAME).open("ab") as output:
            return subprocess.Popen(  # noqa: S603 - an argument list from the dispatcher, never a shell
                spec.argv, cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True, pass_fds=(lifeline,),
            )  # fmt: skip

    def _watch(self, process: subprocess.Popen[bytes], spec: StepSpec) -> bool:
        """Wait for the step; stop it when it is cancelled or the worker is to end. Say whether it was stopped."""
        mark = self._spool.cancelled / spec.key
        while process.poll() is None:
            if self.stop.is_set() or mark.exists():
                self._end(process, spec)
                return True
            try:
                process.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        # Whatever the step itself started goes with it.
        kill_group(process.pid, signal.SIGKILL)
        return False

    def _end(self, process: subprocess.Popen[bytes], spec: StepSpec) -> None:
        """SIGTERM, grace, SIGKILL."""
        log.info("step_stopping", key=spec.key, grace_seconds=spec.grace_seconds)
        process.send_signal(signal.SIGTERM)
        left = spec.grace_seconds
        while process.poll() is None and left > 0:
            try:
                process.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                left -= _POLL_SECONDS
        kill_group(process.pid, signal.SIGKILL)
        process.wait()


def end_steps_now(state_folder: Path) -> None:
    """
    Kill the steps that a worker has in hand, with all that they started, and leave the result that they cannot.

    For the end without grace. The caller is the worker, or has ended it. The steps count as interrupted: that somebody
    was in a hurry is no fault of the run's.
    """
    spool = Spool(state_folder)
    for entry in sorted(spool.running.glob("[!.]*.json")):
        key = entry.name.removesuffix(".json")
        process = spool.process_of(key)
        if process is not None and is_alive(process):
            kill_group(process.pid, signal.SIGKILL)
            wait_until_dead(process, _KILL_SECONDS)
        place = state_folder / durable.read_json(entry)["folder"]
        if (place / SPEC_NAME).exists() and not (place / RESULT_NAME).exists():
            spec = StepSpec.model_validate_json((place / SPEC_NAME).read_bytes())
            durable.write_json(place / RESULT_NAME, _result_of_dead(spec, 0, stopped=True).model_dump())
        entry.unlink(missing_ok=True)


def serve(state_folder: Path, *, with_lifeline: bool) -> int:
    """
    Run a worker until SIGTERM, SIGINT or, `with_lifeline`, until standard input closes; return the exit code.

    Standard input is the daemon's end of a pipe: it closes with the daemon, however that ended. A second signal kills
    the step and ends the process at once, with 128 and the signal's number.
    """
    worker = Worker(state_folder)

    def act(number: int) -> None:
        if worker.stop.is_set():
            # The main thread may come to its end before this one does.
            worker.exit_code = 128 + number
            if worker.owns_spool:
                end_steps_now(state_folder)
            os._exit(worker.exit_code)
        worker.stop.set()

    on_stop(act)
    if with_lifeline:

        def wait() -> None:
            while os.read(sys.stdin.fileno(), 1):
                pass
            worker.stop.set()

        threading.Thread(target=wait, name="lifeline", daemon=True).start()
    worker.serve()
    return worker.exit_code


def _patterns(spec: StepSpec) -> tuple[str, ...]:
    """Return the names that the step may see; the key's is in the spec, its value in the environment alone."""
    if not spec.network:
        return ALLOWED_ENVIRONMENT
    key = spec.config.judge.api_key_env
    return (*ALLOWED_ENVIRONMENT, *NETWORK_ENVIRONMENT, *((key,) if key else ()))


def _allowed(environment: Mapping[str, str], patterns: Sequence[str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def _result_of_dead(spec: StepSpec, returncode: int, *, stopped: bool) -> StepResult:
    """Word the end of a step that could not write its result itself."""
    if stopped or returncode == EXIT_INTERRUPTED:
        words = StepError(message=f"step {spec.step} was stopped before it could leave a result")
        return StepResult(key=spec.key, fence=spec.fence, status="interrupted", exit_code=EXIT_INTERRUPTED, error=words)
    if returncode == EXIT_DISK_FULL:
        message = f"the disk of {spec.root} is full: step {spec.step} could not write its files"
        hint = "free some room there, the run then goes on by itself; dropforge gc --dry-run says what it can give back"
        code = returncode
    elif returncode == -ENDED_BY:
        message = (
            f"step {spec.step} was ended: the tokenizer or the chat template of {spec.config.base_model} took more "
            f"than {SECONDS:g} s of the processor, to load or for one record"
        )
        hint, code = "mend tokenizer.json and chat_template.jinja there, or use another base model", EXIT_BAD_DATA
    elif returncode < 0:
        message = f"step {spec.step} was killed by {signal_name(-returncode)}"
        hint = "SIGKILL is most often the kernel's answer to memory running out; see its log and the system's"
        code = 128 - returncode
    else:
        message = f"step {spec.step} ended with exit code {returncode} and left no result"
        hint, code = f"the whole story: dropforge logs {spec.run}", returncode or 1
    words = StepError(message=message, hint=hint)
    return StepResult(key=spec.key, fence=spec.fence, status="failed", exit_code=code, error=words)
