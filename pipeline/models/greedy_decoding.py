"""
Greedy decoding with continuous batching: a complete answer leaves the batch, and the next prompt takes its row.

Transformers' own continuous batching is not used: it has no repetition penalty, supports only some models, and was
slower on a CPU than batches that wait for their longest answer. Batches depend only on the prompts and the batch size,
since in bf16 the composition of a batch can change an answer.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

from pipeline.metrics.degenerate import is_looping
from pipeline.models.generation import Answer, AskedModel, Decoding
from pipeline.models.loading import memory_errors
from pipeline.models.prefill import Tokens, forward, prefill

#: Prompts per row of a batch: with few, the last answers would leave rows empty.
_PER_ROW = 8
#: Prompts are prefilled once this share of the rows is free: few cost as much as many.
_REFILL = 0.25
#: Repetitions and tokens of a loop before an answer is cut.
_LOOP_TIMES, _LOOP_TOKENS = 4, 32
#: Called with the number of complete answers, and with the tokens of all answers so far; it may raise to stop.
Watch = Callable[[int, Sequence[Sequence[int]]], None]


def answer_batches(prompts: Sequence[Tokens], size: int) -> list[list[int]]:
    """Return the indices of `prompts` in batches of up to 8 * `size`, the longest first, for calls of `answers`."""
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), tuple(prompts[index])))
    together = _PER_ROW * size
    return [order[start : start + together] for start in range(0, len(order), together)]


def answers(
    asked: AskedModel,
    prompts: Sequence[Tokens],
    decoding: Decoding,
    watch: Watch = lambda _complete, _tokens: None,
    may_loop: Collection[int] = (),
) -> list[Answer]:
    """
    Return the answers to tokenised prompts, in their order; `decoding.batch_size` of them are generated at once.

    An answer ends after an end token, after `decoding.room` tokens but at least one, or in a loop of one phrase, unless
    its prompt's index is in `may_loop`. After each token of the batch `watch` gets the number of complete answers and
    the tokens of all; it may raise to stop. Raises `StepFailed` if memory does not suffice, `CannotTrain` if the model
    has no key-value cache.
    """
    import torch

    generated: list[list[int]] = [[] for _ in prompts]
    waiting = deque(range(len(prompts)))
    with memory_errors(), torch.inference_mode():
        rows = _Rows(asked.model, decoding.repetition_penalty)
        while waiting or rows.indices:
            free = decoding.batch_size - len(rows.indices)
            if waiting and free >= _REFILL * decoding.batch_size and rows.can_join():
                some = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                rows.join(some, [prompts[index] for index in some])
            for index, token in zip(rows.indices, rows.choose(), strict=True):
                generated[index].append(token)
            rows.keep(
                [
                    row
                    for row, index in enumerate(rows.indices)
                    if not _is_over(asked, generated[index], decoding.room(prompts[index]), may_loop=index in may_loop)
                ]
            )
            watch(len(prompts) - len(waiting) - len(rows.indices), generated)
            rows.read()
    return [
        Answer(asked.template.read(tokens), len(tokens), ended=bool(tokens) and tokens[-1] in asked.template.ends)
        for tokens in generated
    ]


def _is_over(asked: AskedModel, tokens: Tokens, most: int, *, may_loop: bool) -> bool:
    if tokens[-1] in asked.template.ends or len(tokens) >= most:
        return True
    return not may_loop and _repeats(tokens) and is_looping(asked.template.read(tokens))


def _repeats(tokens: Tokens) -> bool:
    """Return whether the tokens end with at least four repetitions, and 32 tokens, of one phrase."""
    for period in range(1, len(tokens) // _LOOP_TIMES + 1):
        # This runs per row and token: comparing whole phrases each time would take longer than a forward pass.
        if tokens[-1 - period] != tokens[-1]:
            continue
        length = max(_LOOP_TIMES * period, _LOOP_TOKENS)
        if length <= len(tokens) and tokens[-length:-period] == tokens[period - length :]:
            return True
    return False


class _Rows:
    """The rows of the current batch: their tokens, padded at the left, and the model's cache."""

    def __init__(self, model: Any, repetition_penalty: float) -> None:
        from transformers import RepetitionPenaltyLogitsProcessor

        self._model = model
        self._penalty = None if repetition_penalty == 1 else RepetitionPenaltyLogitsProcessor(float(repetition_penalty))
        self.indices: list[int] = []
        """The index of each row's prompt."""
        self._cache: Any = None
        self._ids: Any = None
        self._mask: Any = None
        self._logits: Any = None

    def can_join(self) -> bool:
        """Return whether rows can be added: there are none yet, or no layer of the cache has a recurrent state."""
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        known = {DynamicLayer, DynamicSlidingWindowLayer}
        return not self.indices or all(type(layer) in known for layer in self._cache.layers)

    def join(self, indices: Sequence[int], prompts: Sequence[Tokens]) -> None:
        """Prefill prompts and add them to the rows; `indices` are the prompts' numbers."""
        import torch

        cache, logits, ids, mask = prefill(self._model, prompts)
        if self.indices:
            width = max(ids.shape[1], self._ids.shape[1])
            for mine, other in zip(self._cache.layers, cache.layers, strict=True):
                _pad_cache(mine, width)
                _pad_cache(other, width)
                mine.keys = torch.cat([mine.keys, other.keys])
                mine.values = torch.cat([mine.values, other.values])
            both = _widen(self._ids, self._mask, width), _widen(ids, mask, width)
            ids, mask = (torch.cat(parts) for parts in zip(*both, strict=True))
            cache, logits = self._cache, torch.cat([self._logits, logits])
        self._cache, self._ids, self._mask, self._logits = cache, ids, mask, logits
        self.indices += indices

    def choose(self) -> list[int]:
        """Append the likeliest token, after the repetition penalty, to every row; return these tokens."""
        import torch

        logits = self._logits[:, -1].float()
        chosen = (logits if self._penalty is None else self._penalty(self._ids, logits)).argmax(dim=-1, keepdim=True)
        self._ids = torch.cat([self._ids, chosen], dim=1)
        self._mask = torch.cat([self._mask, torch.ones_like(chosen)], dim=1)
        return [int(token) for token in chosen[:, 0].tolist()]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but those at the positions `rows`, and padding that is no longer needed."""
        import torch

        if len(rows) == len(self.indices):
            return
        can_join = self.can_join()
        self.indices = [self.indices[row] for row in rows]
        if not rows:
            return
        index = torch.tensor(rows, device=self._ids.device)
        self._cache.reorder_cache(index)
        self._ids, self._mask = self._ids[index], self._mask[index]
        padding = self._ids.shape[1] - int(self._mask.sum(dim=1).max())
        if padding and can_join:
            self._ids, self._mask = self._ids[:, padding:], self._mask[:, padding:]
            for layer in self._cache.layers:
                # The last token is chosen, but not in the cache yet.
                _pad_cache(layer, self._ids.shape[1] - 1)

    def read(self) -> None:
        """Run a forward pass on the last token of every row, for the next `choose`; do nothing without rows."""
        if self.indices:
            self._cache, self._logits = forward(self._model, self._ids[:, -1:], self._mask, self._cache)


def _pad_cache(layer: Any, width: int) -> None:
    """Pad or trim a layer of the cache, in place and at the left, to `width` tokens, at most to its sliding window."""
    from torch.nn.functional import pad

    columns = width
    if layer.is_sliding:
        layer.cumulative_length, columns = width, min(width, layer.sliding_window - 1)
    missing = columns - layer.keys.shape[-2]
    layer.keys, layer.values = pad(layer.keys, (0, 0, missing, 0)), pad(layer.values, (0, 0, missing, 0))


def _widen(ids: Any, mask: Any, width: int) -> tuple[Any, Any]:
    """Return token ids and mask padded to `width` at the left, as `pad_left` pads."""
    import torch
    from torch.nn.functional import pad

    missing = width - ids.shape[1]
    return torch.cat([ids[:, :1].expand(-1, missing), ids], dim=1), pad(mask, (missing, 0))
