"""
Completion-only loss: the output head is applied only to positions whose next token has a label.

TRL's trainer measures entropy and accuracy at each micro-batch, and on a CPU applies the output head to every position.
Here the hidden states of the positions whose next token has a label are selected first, and go through the head in
chunks of bounded size. Loss and gradients are TRL's (tests/pipeline/train/test_answer_loss.py).
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from pipeline.models.memory_estimate import LOGITS_BYTES

_PROBED_TOKENS = 8
_LARGER = 64
_ROUNDED = 0.01
NO_LABEL = -100


def has_plain_head(model: Any, tokens: Sequence[int]) -> bool:
    """
    Return whether `model`'s logits are its output head applied to the hidden states, unscaled and uncapped.

    It is tested on the first few of `tokens`, as each architecture has its own setting for it: with logits so large
    that a cap shows, and to a hundredth, as kernels may round differently. `False` without a head or a `base_model`.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    ids = torch.tensor([tokens[:_PROBED_TOKENS]], device=model.device)
    larger = head.register_forward_hook(lambda _, __, made: made * _LARGER)
    try:
        with torch.no_grad():
            # Some recurrent models keep these in float32.
            plain = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state.to(head.weight.dtype))
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        larger.remove()
    return bool((logits - plain).abs().max() < _ROUNDED * plain.abs().max())


def add_answer_loss(model: Any) -> None:
    """
    Patch `model.forward` so that `model(..., labels=, answers=, answer_loss=True)` returns their `summed_loss`.

    Other calls are unchanged. It is the forward method, so that its wrappers, such as mixed precision, still apply.
    """
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, answer_loss: bool = False, **inputs: Any) -> Any:
        if not answer_loss:
            return plain(*args, **inputs)
        labels, answers = inputs.pop("labels"), inputs.pop("answers")
        hidden = model.base_model(*args, **inputs).last_hidden_state
        return summed_loss(model.get_output_embeddings(), hidden, labels, answers)

    model.forward = forward


def summed_loss(head: Any, hidden: Any, labels: Any, answers: Any) -> Any:
    """
    Return the summed cross-entropy, in nats, of the labels one position after each of `answers`: a float32 scalar.

    `hidden` is (rows, tokens, width), `labels` (rows, tokens); `answers`, 1-D, index the flattened rows, none the last
    of a row. Without any the result is 0, with a gradient of 0. The head is applied in chunks of at most the
    device's `LOGITS_BYTES` of float32 logits.
    """
    size = max(1, LOGITS_BYTES[hidden.device.type] // (4 * head.out_features))
    states, targets = hidden.flatten(0, 1)[answers], labels.flatten()[answers + 1]
    chunks = zip(states.split(size), targets.split(size), strict=True)
    is_trained = any(weight.requires_grad for weight in head.parameters())
    chunk_loss = _loss_by_a_trained_head if is_trained else _ChunkLoss.apply
    return sum(chunk_loss(chunk, targets, head) for chunk, targets in chunks)


def answer_tokens(labels: Any) -> Any:
    """Return how many labels in `labels`, (rows, tokens), are not -100, without each row's first; a scalar tensor."""
    return (labels[:, 1:] != NO_LABEL).sum()


def mean_loss(model: Any, inputs: dict[str, Any], count: Any = None) -> Any:
    """
    Return the summed loss of a micro-batch divided by `count` answer tokens, at least 1: a scalar, in nats per token.

    `model` must have a plain head and be patched by `add_answer_loss`; `inputs` are those of `micro_batches`. `count`
    defaults to the micro-batch's own number; where an optimizer step has several micro-batches, pass that of the whole
    step. Gradients must then be summed over processes: if they are averaged, multiply the loss by the number of
    processes.
    """
    total = model(**inputs, use_cache=False, answer_loss=True)
    return total / torch.as_tensor(answer_tokens(inputs["labels"]) if count is None else count).clamp(min=1)


def _loss_by_a_trained_head(hidden: Any, targets: Any, head: Any) -> Any:
    """
    Return the summed loss of one chunk; its logits are recomputed in the backward pass.

    The head's gradient is as large as the head: computed in the forward pass, a copy would be kept for each chunk.
    """

    def loss(hidden: Any) -> Any:
        return torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")

    return checkpoint(loss, hidden, use_reentrant=False)


class _ChunkLoss(torch.autograd.Function):
    """
    The summed cross-entropy of one chunk by a frozen output head, with the gradient computed in the forward pass.

    Neither logits nor probabilities are kept for the backward pass, or recomputed in it: the gradient at the logits is
    the probabilities minus the targets.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, targets: Any, head: Any) -> Any:
        with torch.enable_grad():
            states = hidden.detach().requires_grad_()
            logits = head(states)
        scores = torch.log_softmax(logits.detach().float(), dim=-1)
        rows = torch.arange(len(targets), device=targets.device)
        loss = -scores[rows, targets].sum()
        if ctx.needs_input_grad[0]:
            slope = scores.exp_()
            slope[rows, targets] -= 1
            (gradient,) = torch.autograd.grad(logits, states, slope.to(logits.dtype))
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grown: Any) -> Any:  # type: ignore[override, unused-ignore]
        (gradient,) = ctx.saved_tensors
        return (gradient * grown).to(gradient.dtype), None, None
