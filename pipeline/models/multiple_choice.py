"""Compute the likelihood of each choice of a multiple-choice question, prefilling the question once."""

import inspect
from collections.abc import Sequence
from typing import Any

from pipeline.models.generation import AskedModel, Tokens, accepted, device_of, likelihoods, memory_errors, pad_left

#: Most bytes of the float32 logits of one batch's choices.
_LOGITS_BYTES = 1 << 28

Question = tuple[Tokens, Sequence[Tokens]]


def choice_batches(questions: Sequence[Question], size: int, vocabulary: int) -> list[list[int]]:
    """Return the indices of tokenised `questions` in batches of at most `size`, the longest first."""
    width = max((len(tokens) for _, choices in questions for tokens in choices), default=1)
    most = max((len(choices) for _, choices in questions), default=1)
    rows = max(1, min(size, _LOGITS_BYTES // (4 * vocabulary * width * most)))
    order = sorted(range(len(questions)), key=lambda index: (-len(questions[index][0]), tuple(questions[index][0])))
    return [order[start : start + rows] for start in range(0, len(order), rows)]


def choice_likelihoods(asked: AskedModel, questions: Sequence[Question]) -> list[list[float]]:
    """
    Return the mean negative log-likelihood of each choice of each question, in nats per token.

    A question is the tokens of its prompt and of each choice. The mean normalises for length (Brown et al. 2020,
    section 2.4). For a model without a key-value cache, as a recurrent one, the question is prefilled for each choice.
    Raises `StepFailed` if memory does not suffice.
    """
    import torch

    owners = [index for index, (_, choices) in enumerate(questions) for _ in choices]
    rows = [tokens for _, choices in questions for tokens in choices]
    with memory_errors(), torch.inference_mode():
        sums = _losses(asked.model, [prompt for prompt, _ in questions], owners, rows)
    if sums is None:
        sums = [
            whole.nll
            for prompt, choices in questions
            for whole in likelihoods(asked, [(prompt, tokens) for tokens in choices])
        ]
    means: list[list[float]] = [[] for _ in questions]
    for owner, row, loss in zip(owners, rows, sums, strict=True):
        means[owner].append(loss / len(row))
    return means


def _losses(model: Any, prompts: Sequence[Tokens], owners: list[int], rows: Sequence[Tokens]) -> list[float] | None:
    """Return the summed loss of each row of tokens after its owner's prompt; `None` without a key-value cache."""
    import torch
    from torch.nn import functional

    device = device_of(model)
    inputs, mask = pad_left(prompts, device)
    extra = accepted(model, position_ids=(mask.cumsum(dim=-1) - 1).clamp(min=0), logits_to_keep=1)
    read = model(input_ids=inputs, attention_mask=mask, use_cache=True, **extra)
    index = torch.tensor(owners, device=device)
    width = max(map(len, rows))
    targets = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows], device=device)
    counted = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    wanted = counted.bool()
    logits = read.logits[index, -1:]
    if width > 1:
        # The cache's name changed within transformers 5.
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        known: Any = getattr(read, name, None)
        if not hasattr(known, "reorder_cache"):
            return None
        known.reorder_cache(index)
        positions = mask.sum(dim=-1)[index, None] + torch.arange(width - 1, device=device)
        further = model(
            input_ids=targets[:, :-1],
            attention_mask=torch.cat([mask[index], counted[:, :-1]], dim=1),
            use_cache=True,
            **{name: known},
            **accepted(model, position_ids=positions),
        )
        logits = torch.cat([logits, further.logits], dim=1)
    losses = functional.cross_entropy(logits[wanted].float(), targets[wanted], reduction="none")
    return [float(part.sum()) for part in torch.split(losses, [len(row) for row in rows])]
