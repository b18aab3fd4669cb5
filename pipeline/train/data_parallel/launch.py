"""
The processes of a training: started, stopped and ended by the step's own, which computes nothing itself.

What they have to say goes through files in the training's scratch folder: a pipe that is written to by a process that
is killed would block its reader.
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
from pipeline.train.data_parallel.sharing import Place
from pipeline.train.fit import Trained, fit
from pipeline.train.trainer import TokenRow, Training

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0
_PROGRESS, _MEETING, _OUTCOME = "progress.json", "meeting", "outcome-{}.json"
_DISK_FULL = "disk full"
#: What ends a training by itself; any other error in a process may be that another one is gone.
_ERRORS = {kind.__name__: kind for kind in (CannotTrain, StepFailed, OutOfMemory, Interrupted)}
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def process_count(config: TrainConfig, device: Device) -> int:
    """
    Return how many processes a training has: no more than an optimizer step has records.

    Raises `CannotTrain` if `train.processes` are more than CUDA devices are visible.
    """
    cards = _cards(device)
    wanted = max(1, cards) if config.processes == "auto" else config.processes
    if device == "cuda" and wanted > cards:
        message = f"train.processes is {wanted}, and torch sees {cards} CUDA devices"
        raise CannotTrain(message, 'set it to "auto", or look at CUDA_VISIBLE_DEVICES')
    return min(wanted, config.batch_size)


def fit_in_processes(
    training: Training, tokenizer: Any, rows: Sequence[TokenRow], dev: Sequence[TokenRow], attempt: Attempt
) -> Trained:
    """
    Do what `fit` does, in `training.place.processes` processes; one on the CPU or the only card is this one.

    Raises what `fit` raises, and `StepFailed` if a process died. None is left behind.
    """
    from torch.multiprocessing.spawn import start_processes

    if training.place.processes == 1 and _cards(training.device) < 2:  # noqa: PLR2004 - several cards
        return fit(training, tokenizer, rows, dev, attempt)
    sys.stderr.write(f"{training.place.processes} processes share the training\n")
    start: Any = start_processes
    started = start(_fit_as, (training, rows, dev, attempt.spec), training.place.processes, join=False).processes
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
    Return the exit codes once all processes ended, or one died; `None` of those that still run.

    Those that were stopped wait for nobody, and the first one may still be writing their checkpoint.
    """
    told = False
    while True:
        codes = [process.exitcode for process in processes]
        running = [process for process, code in zip(processes, codes, strict=True) if code is None]
        if not running or set(codes) - {None, 0, EXIT_INTERRUPTED}:
            return codes
        multiprocessing.connection.wait([process.sentinel for process in running], _POLL_SECONDS)
        if attempt.stop.is_set() and not told:
            for process in running:
                process.terminate()
            told = True
        if said := durable.read_object(scratch / _PROGRESS):
            attempt.progress(**said)


def _error(codes: Sequence[int | None], scratch: Path, attempt: Attempt) -> Exception:
    """Return why a training ended: what a process said first, unless one was killed, or the others only miss it."""
    files = sorted(scratch.glob(_OUTCOME.format("*")), key=lambda path: path.stat().st_mtime_ns)
    said = [found for found in map(durable.read_object, files) if "kind" in found]
    for one in said:
        if one["kind"] in _ERRORS:
            return _ERRORS[one["kind"]](one["message"], one["hint"])
        if one["kind"] == _DISK_FULL:
            return OSError(errno.ENOSPC, one["message"])
    if attempt.stop.is_set():
        return Interrupted("training was asked to stop before it left a checkpoint")
    rank, code = min(enumerate(codes), key=lambda one: one[1] or 0)
    if code is not None and code < 0:
        message = f"process {rank + 1} of {len(codes)} of the training was killed by {signal.Signals(-code).name}"
        return StepFailed(message, "if memory ran out, dmesg says so: free some, or lower train.max_length")
    words = said[0] if said else {"message": "a process of the training ended without a word", "hint": ""}
    return StepFailed(words["message"], words["hint"] or f"dropforge logs {attempt.spec.run}")


class _Told(Attempt):
    """The attempt as a process of the training has it: what is said of progress goes to the step's own process."""

    def __init__(self, spec: StepSpec, place: Place, scratch: Path) -> None:
        super().__init__(spec)
        self._file = None if place.rank else scratch / _PROGRESS

    def progress(self, done: int, total: int, **fields: Any) -> None:
        if self._file is not None:
            durable.write_hint(self._file, {"done": done, "total": total, **fields})

    def check_stop(self) -> None:
        """Go on: all processes stop after the same step (see `keeper`), or those that do not wait for ever."""


def _fit_as(rank: int, training: Training, rows: Sequence[TokenRow], dev: Sequence[TokenRow], spec: StepSpec) -> None:
    """Be process `rank` of a training, and leave word of how it went."""
    # Torch has the kernel send it when the step's own process is gone, whatever this one is doing.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    training = replace(training, place=replace(training.place, rank=rank))
    attempt = _Told(spec, training.place, training.scratch)
    signal.signal(signal.SIGTERM, lambda *_: attempt.stop.set())
    if rank:  # what all of them have to say is said once
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    outcome: dict[str, Any]
    try:
        _meet(training)
        outcome = fit(training, load_tokenizer(training.base), rows, dev, attempt).model_dump(mode="json")
    except Exception as error:  # noqa: BLE001 - the border of a process
        outcome = _words(error)
    durable.write_json(training.scratch / _OUTCOME.format(rank), outcome)
    if "kind" in outcome:
        # At once: the end of a process that others wait for can wait for them.
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
    """Return the card of process `rank`, by the name or number that CUDA_VISIBLE_DEVICES, or nothing, gives it."""
    return visible.split(",")[rank].strip() if visible else str(rank)


def _meet(training: Training) -> None:
    """Take the card, or the part of the processor, that is this process's, and meet the others."""
    place = training.place
    if training.device == "cuda":
        # Before anything looks for cards. To the libraries the machine then has one.
        os.environ[_VISIBLE] = visible_device(place.rank, os.environ.get(_VISIBLE))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch

    if training.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // place.processes))
    torch.distributed.init_process_group(
        "nccl" if training.device == "cuda" else "gloo",
        init_method=f"file://{training.scratch / _MEETING}",
        rank=place.rank,
        world_size=place.processes,
    )
