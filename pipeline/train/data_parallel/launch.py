"""
Start, stop and supervise the processes of a data-parallel training from the step's process, which computes nothing.

They report through files in the training's scratch folder: a pipe whose writer is killed would block its reader.
"""

import errno
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.config import TrainConfig
from pipeline.contract import Attempt, StepSpec
from pipeline.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    CannotTrain,
    DropforgeError,
    Interrupted,
    StepFailed,
    is_disk_full,
)
from pipeline.models.loading import Device, OutOfMemory, load_tokenizer
from pipeline.train.data_parallel.sharing import ProcessRank
from pipeline.train.trainer import TokenRow, Training
from pipeline.train.training import Trained, train_model

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0
_PROGRESS, _MEETING, _OUTCOME = "progress.json", "meeting", "outcome-{}.json"
_DISK_FULL = "disk full"
#: Errors that are the cause by themselves; any other may only be the consequence of another process's end.
_ERRORS = {kind.__name__: kind for kind in (CannotTrain, StepFailed, OutOfMemory, Interrupted)}
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def process_count(config: TrainConfig, device: Device) -> int:
    """
    Return the number of processes of a training, at most the records per optimizer step.

    Raises `CannotTrain` if `train.processes` are more than CUDA devices are visible.
    """
    cards = _cards(device)
    wanted = max(1, cards) if config.processes == "auto" else config.processes
    if device == "cuda" and wanted > cards:
        message = f"train.processes is {wanted}, and torch sees {cards} CUDA devices"
        raise CannotTrain(message, 'set it to "auto", or look at CUDA_VISIBLE_DEVICES')
    return min(wanted, config.batch_size)


def train_in_processes(
    training: Training, tokenizer: Any, rows: Sequence[TokenRow], dev: Sequence[TokenRow], attempt: Attempt
) -> Trained:
    """
    Run `train_model` in `training.process.count` processes; a single one on the CPU or the only GPU is this one.

    Raises what `train_model` raises, and `StepFailed` if a process died. No process is left running.
    """
    from torch.multiprocessing.spawn import start_processes

    if training.process.count == 1 and _cards(training.device) < 2:  # noqa: PLR2004 - several cards
        return train_model(training, tokenizer, rows, dev, attempt)
    sys.stderr.write(f"{training.process.count} processes share the training\n")
    start: Any = start_processes
    started = start(_run_process, (training, rows, dev, attempt.spec), training.process.count, join=False).processes
    try:
        codes = _wait(started, training.scratch, attempt)
    finally:
        end = time.monotonic() + _GRACE_SECONDS
        for process in started:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()
    if any(codes):
        raise _error(codes, training.scratch, attempt)
    return Trained.model_validate(durable.read_json(training.scratch / _OUTCOME.format(0)))


def _cards(device: Device) -> int:
    import torch

    return torch.cuda.device_count() if device == "cuda" else 0


def _wait(processes: Sequence[Any], scratch: Path, attempt: Attempt) -> list[int | None]:
    """
    Return the exit codes once all processes have ended or one has died; `None` for those still running.

    Stopped processes do not wait for each other, and the first may still be writing the checkpoint.
    """
    terminated = False
    while True:
        codes = [process.exitcode for process in processes]
        running = [process for process, code in zip(processes, codes, strict=True) if code is None]
        if not running or set(codes) - {None, 0, EXIT_INTERRUPTED}:
            return codes
        multiprocessing.connection.wait([process.sentinel for process in running], _POLL_SECONDS)
        if attempt.stop.is_set() and not terminated:
            for process in running:
                process.terminate()
            terminated = True
        if progress := durable.read_object(scratch / _PROGRESS):
            attempt.progress(**progress)


def _error(codes: Sequence[int | None], scratch: Path, attempt: Attempt) -> Exception:
    """Return the error that ended a training: the first that a process reported, or the signal that killed one."""
    files = sorted(scratch.glob(_OUTCOME.format("*")), key=lambda path: path.stat().st_mtime_ns)
    reports = [report for report in map(durable.read_object, files) if "kind" in report]
    for report in reports:
        if report["kind"] in _ERRORS:
            return _ERRORS[report["kind"]](report["message"], report["hint"])
        if report["kind"] == _DISK_FULL:
            return OSError(errno.ENOSPC, report["message"])
    if attempt.stop.is_set():
        return Interrupted("training was stopped before it left a checkpoint")
    rank, code = min(enumerate(codes), key=lambda pair: pair[1] or 0)
    if code is not None and code < 0:
        message = f"process {rank + 1} of {len(codes)} of the training was killed by {signal.Signals(-code).name}"
        return StepFailed(message, "if memory ran out (see dmesg), free some or lower train.max_length")
    words = (
        reports[0] if reports else {"message": "a process of the training ended without an error message", "hint": ""}
    )
    return StepFailed(words["message"], words["hint"] or f"dropforge logs {attempt.spec.run}")


class _ProcessAttempt(Attempt):
    """The attempt within a process of the training; it reports progress to the step's process."""

    def __init__(self, spec: StepSpec, process: ProcessRank, scratch: Path) -> None:
        super().__init__(spec)
        self._file = None if process.rank else scratch / _PROGRESS

    def progress(self, done: int, total: int, **fields: Any) -> None:
        if self._file is not None:
            durable.write_hint(self._file, {"done": done, "total": total, **fields})

    def check_stop(self) -> None:
        """Do nothing: all processes must stop after the same step (see `keeper`), or the others wait forever."""


def _run_process(
    rank: int, training: Training, rows: Sequence[TokenRow], dev: Sequence[TokenRow], spec: StepSpec
) -> None:
    """Run process `rank` of a training and write its outcome to a file."""
    # Torch has the kernel send SIGINT when the step's process has died.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    training = replace(training, process=replace(training.process, rank=rank))
    attempt = _ProcessAttempt(spec, training.process, training.scratch)
    signal.signal(signal.SIGTERM, lambda *_: attempt.stop.set())
    if rank:  # only the first process writes to the log
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    outcome: dict[str, Any]
    try:
        _join_group(training)
        outcome = train_model(training, load_tokenizer(training.base), rows, dev, attempt).model_dump(mode="json")
    except Exception as error:  # noqa: BLE001 - the border of a process
        outcome = _words(error)
    durable.write_json(training.scratch / _OUTCOME.format(rank), outcome)
    if "kind" in outcome:
        # At once: a regular exit can wait for processes that wait for this one.
        os._exit(EXIT_INTERRUPTED if outcome["kind"] == Interrupted.__name__ else EXIT_FAILED)
    from torch import distributed

    distributed.destroy_process_group()


def _words(error: Exception) -> dict[str, str]:
    if isinstance(error, DropforgeError):
        return {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    traceback.print_exc(file=sys.__stderr__)
    kind = _DISK_FULL if is_disk_full(error) else ""
    return {"kind": kind, "message": f"{type(error).__name__}: {error}"[:2000], "hint": ""}


def visible_device(rank: int, visible: str | None) -> str:
    """Return the name or number of the GPU of process `rank`, among those in CUDA_VISIBLE_DEVICES if it is set."""
    return visible.split(",")[rank].strip() if visible else str(rank)


def _join_group(training: Training) -> None:
    """Select this process's GPU or share of CPU threads, and join the process group."""
    process = training.process
    if training.device == "cuda":
        # Before anything initialises CUDA; the libraries then see one GPU.
        os.environ[_VISIBLE] = visible_device(process.rank, os.environ.get(_VISIBLE))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch

    if training.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // process.count))
    torch.distributed.init_process_group(
        "nccl" if training.device == "cuda" else "gloo",
        init_method=f"file://{training.scratch / _MEETING}",
        rank=process.rank,
        world_size=process.count,
    )
