"""
Plan a training's memory: the plan to start with, and a smaller one after memory has run out.

A training that ran out of memory continues in a fresh process, from its newest checkpoint, with smaller micro-batches:
fragmented memory cannot be recovered within the process. Records, their order and gradients do not depend on the plan.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from pipeline import durable
from pipeline.config import MemoryPlan, TrainConfig
from pipeline.contract import Attempt
from pipeline.errors import StartAgain, StepFailed
from pipeline.models.loading import Device, OutOfMemory, arithmetic_dtype, free_memory
from pipeline.models.memory_estimate import MARGIN, BaseSizes, base_sizes, estimate, peak_resident
from pipeline.words import size_words

NOTE_NAME = "memory.json"
_LEAST_LENGTH = 16
"""The smallest allowed train.max_length."""


@dataclass(frozen=True)
class PlannedMemory:
    """A training's memory plan, with the sizes that an estimate for it or another plan needs."""

    plan: MemoryPlan
    base: BaseSizes
    train: TrainConfig
    device: Device
    free: int
    """Bytes free per process on the device before anything was loaded."""
    longest: int
    """Tokens of the longest record."""
    most: int
    """Tokens of a process's share of an optimizer step if all its records are that long."""

    def tokens(self, plan: MemoryPlan) -> int:
        """Return the most tokens of a micro-batch under `plan`."""
        return max(self.longest, min(plan.batch_tokens, self.most))

    def bytes_of(self, plan: MemoryPlan) -> dict[str, int]:
        """Return the estimated memory of a training under `plan`, in bytes by purpose."""
        plan = plan.model_copy(update={"batch_tokens": self.tokens(plan)})
        narrow = arithmetic_dtype(self.device) is None
        return estimate(self.base, plan, self.train, self.device, arithmetic_in_16_bits=narrow)

    def fits(self, plan: MemoryPlan) -> bool:
        """Return whether a training under `plan` is estimated to fit."""
        return sum(self.bytes_of(plan).values()) <= MARGIN * self.free


def plan_memory(
    attempt: Attempt, base: Path, device: Device, lengths: Sequence[int], processes: int = 1
) -> PlannedMemory:
    """
    Return the memory plan for training on records of `lengths` tokens in `processes` processes.

    The plan that this run last used comes first, then that of an earlier run on this device, then the estimate.
    """
    config = attempt.config.train
    longest = max(lengths)
    asked = MemoryPlan(
        device=device_name(device),
        quantization="nf4" if config.quantization == "nf4" else "none",
        batch_tokens=config.batch_tokens,
        activations="recomputed" if device == "cuda" else "kept",
    )
    most = longest * -(-config.batch_size // processes)
    free = free_memory(device) // (1 if device == "cuda" else processes)
    memory = PlannedMemory(asked, base_sizes(base), config, device, free, longest, most)
    known = _noted(attempt, asked.device) or _of_earlier(attempt, asked)
    plan = known or _estimated(memory, may_quantise=config.quantization == "auto")
    _note(attempt, plan)
    memory = replace(memory, plan=plan)
    kept = "" if known in {None, asked} else "; plan of an earlier training, used until train.batch_tokens changes"
    sys.stderr.write(f"memory: {_words(memory, plan)}; {size_words(memory.free)} free{kept}\n")
    return memory


def go_on_with_less(attempt: Attempt, memory: PlannedMemory, error: OutOfMemory) -> NoReturn:
    """
    Save a plan that needs less memory and raise `StartAgain`.

    Raises `Interrupted` if the attempt is stopped, `StepFailed`, saying what would fit, if there is no such plan.
    """
    plan = smaller(memory, memory.plan)
    if plan is None:
        message = f"{error.message}: {_words(memory, memory.plan)}; {size_words(memory.free)} were free"
        raise StepFailed(message, _what_fits(memory)) from error
    _note(attempt, plan)
    message = f"{error.message}; training continues in a fresh process: {_words(memory, plan)}"
    sys.stderr.write(f"{message}\n")
    attempt.check_stop()
    raise StartAgain(message) from error


def smaller(memory: PlannedMemory, plan: MemoryPlan) -> MemoryPlan | None:
    """
    Return the next plan that needs less memory than `plan`; `None` if there is none.

    Micro-batches are halved down to one record, then activations are recomputed, then, on a GPU, offloaded.
    """
    if memory.tokens(plan) > memory.longest:
        return plan.model_copy(update={"batch_tokens": max(memory.longest, memory.tokens(plan) // 2)})
    if plan.activations == "kept":
        return plan.model_copy(update={"activations": "recomputed"})
    if plan.activations == "recomputed" and memory.device == "cuda":
        return plan.model_copy(update={"activations": "offloaded"})
    return None


def device_name(device: Device) -> str:
    """Return the GPU's name, or `cpu`."""
    import torch

    return str(torch.cuda.get_device_name()) if device == "cuda" else "cpu"


def peak_memory(device: Device) -> int:
    """Return this process's peak memory in bytes: allocated by torch on a GPU, else resident."""
    import torch

    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return peak_resident()


def _noted(attempt: Attempt, device: str) -> MemoryPlan | None:
    """Return the plan that this run last used on the same device, under the same settings."""
    note = durable.read_object(attempt.path(attempt.spec.checkpoints) / NOTE_NAME)
    if note.get("asked") != _asked(attempt.config.train):
        return None
    try:
        plan = MemoryPlan.model_validate(note.get("plan"))
    except ValueError:
        return None
    return plan if plan.device == device else None


def _of_earlier(attempt: Attempt, asked: MemoryPlan) -> MemoryPlan | None:
    """Return the plan of the last comparable run on the same device, within the tokens of `asked`."""
    earlier, config = attempt.spec.memory, attempt.config.train
    if earlier is None or earlier.device != asked.device or config.quantization not in {"auto", earlier.quantization}:
        return None
    return earlier.model_copy(update={"batch_tokens": min(earlier.batch_tokens, asked.batch_tokens)})


def _estimated(memory: PlannedMemory, *, may_quantise: bool) -> MemoryPlan:
    """Return the first plan that is estimated to fit, or else the smallest; NF4 is tried before smaller plans."""
    plan = memory.plan
    if may_quantise and not memory.fits(plan):
        plan = _quantised(plan)
    while not memory.fits(plan):
        less = smaller(memory, plan)
        if less is None:
            break
        plan = less
    return plan


def _note(attempt: Attempt, plan: MemoryPlan) -> None:
    """Save the plan that the run's later processes train with."""
    folder = attempt.path(attempt.spec.checkpoints)
    folder.mkdir(parents=True, exist_ok=True)
    note = {"asked": _asked(attempt.config.train), "plan": plan.model_dump(mode="json")}
    durable.write_json(folder / NOTE_NAME, note)


def _asked(config: TrainConfig) -> dict[str, Any]:
    of_memory = {"method", "quantization", "batch_tokens", "batch_size", "max_length", "rank", "share"}
    return config.model_dump(mode="json", include=of_memory)


def _what_fits(memory: PlannedMemory) -> str:
    """Return the remedy: a setting with which the training is estimated to fit, or to free memory."""
    lengths = [memory.longest // 2**times for times in range(1, memory.longest.bit_length())]
    fits = (length for length in lengths if replace(memory, longest=length, most=length).fits(memory.plan))
    may_quantise = memory.plan.quantization == "none" and not memory.train.trains_full_weights
    if may_quantise and memory.fits(_quantised(memory.plan)):
        setting = 'train.quantization = "nf4"'
    elif (length := next(fits, 0)) >= _LEAST_LENGTH:
        setting = f"train.max_length = {length}"
    else:
        return "free memory there, or use a smaller base model or a device with more memory"
    return f"set {setting}, which is estimated to fit, or free memory there"


def _quantised(plan: MemoryPlan) -> MemoryPlan:
    return plan.model_copy(update={"quantization": "nf4"})


def _words(memory: PlannedMemory, plan: MemoryPlan) -> str:
    base = "NF4 base" if plan.quantization == "nf4" else "base as saved"
    needs = size_words(sum(memory.bytes_of(plan).values()))
    return f"estimated {needs}: {base}, micro-batches of {memory.tokens(plan)} tokens, activations {plan.activations}"
