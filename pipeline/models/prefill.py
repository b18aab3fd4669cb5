"""
Read prompts in a batch, padded at the left; a prefix that all of them share is read once.

Prompts of one task share a chat template's beginning and often the instruction, which is half of a short prompt.
"""

import inspect
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

from pipeline.errors import CannotTrain

Tokens = Sequence[int]
#: Fewest tokens of a prefix that is read by itself, as that is a further forward pass.
_FEWEST = 8


class Prefilled(NamedTuple):
    """The cache, last logits, token ids and mask of a batch of prompts after the forward pass, padded by `pad_left`."""

    cache: Any
    """The model's key-value cache."""
    logits: Any
    """Of the last position, of shape (rows, 1, vocabulary)."""
    ids: Any
    """Token ids, of shape (rows, longest)."""
    mask: Any
    """Attention mask, of shape (rows, longest)."""


def shared_prefix(prompts: Sequence[Tokens]) -> int:
    """Return the number of tokens that all prompts begin with; the last token of a prompt is never one of them."""
    return len(commonprefix([list(prompt[:-1]) for prompt in prompts]))


def prefill(model: Any, prompts: Sequence[Tokens]) -> Prefilled:
    """
    Run a forward pass on `prompts`; the logits are those of the last position.

    Their common prefix is read once, see `last_logits`. Raises `CannotTrain` if the model has no key-value cache.
    """
    import torch

    ids, mask = pad_left(prompts, model.device)
    read = _read_prefix(model, prompts, shared_prefix(prompts))
    if read is None:
        return Prefilled(*forward(model, ids, mask), ids, mask)
    cache, logits = forward(model, *read)
    # The padding is between the prefix and the rest: move it to the left.
    order = read[1].argsort(dim=1, stable=True)[:, None, :, None]
    for layer in cache.layers:
        layer.keys = torch.take_along_dim(layer.keys, order.to(layer.keys.device), dim=2)
        layer.values = torch.take_along_dim(layer.values, order.to(layer.keys.device), dim=2)
    return Prefilled(cache, logits, ids, mask)


def last_logits(model: Any, rows: Sequence[Tokens], shared: int, keep: int) -> Any:
    """
    Return the logits of the last `keep` positions of `rows`, whose first `shared` tokens are equal.

    The shape is (rows, keep, vocabulary). The shared tokens are read once if they are 8 or more, there are several
    rows, and the model's attention allows it. At least `keep` tokens of the longest row must follow them.
    """
    read = _read_prefix(model, rows, shared)
    if read is not None:
        return forward(model, *read, keep)[1]
    ids, mask = pad_left(rows, model.device)
    return _run(model, ids, mask, keep, use_cache=False).logits[:, -keep:]


def _read_prefix(model: Any, rows: Sequence[Tokens], shared: int) -> tuple[Any, Any, Any] | None:
    """
    Return the rest of `rows`, the mask of all tokens, and the cache of the first `shared` ones, read once.

    `None` if these are too few or cannot be read once (see `last_logits`).
    """
    import torch

    if shared < _FEWEST or len(rows) == 1 or not _can_share(model):
        return None
    start = torch.tensor([rows[0][:shared]], device=model.device)
    cache, _ = forward(model, start, torch.ones_like(start))
    cache.batch_repeat_interleave(len(rows))
    rest, mask = pad_left([row[shared:] for row in rows], model.device)
    return rest, torch.cat([torch.ones_like(start).expand(len(rows), -1), mask], dim=1), cache


def _can_share(model: Any) -> bool:
    """
    Return whether rows can continue a shared cache with padding between.

    Positions must be rotary, by their number alone: other kinds count the padding, and some rotary ones depend on the
    length of the input. No layer may have a window or a recurrent state.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    rotary = getattr(model.base_model, "rotary_emb", None)
    if getattr(rotary, "rope_type", None) not in ("default", "linear", "llama3", "yarn"):
        return False
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def forward(model: Any, ids: Any, mask: Any, cache: Any = None, keep: int = 1) -> tuple[Any, Any]:
    """
    Return the cache and the logits of the last `keep` positions after a forward pass on `ids`.

    `ids` has the tokens that are not in the cache, `mask` all. Raises `CannotTrain` if the model has no key-value
    cache.
    """
    name = next(iter(accepted(model, cache=None, past_key_values=None)), None)  # renamed in transformers 5
    if name is None:
        message = f"{type(model).__name__} has no key-value cache of transformers"
        raise CannotTrain(message, "use a base model with a key-value cache")
    output = _run(model, ids, mask, keep, use_cache=True, is_first_iteration=cache is None, **{name: cache})
    return getattr(output, name), output.logits[:, -keep:]


def _run(model: Any, ids: Any, mask: Any, keep: int, **arguments: Any) -> Any:
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    known = accepted(model, position_ids=positions)
    inputs = model.prepare_inputs_for_generation(ids, attention_mask=mask, **known, **arguments)
    # Some models prepare the last position alone.
    return model(**{**inputs, **accepted(model, logits_to_keep=keep)}, return_dict=True)


def pad_left(sequences: Sequence[Tokens], device: Any) -> tuple[Any, Any]:
    """
    Return token ids and attention mask on `device`, padded at the left; both of shape (rows, longest).

    The padding repeats the row's first token: masked, it is never attended to, and a repetition penalty, which ignores
    the mask, then finds only tokens of the prompt (with an end token as padding, it would penalise that).
    """
    import torch

    width = max(map(len, sequences))
    ids = [[*[row[0]] * (width - len(row)), *row] for row in sequences]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def accepted(model: Any, **arguments: Any) -> dict[str, Any]:
    """Return those of `arguments` that the model's `forward` accepts, as architectures differ."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in arguments.items() if name in known}
