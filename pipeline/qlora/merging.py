"""Adapter and 16-bit base → one plain model folder, and the proof that the two answer alike."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StepFailed
from pipeline.model_folder.manifest import PICKLES
from pipeline.prompt import Format, template_for
from pipeline.qlora.loading import load_model

if TYPE_CHECKING:
    import torch

SHARD_SIZE = "5GB"
#: Largest relative L2 distance of next-token logits that rounding explains, by the merged model's dtype, for an adapter
#: that moves them by `_USUAL` or less. Measured on SmolLM2-135M in bfloat16 after 30 steps at 5e-4: rounding the merged
#: weights moves them by 0.06 to 0.13, the adapter itself by 1 to 3; after longer training, or at another seed, rounding
#: by up to 0.29. float16 rounds eight times finer.
TOLERANCES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
_USUAL = 1.0
#: Beyond that nothing more is excused. Without an end an adapter that makes logits small, so that a distance
#: from them is large, would excuse anything: logits of nothing are 1 away, any others of their size 1.4.
_FARTHEST = 2.0
_READABLE = 0o644


@dataclass(frozen=True)
class Answering:
    """How the merged model answers by default: greedily, as it is evaluated."""

    format: Format
    max_new_tokens: int
    repetition_penalty: float
    stops: Sequence[int]
    """Tokens that end an answer."""


def adapt(base: Path, adapter: Path) -> Any:
    """Return the adapter on the base in the base's own dtype, on the CPU, in evaluation mode."""
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(load_model(base, "cpu"), adapter, local_files_only=True)
    model.eval()
    return model


def next_logits(model: Any, prompts: Sequence[Sequence[int]]) -> "list[torch.Tensor]":
    """
    Return each tokenised prompt's next-token logits (vocabulary,), computed in float32; one prompt a pass, no padding.

    What differs between two models is then their weights, on any processor: in bfloat16 the arithmetic alone moved
    logits by up to 0.28 beside the 0.13 of rounded weights.
    """
    import torch

    with torch.inference_mode(), _in_float32(model):
        return [model(input_ids=torch.tensor([list(ids)])).logits[0, -1].float() for ids in prompts]


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """Let a model compute in float32; its weights are as they were afterwards."""
    import torch

    dtypes = {weight: weight.dtype for weight in model.parameters() if weight.dtype != torch.float32}
    for weight in dtypes:
        weight.data = weight.data.float()
    yield
    for weight, dtype in dtypes.items():
        weight.data = weight.data.to(dtype)


def tolerance(dtype: str, base: "Sequence[torch.Tensor]", adapted: "Sequence[torch.Tensor]") -> float:
    """
    Return the distance (see `compare`) of a merged model's logits from `adapted` that rounding to `dtype` explains.

    Larger updates are rounded more coarsely, so it grows with how far the adapter moves the logits of `base`, by the
    prompt that it moves least: a quarter of that movement in bfloat16, from 0.25 to 0.5. Raises `StepFailed` if logits
    are not finite, or those of `adapted` are all zero, which nothing can be compared with.
    """
    distances = _distances(base, adapted)
    if not all(map(math.isfinite, distances)):
        message = "the logits of the base model or of the adapter on it are not finite, or all zero"
        raise StepFailed(message, "lower train.learning_rate and train again")
    moved = min(_FARTHEST, *distances)
    return TOLERANCES.get(dtype, TOLERANCES["bfloat16"]) * max(1.0, moved / _USUAL)


def merge_into(adapted: Any, tokenizer: Any, target: Path, answering: Answering) -> str:
    """
    Save base plus adapter (see `adapt`) to the new folder `target`, in the base's dtype; return the dtype's name.

    Each layer's update is computed in float32 and rounded once. The folder carries the tokenizer, a chat template that
    renders the trained format, and a generation config that answers as the evaluation does. `adapted` is used up.
    Raises `StepFailed` if a merged weight is not finite.
    """
    from transformers import GenerationConfig

    try:
        model = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        message = f"the adapter cannot be merged: {error}"
        raise StepFailed(message, "lower train.learning_rate and train again") from error
    if getattr(model.config, "quantization_config", None) is not None:
        message = "the merged model still claims to be quantised"
        raise StepFailed(message, "report this: merging works on the 16-bit base")
    template = template_for(tokenizer, answering.format)
    if template is not None:
        tokenizer.chat_template = template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config: Any = GenerationConfig
    model.generation_config = config(
        do_sample=False,
        max_new_tokens=answering.max_new_tokens,
        repetition_penalty=float(answering.repetition_penalty),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(answering.stops),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(target, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(target)
    _tidy(target)
    return str(model.dtype).removeprefix("torch.")


def compare(folder: Path, prompts: Sequence[Sequence[int]], expected: "Sequence[torch.Tensor]") -> float:
    """
    Return the largest relative L2 distance |merged - expected| / |expected| over the prompts' next-token logits.

    `folder` is loaded as anyone would load it. Raises `StepFailed` if a logit is not finite.
    """
    import torch

    distances = _distances(next_logits(load_model(folder, "cpu"), prompts), expected)
    worst = max(distances)
    if not torch.isfinite(torch.tensor(distances)).all():
        message = "the merged model gives logits that are not finite"
        raise StepFailed(message, "lower train.learning_rate and train again")
    return worst


def _distances(found: "Sequence[torch.Tensor]", expected: "Sequence[torch.Tensor]") -> list[float]:
    import torch

    return [
        float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))
        for ours, theirs in zip(found, expected, strict=True)
    ]


def _tidy(folder: Path) -> None:
    """Make the files readable for whoever serves the model, and refuse what no plain model folder holds."""
    for path in folder.rglob("*"):
        if path.suffix in PICKLES:
            message = f"saving the merged model wrote {path.name}, which is no safetensors file"
            raise StepFailed(message, "update transformers")
        if path.is_file():
            path.chmod(_READABLE & ~_umask())


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current
