"""How many prompts a device answers at once."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import StepFailed
from pipeline.models.generation import Tokens, accepted, close_model, device_of, memory_errors, open_model, pad_left
from pipeline.models.loading import chosen_device

#: Answers are made room for in multiples of so many tokens.
ROUND = 16
#: On a CPU more at once is no faster; on a GPU this is where the search begins.
FIRST = 16
_MOST = 512


def batch_size(folder: Path, tokenizer: Any, prompts: Sequence[Tokens], answer_tokens: int) -> int:
    """
    Return how many of `prompts` the model in `folder` is to answer at once, with `answer_tokens` each.

    On a CPU it is 16. On a GPU it is found with the longest prompts. Raises `StepFailed` if memory holds not even one.
    """
    device = chosen_device()
    if device == "cpu":
        return FIRST
    asked = open_model(folder, tokenizer, device)
    longest = sorted(prompts, key=len, reverse=True)
    try:
        return largest(lambda size: _fits(asked.model, longest[:size], answer_tokens), min(_MOST, len(prompts)))
    finally:
        close_model(asked)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """
    Return the batch size from which the next doubling does not fit: doubled from 16 up to `most`, or else halved.

    The last doubling may pass `most`, so that all that there is goes at once. Raises `StepFailed` if not even 1 fits.
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
    message = "the device's memory does not hold the model and one prompt with its answer"
    raise StepFailed(message, "free the device, or use a smaller base model")


def _fits(model: Any, prompts: Sequence[Tokens], answer_tokens: int) -> bool:
    """Say whether memory suffices to read prompts and answers of full length at once and keep what was read."""
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
