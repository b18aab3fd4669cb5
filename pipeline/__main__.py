"""Run one attempt at one step in its own process: `python -m pipeline STEP SPEC`."""

import contextlib
import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

from pipeline import durable
from pipeline.contract import (
    CURVE_NAME,
    LIFELINE,
    LOG_NAME,
    PROGRESS_NAME,
    PROGRESS_SECONDS,
    RESULT_NAME,
    SPEC_NAME,
    Attempt,
    StepError,
    StepResult,
    StepSpec,
)
from pipeline.errors import (
    EXIT_DISK_FULL,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    DropforgeError,
    Interrupted,
    StartAgain,
    is_disk_full,
)
from pipeline.models.manifest import MANIFEST_NAME
from pipeline.models.memory_estimate import peak_resident
from pipeline.steps import BY_NAME

#: Variable of a process that replaced itself (`execv`), for which the worker's start byte was read before. It holds, as
#: JSON, the time at which the first process began and its peak memory in bytes.
_AGAIN = "DROPFORGE_STARTED_AGAIN"
_STOPPING = (signal.SIGTERM, signal.SIGINT)


def main(argv: list[str]) -> int:
    """Run the step in `argv` and write its result beside the spec; return the exit code."""
    faulthandler.enable()
    step_name, spec_path = argv
    spec = StepSpec.model_validate_json(Path(spec_path).read_bytes())
    attempt = Attempt(spec)
    _stop_on_signal(attempt)
    # The monotonic clock is the machine's, so it continues across processes.
    again = os.environ.pop(_AGAIN, "")
    started, peak = json.loads(again or f"[{time.monotonic()}, 0]")
    lifeline = _stop_without_worker(attempt, again=bool(again))
    done = threading.Event()
    ticker = threading.Thread(target=_tick, args=(attempt, done), daemon=True)
    ticker.start()
    try:
        result = _run(step_name, attempt)
    except StartAgain as error:
        _start_again(attempt, lifeline, json.dumps([started, max(peak, peak_resident())]))
        result = _interrupted(attempt, error)
    done.set()
    ticker.join()
    result = result.model_copy(update=_cost(spec, time.monotonic() - started, peak))
    try:
        durable.write_json(attempt.folder / RESULT_NAME, result.model_dump())
    except OSError as error:
        if not is_disk_full(error):
            raise
        # The worker reports it once there is room, from the exit code.
        return EXIT_DISK_FULL
    return result.exit_code


def _cost(spec: StepSpec, seconds: float, peak: int) -> dict[str, float | None]:
    """Return the result's time, memory and price; `peak` is that of an earlier process of the attempt."""
    of_children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    per_hour = spec.config.price_per_hour
    return {
        "seconds": seconds,
        "peak_memory_bytes": max(peak, peak_resident(), of_children),
        "price": seconds / 3600 * per_hour if per_hour else None,
    }


def _run(step_name: str, attempt: Attempt) -> StepResult:
    """Run the step and return its result, also for errors."""
    key, fence = attempt.spec.key, attempt.spec.fence
    try:
        artifact = BY_NAME[step_name].load()(attempt)
        durable.fsync_tree(attempt.folder)
    except StartAgain:
        raise
    except Interrupted as error:
        return _interrupted(attempt, error)
    except DropforgeError as error:
        with contextlib.suppress(OSError):  # the log is on the disk that may be full
            print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        words = StepError(message=error.message, hint=error.hint)
        return StepResult(key=key, fence=fence, status="failed", exit_code=error.exit_code, error=words)
    except Exception as error:  # noqa: BLE001 - the process's boundary: any error becomes a result
        with contextlib.suppress(OSError):
            traceback.print_exc()
        if is_disk_full(error):
            return _out_of_room(attempt)
        words = StepError(
            message=f"{type(error).__name__}: {error}"[:2000],
            hint=f"the whole log: dropforge logs {attempt.spec.run}",
        )
        return StepResult(key=key, fence=fence, status="failed", exit_code=EXIT_FAILED, error=words)
    inputs = {name: durable.sha256_file(attempt.root / path) for name, path in attempt.spec.inputs.items()}
    return StepResult(
        key=key,
        fence=fence,
        status="ok",
        exit_code=EXIT_OK,
        artifact=artifact.model_dump(mode="json"),
        inputs=inputs,
        outputs=_hash_outputs(attempt.folder),
    )


def _interrupted(attempt: Attempt, error: DropforgeError) -> StepResult:
    spec, words = attempt.spec, StepError(message=error.message)
    return StepResult(key=spec.key, fence=spec.fence, status="interrupted", exit_code=EXIT_INTERRUPTED, error=words)


def _out_of_room(attempt: Attempt) -> StepResult:
    """Delete the step's unfinished files, except predictions, to make room for the result, and return it."""
    for path in attempt.folder.iterdir():
        if path.is_dir() and path.name != "predictions":
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_file() and path.name not in {SPEC_NAME, PROGRESS_NAME, CURVE_NAME, LOG_NAME}:
            path.unlink(missing_ok=True)
    words = StepError(
        message=f"the disk of {attempt.root} is full: step {attempt.spec.step} could not write its files",
        hint="free space there, the run then continues by itself; dropforge gc --dry-run shows what can go",
    )
    spec = attempt.spec
    return StepResult(key=spec.key, fence=spec.fence, status="failed", exit_code=EXIT_DISK_FULL, error=words)


def _hash_outputs(folder: Path) -> dict[str, str]:
    """Return the sha256 of the step's output files, without the contract's own and those in a model's manifest."""
    contract_files = {SPEC_NAME, PROGRESS_NAME, CURVE_NAME, LOG_NAME}
    models = [path.parent for path in folder.glob(f"*/{MANIFEST_NAME}")]
    # Names that begin with a dot are temporary files.
    names = (path for path in folder.rglob("*") if not path.name.startswith(".") and path.name not in contract_files)
    paths = sorted(path for path in names if path.is_file() and not any(map(path.is_relative_to, models)))
    return {path.relative_to(folder).as_posix(): durable.sha256_file(path) for path in paths}


def _stop_on_signal(attempt: Attempt) -> None:
    """Let SIGTERM and SIGINT stop the step at its next safe point; a second signal ends it at once."""

    def handler(_signal: int, _frame: FrameType | None) -> None:
        if attempt.stop.is_set():
            os._exit(EXIT_INTERRUPTED)
        attempt.stop.set()

    for number in _STOPPING:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


def _start_again(attempt: Attempt, lifeline: str, so_far: str) -> None:
    """
    Replace this process by a fresh one with the same command; pid, log, lifeline and attempt stay.

    Returns only if the step was told to stop. Signals from now on are delivered to the fresh process.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    if attempt.stop.is_set():
        return
    os.environ[_AGAIN] = so_far
    if lifeline:
        os.environ[LIFELINE] = lifeline
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - our own command


def _stop_without_worker(attempt: Attempt, *, again: bool) -> str:
    """
    Wait for the worker's start byte, and stop when the worker dies; return the pipe's number, empty if none.

    The worker writes one byte to the inherited pipe once it has recorded this process, so no process runs unrecorded;
    the other end closes when the worker dies, however that happens. A parent-death signal would not do: it is sent when
    the *thread* that started the process ends.
    """
    number = os.environ.pop(LIFELINE, "")
    if not number:
        return ""
    if not again and not os.read(int(number), 1):
        os._exit(EXIT_INTERRUPTED)

    def wait() -> None:
        os.read(int(number), 1)
        attempt.stop.set()
        threading.Event().wait(attempt.spec.grace_seconds)
        os._exit(EXIT_INTERRUPTED)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
    return number


def _tick(attempt: Attempt, done: threading.Event) -> None:
    """Rewrite progress.json until the step ends; errors such as a full disk are ignored."""
    over = False
    while not over:
        with contextlib.suppress(OSError, MemoryError):
            attempt.write_progress()
        over = done.wait(PROGRESS_SECONDS)
    with contextlib.suppress(OSError, MemoryError):
        attempt.write_progress()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
