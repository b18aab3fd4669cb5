"""
Causal attention within each record of a packed row.

On CUDA it is torch's variable-length attention, elsewhere scaled dot-product attention per record. No mask is built: a
mask of all tokens by all tokens costs more than packing saves.
"""

import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pipeline.train.passes.packing import pack

_NAME = "packed_records"
_PROBE = (5, 7)
_WIDEST = 256
#: Relative distance of a token's hidden state that rounding does not reach: SmolLM2's is 0 on a CPU, a leak's above 1.
_FAR = 0.1
#: Settings for the window of architectures with local attention.
_WINDOWS = ("sliding_window", "attention_chunk_size")


def enable_packing(model: Any, rows: Sequence[Sequence[int]]) -> bool:
    """
    Switch `model` to packed attention if it computes the same with it; return whether it does, with a line on stderr.

    This is tested by comparing hidden states of two records, packed and apart, not by a list of architectures. `rows`
    are the tokens of the training's records.
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
    """Return why the attention's window is too short for the longest record; empty if it is not."""
    config = model.config.get_text_config()
    windows = [window for name in _WINDOWS if isinstance(window := getattr(config, name, None), int)]
    if min(windows, default=longest) >= longest:
        return ""
    return f"this model attends to {min(windows)} tokens, and the longest record has {longest}"


def _differs(model: Any, tokens: Sequence[int]) -> str:
    """Set packed attention; return why the model cannot use it, empty if the hidden states stay the same."""
    import torch
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, packed_attention)
    ids = torch.tensor((list(tokens) * sum(_PROBE))[: sum(_PROBE)], device=model.device)
    first, second = ids[: _PROBE[0]], ids[_PROBE[0] :]
    with torch.no_grad():
        apart = [model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state for ids in (second, first)]
        try:
            model.set_attn_implementation(_NAME)
            if model.config._attn_implementation != _NAME:  # noqa: SLF001
                return "it has its own attention, which cannot be replaced"
            packed = model.base_model(**pack([second, first]), use_cache=False).last_hidden_state
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever an architecture says to what it does not know
            return f"its attention does not accept packed records ({type(error).__name__})"
    expected = torch.cat(apart, dim=1).float()
    distance = float(((packed.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    return "" if distance < _FAR else f"this model would attend across packed records ({distance:.2f})"


def packed_attention(module: Any, query: Any, key: Any, value: Any, *_mask: Any, **options: Any) -> tuple[Any, None]:
    """
    Compute attention within records: queries, keys, values (1, heads, tokens, width) -> (1, tokens, heads, width).

    The option `cu_seq_lens_q` holds the offsets at which records begin, and the end. Raises `ValueError` without it.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    ends = options.pop("cu_seq_lens_q", None)
    if ends is None:
        raise ValueError("packed attention needs cu_seq_lens_q, the offsets of the records")
    states = (query, key, value)
    if _has_kernel(*states) and not options.get("dropout"):
        from torch.nn.attention.varlen import varlen_attn

        longest = options["max_length_q"]
        shared = query.shape[1] != key.shape[1]
        made: Any = varlen_attn(
            *(one[0].transpose(0, 1) for one in states),
            ends,
            ends,
            longest,
            longest,
            scale=options.get("scaling"),
            window_size=(-1, 0),
            enable_gqa=shared,
        )  # type: ignore[misc]
        return made[None], None
    parts = []
    # In float32, as torch's gradient of 16-bit attention is slow on a CPU: 0.9 against 0.3 ms for 50 tokens.
    with torch.autocast(query.device.type, enabled=False):
        for first, end in pairwise(ends.tolist()):
            record = (one[:, :, first:end].float() for one in states)
            parts.append(sdpa_attention_forward(module, *record, None, **options)[0])
    return torch.cat(parts, dim=1).to(query.dtype), None


def _has_kernel(query: Any, key: Any, value: Any) -> bool:
    """Return whether torch's variable-length attention supports these: 16 bits on CUDA, heads of 8 to 256 numbers."""
    import torch

    same = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    return bool(
        query.is_cuda
        and same
        and query.shape[-1] in range(8, _WIDEST + 1, 8)
        and query.dtype in {torch.bfloat16, torch.float16}
    )
