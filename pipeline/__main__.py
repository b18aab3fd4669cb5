"""Run one attempt at one step in its own process: `python -m pipeline STEP SPEC`."""

import contextlib
import faulthandler
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Literal

from pipeline import durable
from pipeline.artifacts import Verdict
from pipeline.contract import (
    LIFELINE,
    PROGRESS_SECONDS,
    RESULT_NAME,
    STORY_NAMES,
    Attempt,
    StepError,
    StepResult,
    StepSpec,
)
from pipeline.errors import (
    EXIT_DISK_FULL,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_UNFORESEEN,
    DropforgeError,
    Interrupted,
    is_disk_full,
)
from pipeline.models.manifest import MANIFEST_NAME
from pipeline.steps import BY_NAME, PREVIEW

#: Signals that stop a step.
STOPPING = (signal.SIGTERM, signal.SIGINT)
_SAME_SECONDS = 5.0


def main(argv: list[str]) -> int:
    """
    Run step `argv[0]` with the spec file `argv[1]`, write result.json to the attempt's folder, return the exit code.

    An exception in the step becomes a result with status failed or interrupted. If the disk is too full for the result,
    nothing is written and `EXIT_DISK_FULL` returned. SIGTERM, SIGINT or the worker's death stops the step. Raises
    `OSError` or `ValueError` if the spec cannot be read.
    """
    faulthandler.enable()
    step_name, spec_path = argv
    spec = StepSpec.model_validate_json(Path(spec_path).read_bytes())
    attempt = Attempt(spec)
    _stop_on_signal(attempt)
    _stop_without_worker(attempt)
    done = threading.Event()
    ticker = threading.Thread(target=_tick, args=(attempt, done), daemon=True)
    ticker.start()
    result = _run(step_name, attempt)
    done.set()
    ticker.join()
    try:
        durable.write_json(attempt.folder / RESULT_NAME, result.model_dump())
    except OSError as error:
        if not is_disk_full(error):
            raise
        # The worker reports it from the exit code, once there is free space.
        return EXIT_DISK_FULL
    return result.exit_code


def _run(step_name: str, attempt: Attempt) -> StepResult:
    """
    Run the step, write a verdict's evidence card, and return the result.

    An exception in them becomes a result with status failed or interrupted, and an error goes to standard error. If the
    disk is full the attempt's outputs are deleted (`_make_room`).
    """
    spec = attempt.spec
    try:
        artifact = BY_NAME.get(step_name, PREVIEW).load()(attempt)
        if isinstance(artifact, Verdict):
            from pipeline.report.write import write_report  # noqa: PLC0415 - the other steps start without it

            artifact = artifact.model_copy(update={"report": write_report(attempt, artifact)})
        durable.fsync_tree(attempt.folder)
        return StepResult(
            key=spec.key,
            fence=spec.fence,
            status="ok",
            exit_code=EXIT_OK,
            artifact=artifact.model_dump(mode="json"),
            outputs=_hash_outputs(attempt.folder),
        )
    except Interrupted as error:
        return _ended(spec, "interrupted", error.exit_code, error.message)
    except DropforgeError as error:
        # Most of a step's code need not know of which run it is.
        hint = error.hint.replace("dropforge retry RUN", f"dropforge retry {spec.run}")
        with contextlib.suppress(OSError):  # the log is on the disk that may be full
            print(f"error: {error.message}\nhint: {hint}", file=sys.stderr)
        return _ended(spec, "failed", error.exit_code, error.message, hint)
    except Exception as error:  # noqa: BLE001 - the process's boundary: any error becomes a result
        with contextlib.suppress(OSError):
            traceback.print_exc()
        if is_disk_full(error):
            _make_room(attempt)
            message = f"the disk of {attempt.root} is full: step {spec.step} could not write its files"
            hint = "free space there, the run then continues by itself; dropforge gc --dry-run shows what can go"
            return _ended(spec, "failed", EXIT_DISK_FULL, message, hint)
        message, hint = f"{type(error).__name__}: {error}"[:2000], f"the whole log: dropforge logs {spec.run}"
        return _ended(spec, "failed", EXIT_UNFORESEEN, message, hint)


def _ended(
    spec: StepSpec, status: Literal["failed", "interrupted"], exit_code: int, message: str, hint: str = ""
) -> StepResult:
    error = StepError(message=message, hint=hint)
    return StepResult(key=spec.key, fence=spec.fence, status=status, exit_code=exit_code, error=error)


def _make_room(attempt: Attempt) -> None:
    """Delete the attempt's outputs but its predictions, to free space for its result."""
    for path in attempt.folder.iterdir():
        if path.is_dir() and path.name != "predictions":
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_file() and path.name not in STORY_NAMES:
            path.unlink(missing_ok=True)


def _hash_outputs(folder: Path) -> dict[str, str]:
    """Return each output's sha256 by path, without temporary files, the contract's, and models with a manifest."""
    models = [path.parent for path in folder.glob(f"*/{MANIFEST_NAME}")]
    # Names that begin with a dot are temporary files.
    names = (path for path in folder.rglob("*") if not path.name.startswith(".") and path.name not in STORY_NAMES)
    paths = sorted(path for path in names if path.is_file() and not any(map(path.is_relative_to, models)))
    return {path.relative_to(folder).as_posix(): durable.sha256_file(path) for path in paths}


def _stop_on_signal(attempt: Attempt) -> None:
    """
    Install handlers: SIGTERM or SIGINT stops the step at its next safe point, a second exits (`EXIT_INTERRUPTED`).

    A second one within 5 s counts as the first: Slurm signals every process of a job, and the worker signals this one.
    """
    first = 0.0

    def handler(_signal: int, _frame: FrameType | None) -> None:
        nonlocal first
        if attempt.stop.is_set() and time.monotonic() - first > _SAME_SECONDS:
            os._exit(EXIT_INTERRUPTED)
        first = first or time.monotonic()
        attempt.stop.set()

    for number in STOPPING:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def _stop_without_worker(attempt: Attempt) -> None:
    """
    Wait for the worker's start byte, then stop the step when the worker dies; a thread watches its pipe.

    Without the variable `LIFELINE`, which is removed, nothing is done. The worker writes one byte to the inherited pipe
    once it has recorded this process, so no process runs unrecorded: without the byte it exits (`EXIT_INTERRUPTED`).
    The other end closes when the worker dies, however that happens. A step that has not ended `grace_seconds` later
    exits likewise. A parent-death signal would not do: it is sent when the *thread* that started the process ends.
    """
    number = os.environ.pop(LIFELINE, "")
    if not number:
        return
    if not os.read(int(number), 1):
        os._exit(EXIT_INTERRUPTED)

    def wait() -> None:
        os.read(int(number), 1)
        attempt.stop.set()
        threading.Event().wait(attempt.spec.grace_seconds)
        os._exit(EXIT_INTERRUPTED)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def _tick(attempt: Attempt, done: threading.Event) -> None:
    """
    Write progress.json every `PROGRESS_SECONDS` until `done` is set, and once more afterwards.

    `OSError`, as of a full disk, and `MemoryError` are ignored.
    """
    over = False
    while not over:
        with contextlib.suppress(OSError, MemoryError):
            attempt.write_progress()
        over = done.wait(PROGRESS_SECONDS)
    with contextlib.suppress(OSError, MemoryError):
        attempt.write_progress()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
