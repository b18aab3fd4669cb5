"""
Hold a model for inference on GPUs: on the first if its weights fit there, else on all, else in NF4.

On several GPUs each has a part of the layers. Nothing is left in the host's memory or on disk.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import StepFailed
from pipeline.models.memory_estimate import MARGIN, base_sizes, free_on_gpus, nf4_bytes
from pipeline.models.safetensors_files import weight_files
from pipeline.words import count, size_words

Quantization = Literal["nf4", "none"]
#: Most prompts that are generated together where no batch size is set.
_MOST_PROMPTS = {"cpu": 32, "cuda": 128}


def weight_bytes(folder: Path, quantization: Quantization) -> int:
    """
    Return the bytes of the weights of the model in `folder`, as saved or with its linear layers in NF4.

    Raises `OSError` or `ValueError` if files are missing or damaged.
    """
    if quantization == "nf4":
        return nf4_bytes(base_sizes(folder))
    return sum(path.stat().st_size for path in weight_files(folder))


def inference_quantization(device: Literal["cpu", "cuda"], *folders: Path) -> Quantization:
    """
    Return how the weights of the models in `folders`, loaded one at a time, are held for inference: `none` is as saved.

    On a CPU it is `none`. On GPUs it is `nf4` for all of them if one does not fit as saved. Raises `StepFailed` if one
    does not fit even in NF4 or free memory cannot be read, and as `weight_bytes` does.
    """
    if device == "cpu":
        return "none"
    free = free_on_gpus()
    if all(_hold(free, weight_bytes(folder, "none")) for folder in folders):
        return "none"
    largest, folder = max((weight_bytes(folder, "nf4"), folder) for folder in folders)
    if _hold(free, largest):
        return "nf4"
    raise StepFailed(
        f"the model in {folder} does not fit on the GPU for evaluation, even in NF4: {size_words(largest)} of "
        f"weights, {size_words(sum(free))} free on {count(len(free), 'GPU')}",
        "free memory there, or use a smaller base model or a GPU with more memory",
    )


def key_value_bytes(folder: Path, tokens: int) -> int:
    """Return the most bytes of the keys and values of `tokens` tokens in float32. Raises as `load_config` does."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
    all_heads = getattr(config, "num_attention_heads", None) or 1
    heads = getattr(config, "num_key_value_heads", None) or all_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // all_heads
    return int(2 * 4 * config.num_hidden_layers * heads * width * tokens)


def prompts_at_once(
    device: Literal["cpu", "cuda"], quantization: Quantization, tokens: int, folders: Sequence[Path]
) -> int:
    """
    Return how many prompts, with their answers of up to `tokens` tokens each, are generated together.

    That is 32 on a CPU, and on GPUs the largest power of two, from 1 to 128, whose keys, values and prefill fit with
    the weights of each model in `folders`. It depends on total, not free memory: a new size would void cached answers.
    Raises as `weight_bytes` and `key_value_bytes` do.
    """
    import torch

    fit = most = _MOST_PROMPTS[device]
    for folder in folders if device == "cuda" else ():
        total = [torch.cuda.get_device_properties(gpu).total_memory for gpu in range(torch.cuda.device_count())]
        weights, sizes = weight_bytes(folder, quantization), base_sizes(folder)
        left = MARGIN * (total[0] if weights <= MARGIN * total[0] else sum(total)) - weights
        # In 16 bits; a prefill holds what a feed-forward layer computes from all tokens.
        each = key_value_bytes(folder, tokens) // 2 + 2 * tokens * (3 * sizes.inner + 4 * sizes.hidden)
        fit = min(fit, max(1, int(left / each)))
    return min(most, 1 << (fit.bit_length() - 1))


def gpu_map(weights: int) -> dict[str, Any]:
    """
    Return transformers' arguments for a model of `weights` bytes: on the only or first GPU if it fits, else on all.

    Raises `StepFailed` if free memory cannot be read.
    """
    import torch

    if torch.cuda.device_count() == 1 or _hold((free := free_on_gpus())[:1], weights):
        return {"device_map": {"": "cuda"}}
    # The rest is for keys, values and logits.
    return {"device_map": "auto", "max_memory": {gpu: int(MARGIN * left) for gpu, left in enumerate(free)}}


def _hold(free: Sequence[int], weights: int) -> bool:
    """
    Return whether 90 % of the first GPU's free memory, or 81 % of that of all, holds so many bytes.

    Of several GPUs less is used, as no layer is divided.
    """
    return weights <= MARGIN * max(free[0], MARGIN * sum(free))
