"""
Fitting a training into its device's memory: what it begins with, and what it goes on with when memory has run out.

A training whose memory ran out goes on in a fresh process, from its newest checkpoint, with less in a pass: what torch
and the heap have in pieces is not to be had back otherwise. Neither records nor order nor gradients depend on it.
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
"""The least that train.max_length may be."""


@dataclass(frozen=True)
class Fit:
    """How a training is to fit, and what is known of it."""

    plan: MemoryPlan
    base: BaseSizes
    train: TrainConfig
    device: Device
    free: int
    """Bytes that a process had on the device before anything was loaded."""
    longest: int
    """Tokens of the longest record."""
    most: int
    """Tokens of as many of that length as a process has of an optimizer step."""

    def tokens(self, plan: MemoryPlan) -> int:
        """Return how many tokens a pass by `plan` has at most."""
        return max(self.longest, min(plan.batch_tokens, self.most))

    def bytes_of(self, plan: MemoryPlan) -> dict[str, int]:
        """Return what a training by `plan` is estimated to take, in bytes, by what takes them."""
        plan = plan.model_copy(update={"batch_tokens": self.tokens(plan)})
        narrow = arithmetic_dtype(self.device) is None
        return estimate(self.base, plan, self.train, self.device, arithmetic_in_16_bits=narrow)

    def holds(self, plan: MemoryPlan) -> bool:
        """Say whether a training by `plan` is estimated to fit."""
        return sum(self.bytes_of(plan).values()) <= MARGIN * self.free


def find_fit(attempt: Attempt, base: Path, device: Device, lengths: Sequence[int], processes: int = 1) -> Fit:
    """
    Return how the training of records of `lengths` tokens is to fit, in each of its `processes`.

    What the run came down to before counts first, then what an earlier run on this device did, else the estimate does.
    """
    config = attempt.config.train
    longest = max(lengths)
    own = MemoryPlan(
        device=device_name(device),
        quantization="nf4" if config.quantization == "nf4" else "none",
        batch_tokens=config.batch_tokens,
        activations="recomputed" if device == "cuda" else "kept",
    )
    most = longest * -(-config.batch_size // processes)
    free = free_memory(device) // (1 if device == "cuda" else processes)
    fit = Fit(own, base_sizes(base), config, device, free, longest, most)
    known = _noted(attempt, own.device) or _of_earlier(attempt, own)
    plan = known or _estimated(fit, may_quantise=config.quantization == "auto")
    _note(attempt, plan)
    fit = replace(fit, plan=plan)
    kept = "" if known in {None, own} else "; found before, and kept until train.batch_tokens is another number"
    sys.stderr.write(f"memory: {_words(fit, plan)}; {size_words(fit.free)} are free{kept}\n")
    return fit


def go_on_with_less(attempt: Attempt, fit: Fit, error: OutOfMemory) -> NoReturn:
    """
    Note a plan that takes less and raise `StartAgain`.

    Raises `Interrupted` if the attempt is asked to stop, `StepFailed`, with what would fit, if nothing takes less.
    """
    plan = smaller(fit, fit.plan)
    if plan is None:
        message = f"{error.message}: {_words(fit, fit.plan)}, and {size_words(fit.free)} were free"
        raise StepFailed(message, _what_fits(fit)) from error
    _note(attempt, plan)
    message = f"{error.message}; it goes on in a fresh process: {_words(fit, plan)}"
    sys.stderr.write(f"{message}\n")
    attempt.check_stop()
    raise StartAgain(message) from error


def smaller(fit: Fit, plan: MemoryPlan) -> MemoryPlan | None:
    """
    Return the plan to try next; `None` after the last.

    Half the tokens a pass down to one record, then activations that are computed again, then, on a card, offloaded.
    """
    if fit.tokens(plan) > fit.longest:
        return plan.model_copy(update={"batch_tokens": max(fit.longest, fit.tokens(plan) // 2)})
    if plan.activations == "kept":
        return plan.model_copy(update={"activations": "recomputed"})
    if plan.activations == "recomputed" and fit.device == "cuda":
        return plan.model_copy(update={"activations": "offloaded"})
    return None


def device_name(device: Device) -> str:
    """Return the card's name, or `cpu`."""
    import torch

    return str(torch.cuda.get_device_name()) if device == "cuda" else "cpu"


def peak_memory(device: Device) -> int:
    """Return the most bytes that this process has had at once: on the card by torch, else resident."""
    import torch

    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return peak_resident()


def _noted(attempt: Attempt, device: str) -> MemoryPlan | None:
    """Return the plan that this run came down to on the same device, under the same settings."""
    note = durable.read_object(attempt.path(attempt.spec.checkpoints) / NOTE_NAME)
    if note.get("asked") != _asked(attempt.config.train):
        return None
    try:
        plan = MemoryPlan.model_validate(note.get("plan"))
    except ValueError:
        return None
    return plan if plan.device == device else None


def _of_earlier(attempt: Attempt, own: MemoryPlan) -> MemoryPlan | None:
    """Return the plan of the latest run like this one if it was on the same device, with no more than this one asks."""
    earlier, config = attempt.spec.memory, attempt.config.train
    if earlier is None or earlier.device != own.device or config.quantization not in {"auto", earlier.quantization}:
        return None
    return earlier.model_copy(update={"batch_tokens": min(earlier.batch_tokens, own.batch_tokens)})


def _estimated(fit: Fit, *, may_quantise: bool) -> MemoryPlan:
    """Return the first plan that is estimated to fit, the last one if none is: 4 bits come first, then less a pass."""
    plan = fit.plan
    if may_quantise and not fit.holds(plan):
        plan = _quantised(plan)
    while not fit.holds(plan):
        less = smaller(fit, plan)
        if less is None:
            break
        plan = less
    return plan


def _note(attempt: Attempt, plan: MemoryPlan) -> None:
    """Write down the plan that the run's trainings go on with, whatever becomes of this process."""
    folder = attempt.path(attempt.spec.checkpoints)
    folder.mkdir(parents=True, exist_ok=True)
    note = {"asked": _asked(attempt.config.train), "plan": plan.model_dump(mode="json")}
    durable.write_json(folder / NOTE_NAME, note)


def _asked(config: TrainConfig) -> dict[str, Any]:
    of_memory = {"method", "quantization", "batch_tokens", "batch_size", "max_length", "rank", "share"}
    return config.model_dump(mode="json", include=of_memory)


def _what_fits(fit: Fit) -> str:
    """Return what to set so that the training is estimated to fit."""
    lengths = [fit.longest // 2**times for times in range(1, fit.longest.bit_length())]
    fits = (length for length in lengths if replace(fit, longest=length, most=length).holds(fit.plan))
    may_quantise = fit.plan.quantization == "none" and not fit.train.trains_full_weights
    if may_quantise and fit.holds(_quantised(fit.plan)):
        found = 'train.quantization = "nf4"'
    elif (length := next(fits, 0)) >= _LEAST_LENGTH:
        found = f"train.max_length = {length}"
    else:
        return "free memory there, or use a smaller base model or a device with more memory"
    return f"set {found}, which is estimated to fit, or free memory there"


def _quantised(plan: MemoryPlan) -> MemoryPlan:
    return plan.model_copy(update={"quantization": "nf4"})


def _words(fit: Fit, plan: MemoryPlan) -> str:
    base = "the base in 4 bits" if plan.quantization == "nf4" else "the base as it is"
    takes = size_words(sum(fit.bytes_of(plan).values()))
    return f"about {takes} with {base}, {fit.tokens(plan)} tokens a pass, activations {plan.activations}"
