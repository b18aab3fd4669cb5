"""Find how many prompts fit into one batch on the device."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import StepFailed
from pipeline.models.generation import Tokens, accepted, close_model, device_of, memory_errors, open_model, pad_left
from pipeline.models.loading import chosen_device

#: Answer lengths are rounded up to a multiple of so many tokens.
ROUND = 16
#: On a CPU larger batches are not faster; on a GPU the search begins here.
FIRST = 16
_MOST = 512


def batch_size(folder: Path, tokenizer: Any, prompts: Sequence[Tokens], answer_tokens: int) -> int:
    """
    Return the batch size for the model in `folder` to answer `prompts` with up to `answer_tokens` tokens each.

    On a CPU it is 16. On a GPU it is found with the longest prompts. Raises `StepFailed` if not even one fits.
    """
    device = chosen_device()
    if device == "cpu":
        return FIRST
    loaded = open_model(folder, tokenizer, device)
    longest = sorted(prompts, key=len, reverse=True)
    try:
        return largest(lambda size: _fits(loaded.model, longest[:size], answer_tokens), min(_MOST, len(prompts)))
    finally:
        close_model(loaded)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """
    Return the largest batch size that fits: 16, doubled while that fits and `most` is not reached, or halved.

    The last doubling may exceed `most`, so that all prompts fit into one batch. Raises `StepFailed` if 1 does not fit.
    """
    size = FIRST
    if fits(size):
        while size < most and fits(2 * size):
            size *= 2
        return size
    while size > 1:
        size //= 2
        if fits(size):
            return size
    message = "the model and one prompt with its answer do not fit into the device's memory"
    raise StepFailed(message, "free the device, or use a smaller base model")


def _fits(model: Any, prompts: Sequence[Tokens], answer_tokens: int) -> bool:
    """Return whether a forward pass over prompts with full-length answers fits into memory, with its cache."""
    import torch

    full = [[*prompt, *[prompt[-1]] * answer_tokens] for prompt in prompts]
    try:
        with memory_errors(), torch.inference_mode():
            inputs, mask = pad_left(full, device_of(model))
            model(input_ids=inputs, attention_mask=mask, use_cache=True, **accepted(model, logits_to_keep=1))
    except StepFailed:
        return False
    finally:
        torch.cuda.empty_cache()
    return True
