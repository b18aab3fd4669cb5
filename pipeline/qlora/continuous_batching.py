"""
Answers by transformers' continuous batching: where an answer is complete, the next question takes its place.

The library may lose a request, fail it or hand back a part of it, and says so in a line of its log at most. Here every
result is held against what was asked, and what has not exactly one whole answer is asked again. What is read and
generated together depends on the prompts and on `batch_size` alone: room for that many is made beforehand, all requests
are there before the first is answered, and none uses what another has read.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import CannotTrain, StepFailed
from pipeline.qlora import generation
from pipeline.qlora.generation import Answer, AskedModel, Decoding, Tokens

#: Most tokens that are read and generated in one pass of the model; longer prompts are read in parts.
_PASS_TOKENS = 2048
#: Tokens of one page of the cache of keys and values.
_PAGE_TOKENS = 32
#: The engine in a prediction's key, with what of it can change an answer.
ENGINE = f"continuous, {_PASS_TOKENS} tokens a pass"
#: How often a request is asked in all.
ROUNDS = 3
#: How long a result is waited for before it is looked whether the step is to stop.
_LOOK_SECONDS = 0.2
#: So long without a pass of the model, and the engine has stalled.
_STALL_SECONDS = 1800.0
_REMEDY = 'set evaluate.engine = "batches"'

#: Takes the place of a prompt, its answer and the answer's share of the seconds; no answer takes back what was given.
Keep = Callable[[int, Answer | None, float], None]


def check(folder: Path, repetition_penalty: float) -> None:
    """
    Raise `CannotTrain` if the model in `folder` cannot be asked this way for all that is known without its weights.

    The library would drop a repetition penalty with a word in its log.
    """
    if repetition_penalty != 1:
        message = (
            f"continuous batching has no repetition penalty, and evaluate.repetition_penalty is {repetition_penalty}"
        )
        raise CannotTrain(message, f"{_REMEDY}, or evaluate.repetition_penalty = 1.0")
    model = generation.layout(folder)
    name, attention = type(model).__name__, generation.attention(model)
    if not hasattr(model, "init_continuous_batching"):
        raise _unfit(f"the installed transformers has none for {name}")
    if getattr(model, "_is_stateful", False) or not getattr(model, "_supports_attention_backend", False):
        raise _unfit(f"{name} does not keep keys and values in a cache that can be paged")
    if attention not in {"sdpa", "eager"}:
        raise _unfit(f"it is not used with the attention {attention}")


def prove(asked: AskedModel, prompt: Tokens, decoding: Decoding, check_stop: Callable[[], None]) -> None:
    """Answer one prompt, to learn whether the model can be asked this way; raises `CannotTrain` if it cannot."""
    wrong = _ask(asked, {0: prompt}, decoding, lambda *_: None, check_stop)
    if wrong:
        raise _unfit(wrong[0])


def answers(
    asked: AskedModel, prompts: Sequence[Tokens], decoding: Decoding, keep: Keep, check_stop: Callable[[], None]
) -> None:
    """
    Give the answer to each of the tokenised prompts to `keep` as soon as it is complete, in no order.

    What `check_stop` raises ends it, between two passes of the model. Raises `StepFailed` if memory does not suffice,
    or if a prompt has not exactly one whole answer after it was asked `ROUNDS` times.
    """
    missing = dict(enumerate(prompts))
    wrong: dict[int, str] = {}
    for _ in range(ROUNDS):
        wrong = _ask(asked, missing, decoding, keep, check_stop)
        missing = {place: prompts[place] for place in wrong}
        if not missing:
            return
    reason = next(iter(wrong.values()))
    message = (
        f"{len(wrong)} of {len(prompts)} answers are missing, though continuous batching was asked for them "
        f"{ROUNDS} times: {reason}"
    )
    raise StepFailed(message, f"{_REMEDY} and retry the run")


def _ask(
    asked: AskedModel, prompts: Mapping[int, Tokens], decoding: Decoding, keep: Keep, check_stop: Callable[[], None]
) -> dict[int, str]:
    """Ask each prompt once; return those that have not exactly one whole answer now, with the reason."""
    if not prompts:
        return {}
    wrong = dict.fromkeys(prompts, "no result came")
    places = {str(place): place for place in prompts}
    seen: set[int] = set()
    with _running(asked, prompts, decoding) as manager:
        before = time.monotonic()
        for result in _results(manager, check_stop):
            place = places.get(result.request_id)
            if place is None:
                continue
            fault = _fault(result, prompts[place], asked, decoding)
            if place in seen:
                if place not in wrong:
                    keep(place, None, 0.0)
                wrong[place] = "two results came"
            elif fault:
                wrong[place] = fault
            else:
                now = time.monotonic()
                keep(place, generation.as_answer(asked, result.generated_tokens), now - before)
                before = now
                del wrong[place]
            seen.add(place)
        _raise_want_of_memory(manager)
    return wrong


def _fault(result: Any, prompt: Tokens, asked: AskedModel, decoding: Decoding) -> str | None:
    """Return what is wrong with a result, `None` if it is a whole answer to this prompt."""
    tokens = result.generated_tokens
    if result.error is not None or not result.is_finished():
        return str(result.error or "a part of an answer came")
    if list(result.prompt_ids) != list(prompt):
        return "the answer to another prompt came"
    ended = [place for place, token in enumerate(tokens) if token in asked.ends]
    if ended == [len(tokens) - 1] or (not ended and len(tokens) == decoding.max_new_tokens):
        return None
    return f"an answer of {len(tokens)} tokens came that neither ended nor reached {decoding.max_new_tokens}"


def _results(manager: Any, check_stop: Callable[[], None]) -> Iterator[Any]:
    """Yield the results until no more can come: the engine ends once nothing waits, and gives up when it stalls."""
    passes, moved = None, time.monotonic()
    while True:
        check_stop()
        # Asked first: what the engine leaves behind when it ends is still taken.
        alive = manager.is_running()
        result = manager.get_result(timeout=_LOOK_SECONDS)
        if result is not None:
            yield result
        elif not alive:
            return
        now, done = time.monotonic(), getattr(manager, "current_batch", None)
        if done != passes:
            passes, moved = done, now
        elif now - moved > _STALL_SECONDS:
            return


@contextmanager
def _running(asked: AskedModel, prompts: Mapping[int, Tokens], decoding: Decoding) -> Iterator[Any]:
    """Answer the prompts, the longest first, in a thread of the library's that ends with the block at the latest."""
    import torch
    from transformers import GenerationConfig

    # Its thread prints tracebacks of what is here the reason of an error.
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    greedy: Any = GenerationConfig
    config = greedy(
        do_sample=False,
        eos_token_id=list(asked.ends),
        pad_token_id=asked.ends[0],
        max_new_tokens=decoding.max_new_tokens,
    )
    with generation.memory_errors(), torch.inference_mode():
        manager = _manager(asked.model, config, _room(prompts, decoding))
        try:
            places = list(prompts)
            (order,) = generation.answer_batches([prompts[place] for place in places], len(places))
            for index in order:
                place = places[index]
                manager.add_request(list(prompts[place]), request_id=str(place), max_new_tokens=decoding.max_new_tokens)
            manager.start()
            # The thread answers what it has and ends; were it to wait for more, a lost request would be waited for.
            status = manager.background_thread_status
            status.request_stop(status.FLUSH_AND_STOP, 0)
            yield manager
        finally:
            manager.stop(hard_stop=True)
            manager.destroy()


def _room(prompts: Mapping[int, Tokens], decoding: Decoding) -> Any:
    """Return the engine's settings: room for `batch_size` requests of the longest kind, nothing left to a guess."""
    from transformers import ContinuousBatchingConfig

    longest = max(map(len, prompts.values())) + decoding.max_new_tokens
    rows = min(decoding.batch_size, len(prompts))
    return ContinuousBatchingConfig(
        page_size=_PAGE_TOKENS,
        num_blocks=rows * (-(-longest // _PAGE_TOKENS) + 1),
        max_batch_tokens=_PASS_TOKENS,
        max_requests_per_batch=rows,
        safety_margin=0.0,
        allow_block_sharing=False,
        auto_switch_to_flash=False,
        use_async_batching=False,
        use_cuda_graph=False,
        seed=0,
    )


def _manager(model: Any, config: Any, room: Any) -> Any:
    try:
        manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=room)
        # Lays out the cache here, where its errors can be caught, and not in the library's thread.
        manager.warmup()
    except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
        raise _unfit(str(error)) from error
    return manager


def _raise_want_of_memory(manager: Any) -> None:
    """Raise the thread's want of memory here: to ask again would be in vain."""
    import torch

    fatal = manager.background_thread_status.fatal_error
    if isinstance(fatal, (torch.OutOfMemoryError, MemoryError)):
        raise fatal


def _unfit(reason: str) -> CannotTrain:
    return CannotTrain(
        f"transformers' continuous batching cannot ask this model: {reason}", f"{_REMEDY} and retry the run"
    )
