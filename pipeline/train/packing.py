"""
How an optimizer step is divided into micro-batches, packed or padded.

The division affects memory and speed only: each micro-batch divides its loss by the answer tokens of the whole
optimizer step, so that the gradients add up to the same. Records are packed if the model's attention can be confined to
each record: by torch's variable-length attention on CUDA, elsewhere by scaled dot-product attention per record. No mask
is built: a mask of all tokens by all tokens costs more than packing saves.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.train.answer_loss import NO_LABEL

_NAME = "packed_records"
_PROBE = (5, 7)
_WIDEST = 256
#: Relative distance of a token's hidden state that the rounding of two attention kernels does not reach.
_FAR = 0.1
#: The same if only another record differs: the arithmetic is the same, so that there is hardly any rounding.
_LEAK = 1e-3
#: Options of an attention function that packed attention knows, or that do not concern it.
_OPTIONS = {"dropout", "scaling", "is_causal", "position_ids", "sliding_window", "use_cache"}
_OPTIONS |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
#: Settings for the window of architectures with local attention.
_WINDOWS = ("sliding_window", "attention_chunk_size")


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    Return records concatenated: `input_ids` and `labels`, (1, tokens), and the lists `lengths` and `answers`.

    They have an entry per record: its number of tokens, and a 1-D tensor of the positions in it whose next token has a
    label, as a search for them on a GPU would wait for the GPU. A record's first label becomes -100: the token before
    it is another record's. Each of `rows` has `input_ids` and as many `labels`.
    """
    ids = [token for row in rows for token in row["input_ids"]]
    labels = [label for row in rows for label in (NO_LABEL, *row["labels"][1:])]
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "lengths": [len(row["input_ids"]) for row in rows],
        "answers": [(torch.tensor(row["labels"][1:]) != NO_LABEL).nonzero()[:, 0] for row in rows],
    }


def micro_batches(
    step: Mapping[str, Any], batch_tokens: int, *, packed: bool, share: slice = slice(None)
) -> list[dict[str, Any]]:
    """
    Divide the output of `collate` into the inputs of micro-batches, each packed into one row (see `pack`) or padded.

    Only the records of `share` are used; the list is empty without any. A micro-batch has at most `batch_tokens`
    tokens, padding included, or is a single longer record. Its `answers`, 1-D, are indices into its flattened rows.
    """
    lengths = step["lengths"][share]
    ids, labels = (step[name][0].split(step["lengths"])[share] for name in ("input_ids", "labels"))
    runs = list(divide(lengths, batch_tokens, packed=packed))
    made = []
    for first, end in runs:
        part = (pack if packed else _pad)(ids[first:end], labels[first:end])
        widths = lengths[first:end] if packed else [part["input_ids"].shape[1]] * (end - first)
        starts = accumulate(widths, initial=0)
        answers = [places + start for places, start in zip(step["answers"][share][first:end], starts, strict=False)]
        made.append({**part, "answers": torch.cat(answers)})
    return made


def divide(lengths: Sequence[int], batch_tokens: int, *, packed: bool) -> Iterator[tuple[int, int]]:
    """
    Yield each micro-batch's records as (first, end), `end` excluded: as many as `batch_tokens` allows, at least one.

    If not `packed`, records count with the length of the micro-batch's longest, to which they are padded.
    """
    first = 0
    for end in range(1, len(lengths) + 1):
        wider = lengths[first : end + 1]
        if end == len(lengths) or (sum(wider) if packed else max(wider) * len(wider)) > batch_tokens:
            yield first, end
            first = end


def pack(ids: Sequence[Any], labels: Sequence[Any] | None = None) -> dict[str, Any]:
    """
    Return a model's inputs for records concatenated to one row, (1, tokens); positions restart at each record.

    `ids` and `labels` hold a 1-D tensor per record, at least one; without `labels` the inputs have none. The others are
    `input_ids`, `position_ids`, and for `packed_attention` the offsets `cu_seq_lens_q` and the length `max_length_q` of
    the longest record, with the same for `k`.
    """
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
    return {
        "input_ids": pad_sequence(list(ids), batch_first=True),
        "attention_mask": pad_sequence([row.new_ones(len(row)) for row in ids], batch_first=True),
        "labels": pad_sequence(list(labels), batch_first=True, padding_value=NO_LABEL),
    }


def enable_packing(model: Any, rows: Sequence[Sequence[int]]) -> bool:
    """
    Switch `model` to packed attention if a record's hidden states stay the same; return whether it is packed.

    A record is tested alone, behind another one and behind a third. `rows` are the tokens of the training's records; if
    any is longer than the model's attention window, `model` stays as it was, too. Writes the result to standard error.
    """
    before = model.config._attn_implementation  # noqa: SLF001 - as the library's own guide has it
    reason = _narrow(model, max(len(row) for row in rows)) or _differs(model, rows[0])
    if reason:
        model.set_attn_implementation(before)
    sys.stderr.write(
        f"records are padded to the longest of a micro-batch: {reason}\n" if reason else "records are packed\n"
    )
    return not reason


def _narrow(model: Any, longest: int) -> str:
    """Return a message if the attention window is shorter than the longest record, else ""."""
    config = model.config.get_text_config()
    windows = [window for name in _WINDOWS if isinstance(window := getattr(config, name, None), int)]
    if min(windows, default=longest) >= longest:
        return ""
    return f"this model attends to {min(windows)} tokens, and the longest record has {longest}"


def _differs(model: Any, tokens: Sequence[int]) -> str:
    """Set packed attention, and leave it set; return why `model` cannot use it, "" if hidden states stay the same."""
    AttentionInterface.register(_NAME, _probed_attention)
    ids = torch.tensor((list(tokens) * sum(_PROBE))[: sum(_PROBE)], device=model.device)
    first, record = ids[: _PROBE[0]], ids[_PROBE[0] :]
    other = (first + 1) % model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        alone = model.base_model(input_ids=record[None], use_cache=False).last_hidden_state
        try:
            model.set_attn_implementation(_NAME)
            if model.config._attn_implementation != _NAME:  # noqa: SLF001
                return "it has its own attention, which cannot be replaced"
            behind, behind_other = (
                model.base_model(**pack([before, record]), use_cache=False).last_hidden_state[:, _PROBE[0] :]
                for before in (first, other)
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever an architecture says to what it does not know
            return f"its attention does not accept packed records ({type(error).__name__}: {error})"
    AttentionInterface.register(_NAME, packed_attention)
    if not (distance := _distance(behind_other, behind)) < _LEAK:
        return f"this model would attend across packed records ({distance:.2g})"
    if not (distance := _distance(behind, alone)) < _FAR:
        return f"packed records have other hidden states ({distance:.2g})"
    return ""


def _distance(states: Any, expected: Any) -> float:
    apart = (states.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    return float(apart.max())


def _probed_attention(module: Any, *states: Any, **options: Any) -> tuple[Any, None]:
    """Return `packed_attention`, having tried its gradient. Raises `ValueError` for an option that it would ignore."""
    ignored = sorted(name for name, value in options.items() if value is not None and name not in _OPTIONS)
    if ignored:
        raise ValueError(f"packed attention would ignore {', '.join(ignored)}")
    with torch.enable_grad():
        leaves = [state.detach().requires_grad_() for state in states[:3]]
        made, _ = packed_attention(module, *leaves, **options)
        torch.autograd.grad(made.sum(), leaves)
    return made.detach(), None


def packed_attention(module: Any, query: Any, key: Any, value: Any, *_mask: Any, **options: Any) -> tuple[Any, None]:
    """
    Compute attention within records: queries, keys, values (1, heads, tokens, width) -> (1, tokens, heads, width).

    Returns it, in the dtype of `value`, with `None` for the attention weights. Masks are ignored: attention is causal.
    The option `cu_seq_lens_q` holds the offsets at which records begin, and the end. Raises `ValueError` without it.
    """
    ends = options.pop("cu_seq_lens_q", None)
    if ends is None:
        raise ValueError("packed attention needs cu_seq_lens_q, the offsets of the records")
    # A norm of queries and keys whose weights are trained, in float32, returns float32 under mixed precision.
    states = (query.to(value.dtype), key.to(value.dtype), value)
    if _has_kernel(*states) and not options.get("dropout"):
        longest = options["max_length_q"]
        # Before this was an option, the kernel accepted fewer heads of keys as they are.
        shared: Any = {"enable_gqa": True} if query.shape[1] != key.shape[1] and _names_shared_heads() else {}
        # From 2.15 on torch prefers cuDNN on Hopper, which builds a graph per shape; here most micro-batches have one.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            made: Any = varlen.varlen_attn(
                *(state[0].transpose(0, 1) for state in states),
                ends,
                ends,
                longest,
                longest,
                scale=options.get("scaling"),
                window_size=(-1, 0),
                **shared,
            )  # type: ignore[misc]
        return made[None], None
    parts = []
    # In float32, as torch's gradient of 16-bit attention is slow on a CPU: 0.9 against 0.3 ms for 50 tokens.
    with torch.autocast(query.device.type, enabled=False):
        for first, end in pairwise(ends.tolist()):
            record = (state[:, :, first:end].float() for state in states)
            parts.append(sdpa_attention_forward(module, *record, None, **options)[0])
    return torch.cat(parts, dim=1).to(value.dtype), None


@cache
def _names_shared_heads() -> bool:
    return "enable_gqa" in signature(varlen.varlen_attn).parameters


def _has_kernel(query: Any, key: Any, value: Any) -> bool:
    """Return whether torch has a kernel for these: CUDA, one 16-bit dtype, one head width, a multiple of 8 to 256."""
    same = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    return bool(
        query.is_cuda
        and same
        and query.shape[-1] in range(8, _WIDEST + 1, 8)
        and query.dtype in {torch.bfloat16, torch.float16}
    )
