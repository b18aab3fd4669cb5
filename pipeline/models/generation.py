"""
Open a model for inference, and compute the likelihood of reference answers and choices.

Callers run batch by batch, so that they can report progress, keep results and stop in between. Inputs are sorted by
length, the longest first; batches depend only on the inputs.
"""

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.errors import CannotTrain
from pipeline.models.loading import Device, arithmetic_dtype, load_config, load_model, load_tokenizer, memory_errors
from pipeline.models.placement import Quantization
from pipeline.models.prefill import Tokens, forward, last_logits, pad_left, prefill, shared_prefix
from pipeline.models.template import Template

#: Most bytes of a batch's float32 logits when references or choices are scored.
_LOGITS_BYTES = 1 << 28

#: The tokens of a prompt and of each of its choices.
Question = tuple[Tokens, Sequence[Tokens]]


@dataclass(frozen=True)
class Decoding:
    """Parameters of greedy decoding: answer length, repetition penalty, batch size, window."""

    max_new_tokens: int
    repetition_penalty: float
    batch_size: int
    window: int = sys.maxsize
    """Most tokens of a prompt with its answer."""

    def room(self, prompt: Tokens) -> int:
        """Return the most tokens of an answer: `max_new_tokens`, or what `prompt` leaves of the window, even if < 0."""
        return min(self.max_new_tokens, self.window - len(prompt))


class Answer(NamedTuple):
    """The model's answer to one prompt: its text, the number of generated tokens, and whether the model ended it."""

    text: str
    tokens: int
    """Generated tokens, including the end token."""
    ended: bool
    """Whether the model generated the end token."""


class Likelihood(NamedTuple):
    """The likelihood of one completion under the model, summed over its tokens, and their number."""

    nll: float
    """Negative log-likelihood in nats, summed over the completion's tokens; not finite if the model is broken."""
    tokens: int


@dataclass(frozen=True)
class AskedModel:
    """A loaded model, and the template that writes its prompts and reads its answers."""

    model: Any
    template: Template


def named_ends(folder: Path) -> list[int]:
    """
    Return the ids of a model's end tokens in its generation config, in config.json without one; empty if unset there.

    Raises `OSError` or `ValueError` if it has neither.
    """
    from transformers import GenerationConfig

    try:
        named = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except OSError:
        named = getattr(load_config(folder), "eos_token_id", None)
    return [named] if isinstance(named, int) else list(named or ())


def load_template(folder: Path, fmt: Literal["auto", "chat", "alpaca"]) -> Template:
    """
    Return the template of the model in `folder` for `train.format`; `auto` is `chat` if there is a chat template.

    Raises `CannotTrain` for `chat` without a chat template, and as `load_tokenizer`, `named_ends` and `Template` do.
    """
    tokenizer: Any = load_tokenizer(folder)
    if fmt == "chat" and not tokenizer.chat_template:
        message = "train.format is chat, and the base model's tokenizer has no chat template"
        raise CannotTrain(message, 'set train.format = "alpaca" (or "auto"), or use an instruct model as the base')
    if fmt == "auto":
        fmt = "chat" if tokenizer.chat_template else "alpaca"
    return Template(tokenizer, fmt, named_ends(folder))


def open_model(folder: Path, template: Template, device: Device, quantization: Quantization = "none") -> AskedModel:
    """
    Return the model in `folder` on `device`, ready for greedy decoding, in its saved dtype or `arithmetic_dtype`.

    See `inference_quantization` for `quantization`. A model that does not fit on one GPU is placed on all. Raises
    `CannotTrain` if the folder has no model that can be loaded, `StepFailed` if memory does not suffice, `RuntimeError`
    for other problems of the device.
    """
    from transformers import GenerationConfig

    with memory_errors():
        model: Any = load_model(folder, device, quantization, arithmetic_dtype(device), spread=True)
    # The folder's sampling settings must not affect a greedy evaluation.
    config: Any = GenerationConfig
    model.generation_config = config(do_sample=False, eos_token_id=list(template.ends), pad_token_id=template.ends[0])
    return AskedModel(model, template)


def close_model(asked: AskedModel) -> None:
    """Free the memory of the model, which cannot be used afterwards."""
    import torch

    # Not `to`: the model's own refuses if it is on several GPUs, and torch's cannot move NF4 weights there.
    asked.model.to_empty(device="meta")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def arithmetic(folder: Path, device: Device, quantization: Quantization = "none") -> dict[str, Any]:
    """
    Return what affects the last bits of results besides the weights: dtype, device, attention, library versions.

    The keys are `dtype` (the saved one, and whether weights are in NF4), `device` (with its name; on a CPU also the
    number of threads), `attention` (its implementation) and `versions` (by library). The model is created on the meta
    device, without loading weights. Raises as `load_config` does.
    """
    import tokenizers  # noqa: PLC0415
    import torch
    import transformers

    config = load_config(folder)
    automatic: Any = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = automatic.from_config(config)
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        # Measured in bf16: another number of threads changed one answer in 32.
        name = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        name += ", computing in float32" if arithmetic_dtype(device) is not None else ""
    dtype = str(config.dtype or "as saved").removeprefix("torch.")
    versions = {module.__name__: module.__version__ for module in (tokenizers, torch, transformers)}
    if quantization == "nf4":
        dtype += " in NF4"
        versions["bitsandbytes"] = metadata.version("bitsandbytes")
    return {
        "dtype": dtype,
        "device": f"{device} {name}",
        "attention": str(model.config._attn_implementation),  # noqa: SLF001 - the library has no public name for it
        "versions": versions,
    }


def vocabulary(folder: Path) -> int:
    """Return the vocabulary size of the model in `folder`. Raises `OSError` or `ValueError` without config.json."""
    return int(load_config(folder).get_text_config().vocab_size)


def likelihood_batches(pairs: Sequence[tuple[Tokens, Tokens]], size: int, vocabulary: int) -> list[list[int]]:
    """Return the indices of `pairs` in batches of up to `size`, fewer if logits exceed 256 MB; longest pairs first."""
    order = sorted(range(len(pairs)), key=lambda index: (-sum(map(len, pairs[index])), tuple(pairs[index][0])))
    return _batches(order, [(1, len(completion) + 1) for _, completion in pairs], size, vocabulary)


def _batches(order: Sequence[int], shapes: Sequence[tuple[int, int]], size: int, vocabulary: int) -> list[list[int]]:
    """Return `order` in batches of up to `size` whose logits fit, `shapes` being each index's rows and their tokens."""
    batches: list[list[int]] = []
    rows = widest = 0
    for index in order:
        added, width = shapes[index]
        rows, widest = rows + added, max(widest, width)
        if not batches or len(batches[-1]) == size or 4 * vocabulary * rows * widest > _LOGITS_BYTES:
            batches.append([])
            rows, widest = added, width
        batches[-1].append(index)
    return batches


def likelihoods(asked: AskedModel, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Likelihood]:
    """
    Return the likelihood of each completion after its prompt, teacher-forced, for one batch.

    A pair is the tokens of the prompt and of the completion with its end token; only the latter are counted.
    Raises `StepFailed` if memory does not suffice.
    """
    import torch
    from torch.nn import functional

    rows = [[*prompt, *completion] for prompt, completion in pairs]
    sizes = [len(completion) for _, completion in pairs]
    keep = max(sizes) + 1
    with memory_errors(), torch.inference_mode():
        logits = last_logits(asked.model, rows, shared_prefix([prompt for prompt, _ in pairs]), keep)[:, :-1]
        targets, counted = pad_left([completion for _, completion in pairs], logits.device)
        wanted = counted.bool()
        losses = functional.cross_entropy(logits[wanted].float(), targets[wanted], reduction="none")
        sums = [float(part.sum()) for part in torch.split(losses, sizes)]
    return [Likelihood(*pair) for pair in zip(sums, sizes, strict=True)]


def choice_batches(questions: Sequence[Question], size: int, vocabulary: int) -> list[list[int]]:
    """
    Return the indices of `questions` in batches of at most `size`, by the length of their longest choice.

    So fewer choices are padded; the longest come first, and among equals the longest prompts. Batches are smaller if
    the float32 logits of the choices, of `vocabulary` numbers per token, would exceed 256 MB.
    """
    widths = [max(map(len, choices)) for _, choices in questions]
    prompts = [tuple(prompt) for prompt, _ in questions]
    order = sorted(range(len(questions)), key=lambda index: (-widths[index], -len(prompts[index]), prompts[index]))
    shapes = [(len(choices), width) for (_, choices), width in zip(questions, widths, strict=True)]
    return _batches(order, shapes, size, vocabulary)


def choice_likelihoods(asked: AskedModel, questions: Sequence[Question]) -> list[list[float]]:
    """
    Return the mean negative log-likelihood of each choice of each question, in nats per token.

    Each question is prefilled once. The mean normalises for length (Brown et al. 2020, section 2.4). Raises
    `StepFailed` if memory does not suffice, `CannotTrain` if the model has no key-value cache.
    """
    import torch
    from torch.nn import functional

    owners = [index for index, (_, choices) in enumerate(questions) for _ in choices]
    rows = [tokens for _, choices in questions for tokens in choices]
    width = max(map(len, rows))
    with memory_errors(), torch.inference_mode():
        read = prefill(asked.model, [prompt for prompt, _ in questions])
        device = read.ids.device
        index = torch.tensor(owners, device=device)
        targets = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows], device=device)
        counted = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        wanted = counted.bool()
        logits = read.logits[index]
        if width > 1:
            read.cache.reorder_cache(index)
            mask = torch.cat([read.mask[index], counted[:, :-1]], dim=1)
            _, further = forward(asked.model, targets[:, :-1], mask, read.cache, width - 1)
            logits = torch.cat([logits, further], dim=1)
        losses = functional.cross_entropy(logits[wanted].float(), targets[wanted], reduction="none")
        means = iter([float(part.sum()) / len(part) for part in torch.split(losses, [len(row) for row in rows])])
    return [[next(means) for _ in choices] for _, choices in questions]
