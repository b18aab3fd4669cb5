"""
The loss of the answers' tokens, computed where there is a label and nowhere else.

TRL's trainer measures entropy and accuracy at each pass, and on a CPU sends every position through the output head.
Here the hidden states of the positions whose next token has a label are picked out first, and go through the head in
chunks of bounded size. Loss and gradients are TRL's (tests/pipeline/train/test_answer_loss.py).
"""

import functools
from collections.abc import Sequence
from typing import Any

_LOGITS_BYTES = 1 << 26
"""Most memory that the float32 logits of one chunk may take. Their 16-bit copy and their gradient come to it."""
_PROBED_TOKENS = 8
NO_LABEL = -100


def has_plain_head(model: Any, tokens: Sequence[int]) -> bool:
    """
    Say whether the logits of `model` are its output head's product with its backbone's hidden states, and no more.

    Some architectures scale or cap their logits. They are found by what the model does with the first few of `tokens`,
    not by the names of their settings, of which each has its own.
    """
    import torch

    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    ids = torch.tensor([tokens[:_PROBED_TOKENS]], device=model.device)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return torch.equal(model(input_ids=ids, use_cache=False).logits, head(hidden))


def add_answer_loss(model: Any) -> None:
    """
    Let `model(..., labels=labels, answer_loss=True)` return the summed loss of the labelled tokens, in nats.

    It is computed in the model's own forward so that what is wrapped around that stays so, as mixed precision.
    """
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, answer_loss: bool = False, **inputs: Any) -> Any:
        if not answer_loss:
            return plain(*args, **inputs)
        labels = inputs.pop("labels")
        hidden = model.base_model(*args, **inputs).last_hidden_state
        return summed_loss(model.get_output_embeddings(), hidden, labels)

    model.forward = forward


def summed_loss(head: Any, hidden: Any, labels: Any, logits_bytes: int = _LOGITS_BYTES) -> Any:
    """
    Return the summed cross-entropy of the labels that are not -100, each at the position before it, as a scalar.

    `hidden` is (rows, tokens, width), `labels` (rows, tokens). Without any label the sum is 0, and has a gradient of 0.
    """
    rows, places = (labels[:, 1:] != NO_LABEL).nonzero(as_tuple=True)
    size = max(1, logits_bytes // (4 * head.out_features))
    chunks = zip(hidden[rows, places].split(size), labels[rows, places + 1].split(size), strict=True)
    is_trained = any(weight.requires_grad for weight in head.parameters())
    chunk_loss = _loss_by_a_trained_head if is_trained else _chunk_loss()
    return sum(chunk_loss(chunk, targets, head) for chunk, targets in chunks)


def answer_tokens(labels: Any) -> Any:
    """Return how many of the `labels`, (rows, tokens), are predicted, as a scalar tensor."""
    return (labels[:, 1:] != NO_LABEL).sum()


def mean_loss(model: Any, inputs: dict[str, Any], answers: Any = None) -> Any:
    """
    Return the loss of a forward pass in nats a token: its sum over `answers` tokens, by default the pass's own.

    Where an optimizer step has several passes, `answers` are those of them all. This is for one process: where several
    average their gradients, the loss would be multiplied by their number.
    """
    import torch

    total = model(**inputs, use_cache=False, answer_loss=True)
    return total / torch.as_tensor(answer_tokens(inputs["labels"]) if answers is None else answers).clamp(min=1)


def _loss_by_a_trained_head(hidden: Any, targets: Any, head: Any) -> Any:
    """
    Return the loss of one chunk, whose logits are computed again for their gradient instead of kept.

    The head's gradient is as large as the head: taken in the forward pass, one would be kept for each chunk.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    def loss(hidden: Any) -> Any:
        return torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")

    return checkpoint(loss, hidden, use_reentrant=False)


@functools.cache
def _chunk_loss() -> Any:
    """
    Return the loss of one chunk as a function that takes its gradient in the forward pass, while the logits are there.

    Neither logits nor probabilities are kept for the backward pass, or computed again in it.
    """
    import torch

    class ChunkLoss(torch.autograd.Function):
        """Cross-entropy of a head's product, whose gradient by the logits is the probabilities less the targets."""

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

    return ChunkLoss.apply
