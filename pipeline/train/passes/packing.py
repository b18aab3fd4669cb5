"""
Divide the records of an optimizer step into micro-batches, packed or padded.

The division affects memory and speed only: each micro-batch divides its loss by the answer tokens of the whole
optimizer step, so that the gradients add up to the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from pipeline.train.passes.answer_loss import NO_LABEL


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    Concatenate records: `input_ids` and `labels` are (1, tokens), `lengths` holds each record's number of tokens.

    A record's first token has no label: the token before it is another record's.
    """
    import torch

    ids = [token for row in rows for token in row["input_ids"]]
    labels = [label for row in rows for label in (NO_LABEL, *row["labels"][1:])]
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "lengths": [len(row["input_ids"]) for row in rows],
    }


def micro_batches(
    step: Mapping[str, Any], batch_tokens: int, *, packed: bool, share: slice = slice(None)
) -> list[dict[str, Any]]:
    """
    Divide the output of `collate` into the inputs of micro-batches, each packed into one row or padded.

    Only the records of `share` are used. A micro-batch has at most `batch_tokens` tokens, padding included, or is a
    single longer record.
    """
    lengths = step["lengths"][share]
    ids, labels = (step[name][0].split(step["lengths"])[share] for name in ("input_ids", "labels"))
    runs = list(divide(lengths, batch_tokens, packed=packed))
    if packed:
        return [pack(ids[first:end], labels[first:end]) for first, end in runs]
    return [_pad(ids[first:end], labels[first:end]) for first, end in runs]


def divide(lengths: Sequence[int], batch_tokens: int, *, packed: bool) -> Iterator[tuple[int, int]]:
    """Yield the range of records, first and end, of each micro-batch: as many as fit, at least one."""
    first = 0
    for end in range(1, len(lengths) + 1):
        wider = lengths[first : end + 1]
        if end == len(lengths) or (sum(wider) if packed else max(wider) * len(wider)) > batch_tokens:
            yield first, end
            first = end


def pack(ids: Sequence[Any], labels: Sequence[Any] | None = None) -> dict[str, Any]:
    """Return the inputs of a forward pass of concatenated records; positions restart at each record."""
    import torch

    lengths = [len(row) for row in ids]
    device = ids[0].device
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    made = {
        "input_ids": torch.cat(list(ids))[None],
        "position_ids": torch.cat([torch.arange(length, device=device) for length in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    return made if labels is None else {**made, "labels": torch.cat(list(labels))[None]}


def _pad(ids: Sequence[Any], labels: Sequence[Any]) -> dict[str, Any]:
    from torch.nn.utils.rnn import pad_sequence

    return {
        "input_ids": pad_sequence(list(ids), batch_first=True),
        "attention_mask": pad_sequence([row.new_ones(len(row)) for row in ids], batch_first=True),
        "labels": pad_sequence(list(labels), batch_first=True, padding_value=NO_LABEL),
    }
