"""
Completion-only loss: the output head is applied only to positions whose next token has a label.

TRL's trainer measures entropy and accuracy at each micro-batch, and on a CPU applies the output head to every position.
Here the hidden states of the positions whose next token has a label are selected first, and go through the head in
chunks of bounded size. Loss and gradients are TRL's (tests/pipeline/train/test_answer_loss.py).
"""

import functools
from collections.abc import Sequence
from typing import Any

from pipeline.models.memory_estimate import LOGITS_BYTES

_PROBED_TOKENS = 8
NO_LABEL = -100


def has_plain_head(model: Any, tokens: Sequence[int]) -> bool:
    """
    Return whether `model`'s logits are its output head applied to the hidden states, unscaled and uncapped.

    It is tested on the first few of `tokens`, as each architecture has its own setting for it. `False` without a head.
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
    Patch `model` so that `model(..., labels=labels, answer_loss=True)` returns the answers' summed loss in nats.

    It is computed within the model's own forward method, so that wrappers of it, such as mixed precision, still apply.
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


def summed_loss(head: Any, hidden: Any, labels: Any, logits_bytes: int = LOGITS_BYTES) -> Any:
    """
    Return the summed cross-entropy, in nats, of all labels but -100, each predicted at the position before it.

    `hidden` is (rows, tokens, width), `labels` (rows, tokens), the result a scalar. Without a label it is 0, with a
    gradient of 0. The head is applied in chunks of at most `logits_bytes` of float32 logits.
    """
    rows, positions = (labels[:, 1:] != NO_LABEL).nonzero(as_tuple=True)
    size = max(1, logits_bytes // (4 * head.out_features))
    chunks = zip(hidden[rows, positions].split(size), labels[rows, positions + 1].split(size), strict=True)
    is_trained = any(weight.requires_grad for weight in head.parameters())
    chunk_loss = _loss_by_a_trained_head if is_trained else _chunk_loss()
    return sum(chunk_loss(chunk, targets, head) for chunk, targets in chunks)


def answer_tokens(labels: Any) -> Any:
    """Return how many labels in `labels`, (rows, tokens), are not -100, without each row's first; a scalar tensor."""
    return (labels[:, 1:] != NO_LABEL).sum()


def mean_loss(model: Any, inputs: dict[str, Any], answers: Any = None) -> Any:
    """
    Return the summed loss of a micro-batch divided by `answers`, the number of answer tokens; in nats per token.

    `model` must be patched by `add_answer_loss`. `answers` defaults to the micro-batch's own number; where an optimizer
    step has several micro-batches, pass that of the whole step. Gradients must then be summed over processes: if they
    are averaged, multiply the loss by the number of processes.
    """
    import torch

    total = model(**inputs, use_cache=False, answer_loss=True)
    return total / torch.as_tensor(answer_tokens(inputs["labels"]) if answers is None else answers).clamp(min=1)


def _loss_by_a_trained_head(hidden: Any, targets: Any, head: Any) -> Any:
    """
    Return the summed loss of one chunk; its logits are recomputed in the backward pass.

    The head's gradient is as large as the head: computed in the forward pass, a copy would be kept for each chunk.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    def loss(hidden: Any) -> Any:
        return torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")

    return checkpoint(loss, hidden, use_reentrant=False)


@functools.cache
def _chunk_loss() -> Any:
    """
    Return the function for a chunk's summed loss, which computes the gradient in the forward pass.

    Neither logits nor probabilities are kept for the backward pass, or recomputed in it.
    """
    import torch

    class ChunkLoss(torch.autograd.Function):
        """Cross-entropy of an output head; its gradient at the logits is the probabilities minus the targets."""

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
