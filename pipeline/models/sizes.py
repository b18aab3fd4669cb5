"""Read and check the sizes in a model's config.json before memory is allocated by them."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.models.text_files import try_read_object

_FAR = 1 << 24
_LAYERS = 1 << 12
_WINDOWS = ("max_position_embeddings", "n_positions", "n_ctx")
#: Largest allowed sizes by their names in transformers, beyond those of any model.
_MOST = {
    "vocab_size": _FAR,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner"), _FAR),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim"), 1 << 16),
    **dict.fromkeys(_WINDOWS, 1 << 31),
}


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language model's part of a config.json: entries of `text_config` override the others."""
    text = config.get("text_config")
    return {**config, **(text if isinstance(text, dict) else {})}


def read_window(folder: Path) -> int:
    """Return the context window of the model in `folder`, in tokens; `sys.maxsize` if config.json has none."""
    part = text_part(try_read_object(folder / "config.json") or {})
    return next((part[name] for name in _WINDOWS if isinstance(part.get(name), int)), sys.maxsize)


def size_problem(config: Mapping[str, Any]) -> str:
    """Return an invalid size in a config.json, including `text_config`; empty if all are valid."""
    text = config.get("text_config")
    parts = {"": config, "text_config.": text if isinstance(text, dict) else {}}
    return next((problem for prefix, part in parts.items() for problem in _problems(prefix, part)), "")


def too_few_weights(config: Mapping[str, Any], numbers: int) -> str:
    """
    Return why `numbers` weights are too few for a config.json; empty if they are not.

    Missing weights would be initialised at random, in any amount. A layer has at least the square of its width.
    """
    part = text_part(config)
    layers, width = part.get("num_hidden_layers"), part.get("hidden_size")
    if not isinstance(layers, int) or not isinstance(width, int) or layers * width * width <= numbers:
        return ""
    return f"num_hidden_layers is {layers:,} and hidden_size {width:,}, and there are only {numbers:,} weights"


def _problems(prefix: str, config: Mapping[str, Any]) -> Iterator[str]:
    for name, most in _MOST.items():
        value = config.get(name)
        # Some architectures have a list with a size per layer; null is the default.
        for size in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
                yield f"{prefix}{name} is {_shown(size)}, and must be an integer from 1 to {most:,}"
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        yield f"{prefix}num_attention_heads is {heads}, and must be a multiple of num_key_value_heads, {shared}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"  # noqa: PLR2004 - enough to find it by
