"""A training before anything is loaded: its rows and their order, settings, memory plan and folders."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.artifacts import MemoryPlan
from pipeline.config import TrainConfig
from pipeline.models.loading import Device
from pipeline.train.data_parallel import ProcessRank

#: Learning rates of small and of large bases, by method.
_ADAPTERS, _ALL_WEIGHTS = (5e-4, 3e-4), (1e-4, 3e-5)
_RATES = {"lora": _ADAPTERS, "dora": _ADAPTERS, "galore": (2e-4, 6e-5), "spectrum": _ALL_WEIGHTS, "full": _ALL_WEIGHTS}
#: Most weights of a small base, for adapters and for methods that train the base's own weights.
_SMALL, _SMALL_OF_ALL = 6_000_000_000, 2_000_000_000
#: At the default rank, `rslora` scales updates by four times LoRA's factor.
_RSLORA_SHARE = 0.25
_STEPS = {"fast": 100, "balanced": 200, "quality": 400}
_MOST_EPOCHS = 4.0


@dataclass(frozen=True)
class TokenRow:
    """A tokenised record: its prompt and answer, and a mask that is 1 at the answer's tokens."""

    input_ids: list[int]
    completion_mask: list[int]
    line: int = 0
    """Line number in train.jsonl, from 1."""


class LengthGroups:
    """
    A sampler of rows, in random order of batches of similar length; an incomplete batch comes last.

    Of the others, that with the longest row comes first, so that running out of memory shows early. The order is a
    function of seed and epoch alone: Transformers' own sampler draws from the global generator, so a training resumed
    in its second epoch would read its rows in another order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        """Take the rows' `lengths` in tokens; the order's rows are read `batch_size` at a time."""
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; the trainer calls it."""
        self.epoch = epoch

    def of_step(self, step: int) -> list[int]:
        """Return the indices of the rows that optimizer step `step`, from 1 over all epochs, reads; set that epoch."""
        epoch, index = divmod(step - 1, math.ceil(len(self) / self.batch_size))
        self.set_epoch(epoch)
        return list(self)[index * self.batch_size : (index + 1) * self.batch_size]

    def __iter__(self) -> Iterator[int]:
        """Yield each row's index once, in the order of the current epoch."""
        dice = random.Random(f"{self.seed}/{self.epoch}")  # noqa: S311 - an order, not a secret
        order = list(range(len(self.lengths)))
        dice.shuffle(order)
        span = self.batch_size * 50
        batches: list[list[int]] = []
        for start in range(0, len(order), span):
            alike = sorted(order[start : start + span], key=lambda row: -self.lengths[row])
            batches += [alike[at : at + self.batch_size] for at in range(0, len(alike), self.batch_size)]
        tail = batches.pop() if len(batches[-1]) < self.batch_size else []
        batches.sort(key=lambda batch: -self.lengths[batch[0]])
        longest = batches[:1]
        rest = batches[1:]
        dice.shuffle(rest)
        for batch in [*longest, *rest, tail]:
            yield from batch


@dataclass(frozen=True)
class Job:
    """All that a training depends on but the tokenizer."""

    base: Path
    """Folder of the model that is trained: the base, or the champion that the training starts from."""
    device: Device
    rows: Sequence[TokenRow]
    dev: Sequence[TokenRow]
    config: TrainConfig
    """The settings, with numbers for "auto"; those of memory are in `plan`."""
    plan: MemoryPlan
    adapter: Path
    scratch: Path
    fingerprint: str = ""
    estimated_memory: dict[str, int] = field(default_factory=dict)
    """Estimated memory, in bytes by purpose."""
    process: ProcessRank = field(default_factory=ProcessRank)
    """This process's rank among those that share the training."""

    @property
    def order(self) -> LengthGroups:
        """A new sampler of `rows`, at epoch 0."""
        return LengthGroups([len(row.input_ids) for row in self.rows], self.config.batch_size, self.config.seed)


def with_numbers(config: TrainConfig, rows: int, weights: int) -> TrainConfig:
    """
    Return `config` with numbers for an "auto" learning rate and "auto" epochs, by the counts of `rows` and `weights`.

    The values of a small base are measured by bench/defaults.py, those of others are from papers: see README.md. With
    rsLoRA the rate is a quarter. The epochs give the optimizer steps of `config.preset`, but they are at least one and
    at most four.
    """
    chosen: dict[str, float] = {}
    if config.learning_rate == "auto":
        is_large = weights > (_SMALL_OF_ALL if config.trains_full_weights else _SMALL)
        chosen["learning_rate"] = _RATES[config.method][is_large] * (_RSLORA_SHARE if config.rslora else 1)
    if config.epochs == "auto":
        wanted = _STEPS[config.preset] / math.ceil(rows / config.batch_size)
        chosen["epochs"] = round(min(_MOST_EPOCHS, max(1.0, wanted)), 2)
    return config.model_copy(update=chosen)
