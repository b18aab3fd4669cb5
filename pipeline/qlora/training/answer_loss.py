"""
The loss of the answers' tokens, computed where there is a label and nowhere else.

TRL's trainer measures entropy and accuracy at each pass, and on a CPU sends every position through the output head.
Here the hidden states of the positions whose next token has a label are picked out first, and go through the head in
chunks of bounded size. Loss and gradients are TRL's (tests/pipeline/qlora/training/test_answer_loss.py).
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


def add_answer_loss(model: Any, *, dft: bool = False) -> None:
    """
    Let `model(..., labels=labels, answer_loss=True)` return the summed loss of the labelled tokens, in nats.

    With `dft` its gradient is that of dynamic fine-tuning (see `_chunk_loss`). It is asked through the model's own
    forward so that what is wrapped around that stays so, as mixed precision.
    """
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, answer_loss: bool = False, **inputs: Any) -> Any:
        if not answer_loss:
            return plain(*args, **inputs)
        labels = inputs.pop("labels")
        hidden = model.base_model(*args, **inputs).last_hidden_state
        return summed_loss(model.get_output_embeddings(), hidden, labels, dft=dft)

    model.forward = forward


def summed_loss(head: Any, hidden: Any, labels: Any, logits_bytes: int = _LOGITS_BYTES, *, dft: bool = False) -> Any:
    """
    Return the summed cross-entropy of the labels that are not -100, each at the position before it, as a scalar.

    `hidden` is (rows, tokens, width), `labels` (rows, tokens). Without any label the sum is 0, and has a gradient of 0.
    """
    from torch.utils.checkpoint import checkpoint

    rows, places = (labels[:, 1:] != NO_LABEL).nonzero(as_tuple=True)
    size = max(1, logits_bytes // (4 * head.out_features))
    chunks = list(zip(hidden[rows, places].split(size), labels[rows, places + 1].split(size), strict=True))
    if len(chunks) == 1:
        return _chunk_loss(head, *chunks[0], dft)
    # The logits of a chunk are computed again when its gradient is, so that one chunk's are in memory at a time.
    return sum(checkpoint(_chunk_loss, head, *chunk, dft, use_reentrant=False) for chunk in chunks)


def mean_loss(model: Any, inputs: dict[str, Any], answer_tokens: Any = None) -> Any:
    """
    Return the loss of a batch in nats a token: its sum over `answer_tokens`, by default the batch's own.

    Under gradient accumulation `answer_tokens` are those of all batches of the optimizer step. This is for one process:
    where several average their gradients, the loss would be multiplied by their number.
    """
    import torch

    total = model(**inputs, use_cache=False, answer_loss=True)
    if answer_tokens is None:
        answer_tokens = (inputs["labels"][:, 1:] != NO_LABEL).sum()
    return total / torch.as_tensor(answer_tokens).clamp(min=1)


def _chunk_loss(head: Any, hidden: Any, targets: Any, dft: bool) -> Any:  # noqa: FBT001 - torch's checkpoint has no names
    """
    Return the summed cross-entropy of a chunk.

    With `dft` each token's gradient is weighted by the token's probability, held constant (arXiv:2508.05629). The value
    stays the cross-entropy, so that the curves of both losses are in nats and can be compared.
    """
    from torch.nn import functional

    losses = functional.cross_entropy(head(hidden).float(), targets, reduction="none" if dft else "sum")
    if not dft:
        return losses
    weighted = (losses * (-losses.detach()).exp()).sum()
    return weighted + (losses.detach().sum() - weighted.detach())
