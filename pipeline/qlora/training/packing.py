"""
The records of one optimizer step, and the forward passes that they are divided into.

How they are divided is a matter of memory and speed alone: each pass divides its loss by the answer tokens of the whole
optimizer step, so that the gradients add up to the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_NO_LABEL = -100


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    Lay records end to end: `input_ids` and `labels` are (1, tokens), `lengths` holds each record's count of tokens.

    A record's first token has no label: what stands before it is another record's.
    """
    import torch

    ids = [token for row in rows for token in row["input_ids"]]
    labels = [label for row in rows for label in (_NO_LABEL, *row["labels"][1:])]
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "lengths": [len(row["input_ids"]) for row in rows],
    }


def passes(step: Mapping[str, Any], batch_tokens: int) -> list[dict[str, Any]]:
    """
    Divide what `collate` made into the inputs of forward passes, a record a row, padded to the pass's longest.

    A pass has at most `batch_tokens` tokens, with those of padding, or is a single record that is longer.
    """
    from torch.nn.utils.rnn import pad_sequence

    ids, labels = (step[name][0].split(step["lengths"]) for name in ("input_ids", "labels"))
    made = []
    for first, end in divide(step["lengths"], batch_tokens):
        rows = ids[first:end]
        made.append(
            {
                "input_ids": pad_sequence(rows, batch_first=True),
                "attention_mask": pad_sequence([row.new_ones(len(row)) for row in rows], batch_first=True),
                "labels": pad_sequence(labels[first:end], batch_first=True, padding_value=_NO_LABEL),
            }
        )
    return made


def divide(lengths: Sequence[int], batch_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield the first record of each pass and the one after its last, in order: as many as fit, at least one."""
    first = 0
    for end in range(1, len(lengths) + 1):
        fits = end < len(lengths) and max(lengths[first : end + 1]) * (end + 1 - first) <= batch_tokens
        if not fits:
            yield first, end
            first = end
