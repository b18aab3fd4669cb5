"""
Train on tokenised rows and save the result, resuming from a checkpoint where there is one.

With several GPUs a training is data-parallel, one process per GPU. The processes report through files in the training's
scratch folder: a pipe whose writer is killed would block its reader. They join their process group through a file, too:
torchrun's rendezvous listens on all networks and unpickles the data that it receives. Those of several nodes join over
TCP, by torch's own store, as not every shared file system can lock a file.
"""

import errno
import math
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

from pipeline import durable
from pipeline.artifacts import CurvePoint, Trained
from pipeline.config import TrainConfig
from pipeline.contract import Attempt, StepSpec, thinned
from pipeline.errors import EXIT_FAILED, CannotTrain, DropforgeError, Interrupted, StepFailed, is_disk_full
from pipeline.models.loading import Device, load_tokenizer, memory_errors
from pipeline.models.memory_estimate import peak_resident
from pipeline.train.checkpoints import newest_valid, step_of
from pipeline.train.data_parallel import ProcessRank, end_nodes, start_nodes
from pipeline.train.job import Job

_PATIENCE = timedelta(hours=12)
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0
_PROGRESS, _MEETING, _RESULT, _ERROR = "progress.json", "meeting", "result.json", "error.pickle"
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def train_model(job: Job, tokenizer: Any, attempt: Attempt) -> Trained:
    """
    Train an adapter, or the base's own weights, and save them; resume from the newest checkpoint of this training.

    Only rank 0 saves, in `job.adapter`. Raises `Interrupted` if the attempt was stopped, after a checkpoint if
    training had begun, `OutOfMemory` if a micro-batch did not fit into memory, `StepFailed` if the base does not,
    and `CannotTrain` if the training diverged, no weight changed, or base, tokenizer, settings or GPU do not match.
    """
    # They load bitsandbytes, which may get a context on a GPU: memory is planned, and the process's GPU chosen, before.
    from pipeline.train.trained_weights import save_trained  # noqa: PLC0415
    from pipeline.train.trainer import Trainer  # noqa: PLC0415
    from pipeline.train.watcher import Watcher  # noqa: PLC0415

    checkpoint = newest_valid(attempt.path(attempt.spec.checkpoints), job.fingerprint)
    hint = "free memory on the device, or lower train.max_length"
    with memory_errors("a micro-batch does not fit into memory", hint):
        trainer = Trainer(job, tokenizer)
        before = _norms(trainer.model)
        watcher = Watcher(attempt, job)
        trainer.add_callback(watcher)
        attempt.check_stop()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if step < steps:
        raise Interrupted(f"training was stopped and left a checkpoint at step {step} of {steps}")
    _require_change(before, _norms(trainer.model))
    if not job.process.rank:
        save_trained(trainer.model, job.adapter)
    return _outcome(job, trainer, watcher, step_of(checkpoint) if checkpoint else 0)


def _outcome(job: Job, trainer: Any, watcher: Any, resumed_from: int) -> Trained:
    """Return the description of a finished training, which began at the optimizer step `resumed_from`."""
    return Trained(
        **job.plan.model_dump(),
        learning_rate=trainer.args.learning_rate,
        epochs=trainer.args.num_train_epochs,
        optimizer_steps=trainer.state.global_step,
        resumed_from_step=resumed_from,
        trained_tokens=int(trainer.state.num_input_tokens_seen),
        loss_curve=thinned(watcher.losses),
        dev_curve=tuple(CurvePoint(step=step, loss=loss) for step, loss in watcher.dev),
        trainable_parameters=sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad),
        estimated_memory=job.estimated_memory,
        peak_memory_bytes=torch.cuda.max_memory_reserved() if job.device == "cuda" else peak_resident(),
    )


def _require_change(before: Sequence[float], after: Sequence[float]) -> None:
    """Raise `CannotTrain` unless some trained weight's norm has changed, and all are finite."""
    if not all(map(math.isfinite, after)):
        raise CannotTrain("training diverged: trained weights are not finite", "lower train.learning_rate")
    if after == before:
        raise CannotTrain(
            "training changed no weight: no gradient reached them",
            "raise train.learning_rate or train.epochs; if they are sensible, report this",
        )


def _norms(model: Any) -> list[float]:
    """Return the L2 norm of each trained weight, which shows a change without a copy of the weights."""
    return [float(weight.detach().cpu().double().norm()) for weight in model.parameters() if weight.requires_grad]


def process_count(config: TrainConfig, device: Device, nodes: int = 1) -> int:
    """
    Return the number of processes on all `nodes`: `train.processes` per node, at most the records of an optimizer step.

    "auto" is one per visible GPU, and one on a CPU. Raises `CannotTrain` if `device` is "cuda" and `train.processes`
    larger than the number of visible CUDA devices.
    """
    cards = visible_gpus(device)
    wanted = max(1, cards) if config.processes == "auto" else config.processes
    if device == "cuda" and wanted > cards:
        raise CannotTrain(
            f"train.processes is {wanted}, and torch sees {cards} CUDA devices",
            'set it to "auto", or look at CUDA_VISIBLE_DEVICES',
        )
    return nodes * min(wanted, config.batch_size // nodes)


def train_in_processes(job: Job, tokenizer: Any, attempt: Attempt) -> Trained:
    """
    Run `train_model` in `job.process.count` processes; return its result.

    A single process is the calling one, except on a machine with several GPUs. Raises what `train_model` raises, and
    `StepFailed` if a process died or failed otherwise. No process is left running.
    """
    if job.process.count == 1 and visible_gpus(job.device) < 2:  # noqa: PLR2004 - several
        return train_model(job, tokenizer, attempt)
    if job.process.count > 1:
        sys.stderr.write(f"{job.process.count} processes share the training\n")
    start: Any = start_processes
    work = (job, attempt.spec)
    others = start_nodes((run_process, *work), job.process.nodes - 1, job.scratch)
    processes = start(run_process, work, job.process.per_node, join=False).processes
    try:
        while None in (codes := [*(process.exitcode for process in processes), *(srun.poll() for srun in others)]):
            if any(codes):
                break
            time.sleep(_POLL_SECONDS)
            if attempt.stop.is_set():
                for process in processes:
                    process.terminate()
            if progress := durable.read_object(job.scratch / _PROGRESS):
                attempt.show_curve(*progress.pop("curve"))
                attempt.progress(**progress)
    finally:
        end = time.monotonic() + _GRACE_SECONDS
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()
        end_nodes(others, max(0.0, end - time.monotonic()))
    result = durable.read_json(job.scratch / _RESULT)
    if any(codes) or result is None:
        raise _error(codes, job.scratch / _ERROR, attempt)
    return Trained.model_validate(result)


def visible_gpus(device: Device) -> int:
    """Return the number of GPUs that torch sees; 0 if `device` is the CPU."""
    return torch.cuda.device_count() if device == "cuda" else 0


def _error(codes: Sequence[int | None], report: Path, attempt: Attempt) -> Exception:
    """
    Return the error to raise for a failed training: that in the file `report`, or one made from the exit codes.

    A `DropforgeError` or `OSError` in the file is returned as it is. Otherwise it is `Interrupted` if the attempt was
    stopped, or else `StepFailed` with the signal that killed a process, or with the message in the file.
    """
    error = Exception("a process of the training ended without an error message")
    with suppress(OSError, EOFError, pickle.UnpicklingError):
        error = pickle.loads(report.read_bytes())  # noqa: S301 - of our own process
    if isinstance(error, DropforgeError | OSError):
        return error
    if attempt.stop.is_set():
        return Interrupted("training was stopped before it left a checkpoint")
    # The error of another process may be the consequence.
    rank, code = min(enumerate(codes), key=lambda pair: pair[1] or 0)
    if code is not None and code < 0:
        return StepFailed(
            f"process {rank + 1} of {len(codes)} of the training was killed by {signal.Signals(-code).name}",
            "if memory ran out (see dmesg), free some or lower train.max_length",
        )
    return StepFailed(str(error), f"dropforge logs {attempt.spec.run}")


class _ProcessAttempt(Attempt):
    """The attempt in a spawned training process; rank 0 writes progress and curve to a file for the step's process."""

    def __init__(self, spec: StepSpec, process: ProcessRank, scratch: Path) -> None:
        super().__init__(spec)
        self._file = None if process.rank else scratch / _PROGRESS

    def progress(self, done: int, total: int, **fields: Any) -> None:
        if self._file is not None:
            losses, dev = self._losses or ((), ())
            curve = [(point.step, point.loss) for point in thinned(losses)], dev
            durable.write_hint(self._file, {"done": done, "total": total, "curve": curve, **fields})

    def check_stop(self) -> None:
        """Do nothing: all processes must stop after the same step (see `Watcher`), or the others wait forever."""


def run_process(number: int, job: Job, spec: StepSpec) -> None:
    """
    Run a node's process `number`, from 0, of a training; `job.process` is the node's first.

    The result of rank 0, or the first error of all, is written to a file in `job.scratch`. Never returns: the process
    exits, with `EXIT_FAILED` after an error other than `Interrupted`.
    """
    # Torch has the kernel send SIGINT when the step's process has died.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    rank = job.process.rank + number
    job = replace(job, process=replace(job.process, rank=rank))
    attempt = _ProcessAttempt(spec, job.process, job.scratch)
    signal.signal(signal.SIGTERM, lambda *_: attempt.stop.set())
    if rank:  # only the first process writes to the log
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    try:
        _join_group(job)
        trained = train_model(job, load_tokenizer(job.base), attempt)
    except Exception as error:  # noqa: BLE001 - the border of a process
        if not isinstance(error, DropforgeError):
            traceback.print_exc(file=sys.__stderr__)
            words = f"{type(error).__name__}: {error}"[:2000]
            error = OSError(errno.ENOSPC, words) if is_disk_full(error) else Exception(words)
        with suppress(FileExistsError), (job.scratch / _ERROR).open("xb") as file:
            pickle.dump(error, file)
        # At once: a regular exit can wait for processes that wait for this one. One that was stopped is no failure, at
        # which the others would be killed: the first may still be writing the checkpoint.
        os._exit(0 if isinstance(error, Interrupted) else EXIT_FAILED)
    if not rank:
        durable.write_json(job.scratch / _RESULT, trained.model_dump(mode="json"))
    torch.distributed.destroy_process_group()
    sys.stderr.flush()
    # At once: at a regular exit a library's thread may still run, which aborts a process whose work is done.
    os._exit(0)


def visible_device(number: int, visible: str | None) -> str:
    """Return the name of GPU `number`, from 0, among those in CUDA_VISIBLE_DEVICES, or `number` if it is not set."""
    return visible.split(",")[number].strip() if visible else str(number)


def _join_group(job: Job) -> None:
    """Select this process's GPU or share of CPU threads, and join the process group."""
    process = job.process
    if job.device == "cuda":
        # Before anything initialises CUDA; the libraries then see one GPU.
        os.environ[_VISIBLE] = visible_device(process.gpu + process.rank % process.per_node, os.environ.get(_VISIBLE))
    if process.nodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if job.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // process.per_node))
    torch.distributed.init_process_group(
        "nccl" if job.device == "cuda" else "gloo",
        init_method=process.meeting or f"file://{job.scratch / _MEETING}",
        rank=process.rank,
        world_size=process.count,
        # Rank 0 alone writes checkpoints and computes Spectrum's ratios: NCCL's own ten minutes can be too short.
        timeout=_PATIENCE,
        device_id=torch.device("cuda", 0) if job.device == "cuda" else None,
    )
