"""The order in which a training reads its rows."""

import random
from collections.abc import Iterator, Sequence


class LengthGroups:
    """
    A sampler of batches of similar length in random order, the longest row first so that OOM shows early.

    The order is a function of seed and epoch alone. Transformers' own sampler draws from the global generator, so a
    training resumed in its second epoch would read its rows in another order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        """Take the rows' `lengths` in tokens; each `batch_size` consecutive rows are one batch."""
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

    def __iter__(self) -> Iterator[int]:
        """Yield each row's index once."""
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
