"""
What was trained and the 16-bit base → one plain model folder, and the proof that the two answer alike.

`streamed_merge` does it with one weight in memory at a time, PEFT with the whole model where that cannot.
"""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import CannotTrain, StepFailed
from pipeline.model_folder.manifest import PICKLES
from pipeline.model_folder.safetensors_files import read_header, read_shapes
from pipeline.prompt import Format, template_for
from pipeline.qlora.generation import accepted, pad_left
from pipeline.qlora.loading import load_model
from pipeline.qlora.streamed_merge import (
    ADAPTER_FILE,
    CannotStream,
    Streamed,
    lora_layers,
    open_streamed,
    saved_as,
    weight_files,
    write_merged,
)

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5_000_000_000
#: Positions at the end of each prompt whose likeliest next token is compared.
_POSITIONS = 32
#: Largest relative L2 distance of next-token logits that rounding explains, by the merged model's dtype. Measured on
#: SmolLM2-135M in bfloat16: rounding the merged weights moves them by 0.03 to 0.29, a training by 0.1 to 4. Logits of
#: nothing are 1 away, any others of their size 1.4. float16 rounds eight times finer.
ROUNDING = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.5}
_READABLE = 0o644


@dataclass(frozen=True)
class Answering:
    """How the merged model answers by default: greedily, as it is evaluated."""

    format: Format
    max_new_tokens: int
    repetition_penalty: float
    stops: Sequence[int]
    """Tokens that end an answer."""


@dataclass(frozen=True)
class Adapted:
    """A base model and what was trained, not merged, on the CPU."""

    model: Any
    """PEFT's model, or the base with trained weights in it."""
    streamed: Streamed | None
    """The same, if its weights stay in the files."""
    not_streamed: str = ""
    """Why the whole model is in memory, if it is."""


@dataclass(frozen=True)
class Answers:
    """What a model says to prompts, one entry each."""

    logits: "Sequence[torch.Tensor]"
    """Of the next token: (vocabulary,), in float32."""
    likeliest: "Sequence[torch.Tensor]"
    """The likeliest token after each of the prompt's last tokens: (tokens,)."""


@dataclass(frozen=True)
class Drift:
    """How far a merged model is from what was trained on its base."""

    distance: float
    """The largest relative L2 distance |merged - adapted| / |adapted| over the prompts' next-token logits."""
    top1: float
    """Share of the positions at the prompts' ends with the same likeliest next token."""


def ask_adapted(base: Path, adapter: Path, prompts: Sequence[Sequence[int]]) -> tuple[Adapted, Answers]:
    """
    Return the adapter on the base, and what it answers.

    Raises `StepFailed` if the adapter's file is not what its config describes (see `check_pairs`).
    """
    try:
        streamed = open_streamed(base, adapter)
        check_pairs(streamed.model, adapter)
        return Adapted(streamed.model, streamed), ask(streamed.model, prompts)
    except (CannotStream, RuntimeError) as why:  # or a layer reaches for another one's weights
        reason = _reason(why)
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(load_model(base, "cpu"), adapter, local_files_only=True)
    check_pairs(model, adapter)
    model.eval()
    return Adapted(model, None, reason), ask(model, prompts)


def ask_trained(base: Path, weights: Path, prompts: Sequence[Sequence[int]]) -> tuple[Adapted, Answers]:
    """
    Return the base with trained weights in the place of its own, and what it answers.

    `weights` is a safetensors file. Raises `StepFailed` if it holds a tensor that the base's files do not have.
    """
    check_weights(base, weights)
    try:
        streamed = open_streamed(base, weights=weights)
        return Adapted(streamed.model, streamed), ask(streamed.model, prompts)
    except (CannotStream, RuntimeError) as why:
        reason = _reason(why)
    from safetensors.torch import load_file

    model: Any = load_model(base, "cpu")
    own = dict(model.named_parameters(remove_duplicate=False))
    trained = [(own[name], own[name].dtype, numbers) for name, numbers in load_file(weights).items()]
    for parameter, _, numbers in trained:
        parameter.data = numbers.float()
    expected = ask(model, prompts)
    for parameter, dtype, _ in trained:
        parameter.data = parameter.data.to(dtype)
    return Adapted(model, None, reason), expected


def check_weights(base: Path, weights: Path) -> None:
    """Hold a file of trained weights against the base's. Raises `StepFailed` naming a tensor that is not there so."""
    shapes = {name: shape for path in weight_files(base) for name, shape in read_shapes(path)[0].items()}
    for name, shape in read_shapes(weights)[0].items():
        if shapes.get(name) != shape:
            message = f"the trained weights hold {name} of the shape {shape}, and the base model has no such tensor"
            raise StepFailed(message, "train it again: dropforge retry RUN --from train")


def _reason(why: Exception) -> str:
    """Return, and write to the log, why the whole model is in memory."""
    streams = isinstance(why, CannotStream)
    reason = str(why) if streams else f"its layers do not read their weights one by one: {why}"[:200]
    sys.stderr.write(f"merged with the whole model in memory: {reason}\n")
    return reason


def check_pairs(model: Any, adapter: Path) -> None:
    """
    Hold an adapter's file against the PEFT model that its config describes.

    Raises `StepFailed` naming half a pair, a pair that is missing, one that meets no weight of the base, or one on a
    weight that has a second place in the model.
    """
    hint = "train it again: dropforge retry RUN --from train"
    wanted = {name for name in saved_as(model) if "lora_" in name}
    found = {name for name in read_header(adapter / ADAPTER_FILE)[0] if "lora_" in name}
    if missing := sorted(wanted - found):
        raise StepFailed(f"the adapter lacks {missing[0]}, which its adapter_config.json speaks of", hint)
    if strange := sorted(found - wanted):
        raise StepFailed(f"the adapter holds {strange[0]}, and the base model has no weight for it", hint)
    tied = getattr(model.get_base_model(), "all_tied_weights_keys", {})
    for name in lora_layers(model.get_base_model()):
        if f"{name}.weight" in {*tied, *tied.values()}:
            message = f"the adapter changes {name}, whose weight the model uses in a second place, unchanged"
            raise StepFailed(message, f"leave {name} out of the adapter's targets, and {hint}")


def ask(model: Any, prompts: Sequence[Sequence[int]]) -> Answers:
    """
    Return what a model says to tokenised prompts, computed in float32, in one pass over the weights.

    What differs between two models is then their weights, on any processor: in bfloat16 the arithmetic alone moved
    logits by up to 0.28 beside the 0.13 of rounded weights.
    """
    import torch

    inputs, mask = pad_left([list(ids) for ids in prompts], "cpu")
    inner = _inner(model)
    places = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    extra = accepted(inner, position_ids=places, logits_to_keep=_POSITIONS)
    with _in_float32(model), torch.inference_mode():
        logits = model(input_ids=inputs, attention_mask=mask, use_cache=False, **extra).logits[:, -_POSITIONS:].float()
    ends = [row[-len(ids) :] for row, ids in zip(logits, prompts, strict=True)]
    return Answers([end[-1].clone() for end in ends], [end.argmax(dim=-1) for end in ends])


def _inner(model: Any) -> Any:
    """Return transformers' model, out of PEFT's if it is in one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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


def merge_into(adapted: Adapted, tokenizer: Any, target: Path, answering: Answering) -> str:
    """
    Save base and what was trained to the new folder `target`, in the base's dtype; return the dtype's name.

    Streamed, each weight is computed in float32 and rounded once; PEFT rounds the update, too. The folder carries the
    tokenizer, a chat template that renders the trained format, and a generation config that answers as the evaluation
    does. `adapted` is used up. Raises `CannotTrain` if a merged weight is not finite.
    """
    from transformers import GenerationConfig

    template = template_for(tokenizer, answering.format)
    if template is not None:
        tokenizer.chat_template = template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config: Any = GenerationConfig
    generation = config(
        do_sample=False,
        max_new_tokens=answering.max_new_tokens,
        repetition_penalty=float(answering.repetition_penalty),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(answering.stops),
        pad_token_id=tokenizer.pad_token_id,
    )
    if adapted.streamed is None:
        dtype = _merge_whole(adapted.model, target, generation)
    else:
        dtype = _merge_streamed(adapted.streamed, target, generation)
    tokenizer.save_pretrained(target)
    _tidy(target)
    return dtype


def _merge_streamed(streamed: Streamed, target: Path, generation: Any) -> str:
    target.mkdir()
    write_merged(streamed, target, SHARD_BYTES)
    config = streamed.config
    config.architectures = [type(_inner(streamed.model)).__name__]
    config.dtype = streamed.dtype
    config.save_pretrained(target)
    generation.save_pretrained(target)
    return streamed.dtype


def _merge_whole(adapted: Any, target: Path, generation: Any) -> str:
    try:
        model = adapted.merge_and_unload(safe_merge=True) if hasattr(adapted, "merge_and_unload") else adapted
    except ValueError as error:
        message = f"the adapter cannot be merged: {error}"
        raise CannotTrain(message, "lower train.learning_rate and train again") from error
    if getattr(model.config, "quantization_config", None) is not None:
        message = "the merged model still claims to be quantised"
        raise StepFailed(message, "report this: merging works on the 16-bit base")
    model.generation_config = generation
    model.save_pretrained(target, max_shard_size=SHARD_BYTES)
    return str(model.dtype).removeprefix("torch.")


def compare(folder: Path, prompts: Sequence[Sequence[int]], expected: Answers, *, streamed: bool) -> Drift:
    """
    Return how far the merged model in `folder` is from what was expected of it.

    It is read as it was written, by weights or as a whole. Raises `CannotTrain` if a logit of either is not
    finite, or if all that were expected are zero, which nothing can be compared with.
    """
    found = ask(open_streamed(folder).model if streamed else load_model(folder, "cpu"), prompts)
    distances = _distances(found.logits, expected.logits)
    if not all(map(math.isfinite, distances)):
        message = "the logits of the merged model or of what was trained are not finite, or all zero"
        raise CannotTrain(message, "lower train.learning_rate and train again")
    import torch

    same = torch.cat([ours == theirs for ours, theirs in zip(found.likeliest, expected.likeliest, strict=True)])
    return Drift(max(distances), float(same.float().mean()))


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
