"""
Causal attention inside each of the records that are packed into one row.

On CUDA it is torch's variable-length attention, elsewhere a causal product for each record. No mask is built: a mask of
all tokens by all tokens costs more than packing saves.
"""

import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pipeline.train.passes.packing import pack

_NAME = "packed_records"
_PROBE = (5, 7)
_WIDEST = 256
#: Relative distance of a token's hidden state that is not rounding: SmolLM2's is 0 on a CPU, and a leak's above 1.
_FAR = 0.1
#: Settings of architectures whose tokens see only so many tokens before them.
_WINDOWS = ("sliding_window", "attention_chunk_size")


def enable_packing(model: Any, rows: Sequence[Sequence[int]]) -> bool:
    """
    Let `model` attend within the records of a packed row; leave it as it was if that cannot be, and say so on stderr.

    Whether it can is found by what the model makes of two records, packed and apart, not by a list of architectures.
    `rows` are the tokens of the records to come.
    """
    before = model.config._attn_implementation  # noqa: SLF001 - as the library's own guide has it
    reason = _narrow(model, max(len(row) for row in rows)) or _differs(model, rows[0])
    if reason:
        model.set_attn_implementation(before)
    sys.stderr.write(f"records are padded to the longest of a pass: {reason}\n" if reason else "records are packed\n")
    return not reason


def _narrow(model: Any, longest: int) -> str:
    """Say which window of the attention is shorter than the longest record; empty if none is."""
    config = model.config.get_text_config()
    windows = [window for name in _WINDOWS if isinstance(window := getattr(config, name, None), int)]
    if min(windows, default=longest) >= longest:
        return ""
    return f"a token of this model sees {min(windows)} tokens, and the longest record has {longest}"


def _differs(model: Any, tokens: Sequence[int]) -> str:
    """Set the packed attention and say why the model cannot be packed; empty if hidden states are as without."""
    import torch
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, packed_attention)
    ids = torch.tensor((list(tokens) * sum(_PROBE))[: sum(_PROBE)], device=model.device)
    first, second = ids[: _PROBE[0]], ids[_PROBE[0] :]
    with torch.no_grad():
        apart = [model.base_model(input_ids=one[None], use_cache=False).last_hidden_state for one in (second, first)]
        try:
            model.set_attn_implementation(_NAME)
            if model.config._attn_implementation != _NAME:  # noqa: SLF001
                return "its attention is its own"
            packed = model.base_model(**pack([second, first]), use_cache=False).last_hidden_state
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever an architecture says to what it does not know
            return f"its attention does not take packed records ({type(error).__name__})"
    expected = torch.cat(apart, dim=1).float()
    distance = float(((packed.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    return "" if distance < _FAR else f"packed, this model's records would see each other ({distance:.2f})"


def packed_attention(module: Any, query: Any, key: Any, value: Any, *_mask: Any, **options: Any) -> tuple[Any, None]:
    """
    Attend within records: queries, keys and values of (1, heads, tokens, width) give (1, tokens, heads, width).

    `cu_seq_lens_q` among the options are the places where records begin, and the end. Raises `ValueError` without it.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    ends = options.pop("cu_seq_lens_q", None)
    if ends is None:
        raise ValueError("packed attention was not told where records begin")
    states = (query, key, value)
    if _has_kernel(*states) and not options.get("dropout"):
        from torch.nn.attention.varlen import varlen_attn

        longest = options["max_length_q"]
        shared = query.shape[1] != key.shape[1]
        made: Any = varlen_attn(
            *(one[0].transpose(0, 1) for one in states), ends, ends, longest, longest, scale=options.get("scaling"),
            window_size=(-1, 0), enable_gqa=shared,
        )  # type: ignore[misc]  # fmt: skip
        return made[None], None
    parts = []
    # In float32, as torch's gradient of 16-bit attention is slow on a CPU: 0.9 against 0.3 ms for 50 tokens.
    with torch.autocast(query.device.type, enabled=False):
        for first, end in pairwise(ends.tolist()):
            record = (one[:, :, first:end].float() for one in states)
            parts.append(sdpa_attention_forward(module, *record, None, **options)[0])
    return torch.cat(parts, dim=1).to(query.dtype), None


def _has_kernel(query: Any, key: Any, value: Any) -> bool:
    """Say whether torch's variable-length attention takes these: 16 bits on CUDA, heads of 8 to 256 numbers."""
    import torch

    same = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    return bool(
        query.is_cuda
        and same
        and query.shape[-1] in range(8, _WIDEST + 1, 8)
        and query.dtype in {torch.bfloat16, torch.float16}
    )
