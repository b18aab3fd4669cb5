"""
Plan a training's memory: the plan to begin with, and a smaller one after memory has run out.

An attempt that ran out of memory saves the next smaller plan and ends; the next attempt resumes from the checkpoint
with it: fragmented memory cannot be recovered within a process. Records, their order and gradients do not depend on the
plan.
"""

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from pipeline import durable
from pipeline.artifacts import MemoryPlan
from pipeline.config import TrainConfig
from pipeline.contract import Attempt
from pipeline.errors import StartAgain, StepFailed
from pipeline.models.loading import Device, OutOfMemory, arithmetic_dtype, free_memory
from pipeline.models.memory_estimate import MARGIN, BaseSizes, base_sizes, estimate
from pipeline.train.data_parallel import ProcessRank
from pipeline.words import size_words

NOTE_NAME = "memory.json"
_ALONE = ProcessRank()
#: Tokens of a micro-batch by default. On a CPU each micro-batch costs as much as 80 more tokens (SmolLM2 in bf16), and
#: each token memory: see README.md.
_TOKENS = {"cpu": 1024, "cuda": 2048}
#: What a torch that is built for CUDA takes more on a CPU: 1,171 MB of libraries were resident.
_CUDA_BUILD_BYTES = 520 << 20
_BASES: dict[str, list[Literal["nf4", "none"]]] = {"auto": ["none", "nf4"], "none": ["none"], "nf4": ["nf4"]}
_ACTIVATIONS: tuple[Literal["kept", "half recomputed", "recomputed"], ...] = ("kept", "half recomputed", "recomputed")


@dataclass(frozen=True)
class Sizes:
    """The sizes of model, records and device from which a training's memory under any plan is estimated."""

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
        """Return the largest number of tokens of a micro-batch under `plan`; at least the longest record's."""
        return max(self.longest, min(plan.batch_tokens, self.most))

    def estimate(self, plan: MemoryPlan) -> dict[str, int]:
        """Return a process's estimated memory under `plan`, in bytes by purpose (see `memory_estimate.estimate`)."""
        plan = plan.model_copy(update={"batch_tokens": self.tokens(plan)})
        narrow = arithmetic_dtype(self.device) is None
        needs = estimate(self.base, plan, self.train, self.device, arithmetic_in_16_bits=narrow)
        needs["libraries"] += _CUDA_BUILD_BYTES if self.device == "cpu" and torch.version.cuda else 0
        return needs

    def fits(self, plan: MemoryPlan) -> bool:
        """Return whether the estimate for `plan` is at most the share `MARGIN` of the free memory."""
        return sum(self.estimate(plan).values()) <= MARGIN * self.free

    def smaller(self, plan: MemoryPlan) -> MemoryPlan | None:
        """
        Return the next smaller plan, or `None` if there is none.

        On a GPU activations are recomputed, of every second layer, then of all, before the tokens per micro-batch are
        halved, down to the longest record; on a CPU, where a small micro-batch costs less, after that. Last of all,
        where `train.quantization` is "auto", comes an NF4 base with the settings' tokens per micro-batch; the training
        then begins again.
        """
        tokens = self.tokens(plan)
        changes: list[dict[str, Any]] = []
        if tokens > self.longest:
            changes.append({"batch_tokens": max(self.longest, tokens // 2)})
        if plan.activations != _ACTIVATIONS[-1]:
            changes.append({"activations": _ACTIVATIONS[_ACTIVATIONS.index(plan.activations) + 1]})
        if self.device == "cuda":
            changes.reverse()
        if plan.quantization not in (bases := _BASES[self.train.quantization])[-1:]:
            changes.append({"quantization": bases[-1], "batch_tokens": batch_tokens(self.train, self.device)})
        return plan.model_copy(update=changes[0]) if changes else None

    def words(self, plan: MemoryPlan) -> str:
        """Describe `plan` and its estimated memory in words."""
        base = "NF4 base" if plan.quantization == "nf4" else "base as saved"
        needs = size_words(sum(self.estimate(plan).values()))
        return f"estimated {needs}: {base}, micro-batches of {self.tokens(plan)} tokens, activations {plan.activations}"


def plan_memory(
    attempt: Attempt, base: Path, device: Device, lengths: Sequence[int], process: ProcessRank = _ALONE
) -> tuple[MemoryPlan, Sizes]:
    """
    Return the memory plan for training on records of `lengths` tokens in `process.count` processes, and the sizes.

    If this run has saved a plan for the same settings and device, that plan is returned, fit or not. Otherwise it is
    the first that is estimated to fit, or else the smallest: first over the base as saved and over an NF4 base, as
    `train.quantization` allows, on a GPU each with activations kept, half and all recomputed; then as
    `Sizes.smaller` says. The plan is saved in the run's checkpoint folder for later attempts, and written to stderr.
    """
    # A search trains several times in this process; patched models refer to themselves, so that the last base stays.
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    config, longest = attempt.config.train, max(lengths)
    name = str(torch.cuda.get_device_name()) if device == "cuda" else "cpu"
    most = longest * -(-config.batch_size // process.count)
    free = free_memory(device, process.per_node, process.gpu)
    sizes = Sizes(base_sizes(base), config, device, free, longest, most)
    note = durable.read_object(attempt.path(attempt.spec.checkpoints) / NOTE_NAME)
    if note.get("asked") == _asked(config) and note["plan"]["device"] == name:
        plan = MemoryPlan.model_validate(note["plan"])
    else:
        tokens = batch_tokens(config, device)
        # In the order of the expected time of a step.
        candidates = [
            MemoryPlan(device=name, quantization=held, batch_tokens=tokens, activations=activations)
            for held in _BASES[config.quantization]
            for activations in (_ACTIVATIONS if device == "cuda" else _ACTIVATIONS[:1])
        ]
        plan = next(filter(sizes.fits, candidates), candidates[-1])
        while not sizes.fits(plan) and (less := sizes.smaller(plan)) is not None:
            plan = less
    _note(attempt, plan)
    sys.stderr.write(f"memory: {sizes.words(plan)}; {size_words(free)} free\n")
    return plan, sizes


def batch_tokens(config: TrainConfig, device: Device) -> int:
    """Return the most tokens of a micro-batch by the settings `config`, before memory limits it."""
    return _TOKENS[device] if config.batch_tokens == "auto" else config.batch_tokens


def go_on_with_less(attempt: Attempt, plan: MemoryPlan, sizes: Sizes, error: OutOfMemory) -> NoReturn:
    """
    Save a plan that needs less memory for the next attempt, print it to stderr, and raise `StartAgain`.

    Raises `Interrupted` if the attempt is stopped, and `StepFailed`, with a hint at what would fit, if there is no
    smaller plan.
    """
    less = sizes.smaller(plan)
    if less is None:
        hint = "lower train.max_length, free memory there, or use a smaller base model or a device with more memory"
        quantised = plan.model_copy(update={"quantization": "nf4"})
        if plan.quantization == "none" and not sizes.train.trains_full_weights and sizes.fits(quantised):
            hint = 'set train.quantization = "nf4", which is estimated to fit, or free memory there'
        raise StepFailed(f"{error.message}: {sizes.words(plan)}; {size_words(sizes.free)} were free", hint) from error
    _note(attempt, less)
    message = f"{error.message}; the next attempt takes less: {sizes.words(less)}"
    sys.stderr.write(f"{message}\n")
    attempt.check_stop()
    raise StartAgain(message) from error


def _note(attempt: Attempt, plan: MemoryPlan) -> None:
    """Save `plan` in the checkpoint folder, for the run's later attempts."""
    folder = attempt.path(attempt.spec.checkpoints)
    folder.mkdir(parents=True, exist_ok=True)
    note = {"asked": _asked(attempt.config.train), "plan": plan.model_dump(mode="json")}
    durable.write_json(folder / NOTE_NAME, note)


def _asked(config: TrainConfig) -> dict[str, Any]:
    of_memory = {"method", "quantization", "batch_tokens", "batch_size", "max_length", "rank", "share"}
    return config.model_dump(mode="json", include=of_memory)
