"""
Estimate a training's memory, and read the machine's free memory.

The estimate is computed from config.json and the headers of the weights: nothing is loaded, so the daemon can use it,
too. bench/memory.py measures its error for SmolLM2-135M on a CPU; on a GPU it was not measured.
"""

import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pipeline.artifacts import MemoryPlan
from pipeline.config import TrainConfig
from pipeline.durable import signature
from pipeline.errors import StepFailed
from pipeline.models.safetensors_files import NotSafetensorsError, read_all_shapes, weight_files
from pipeline.models.untrusted import text_part, try_read_object

#: A training fits if its estimate is at most this share of the free memory.
MARGIN = 0.9
#: Names of the matrices that get no adapter; all others do, stacks included.
_NO_LORA = ("embed", "lm_head", "wte", "wpe")
#: Bytes per weight in NF4 with double quantisation: 4 bits, and 0.127 for its block's scale (arXiv 2305.14314, §3).
_NF4_BYTES = 4.127 / 8
#: Bytes per trained weight: the weight and its gradient in float32, and a 16-bit copy for arithmetic.
_TRAINED_BYTES = 10
#: Factor on activations for temporaries and fragmentation. Measured on a CPU; torch's CUDA allocator fragments less.
OVERHEAD = {"cpu": 1.25, "cuda": 1.1}
#: Python, torch and the imported libraries. On a GPU cuBLAS's workspaces: torch allocates 34 MB, before Hopper less,
#: in each of two threads, forward and backward pass (computed, not measured). The context is not free memory, see
#: `free_on_gpus`.
_LIBRARIES_BYTES = {"cpu": 600 << 20, "cuda": 64 << 20}
#: Most bytes of a chunk's logits in float32 (pipeline.train.answer_loss); with their copy in 16 bits and the
#: gradients of both three times as many. Each chunk reads the head, which a GPU does more slowly than it multiplies.
LOGITS_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}
_LOGITS_COPIES = 3
_WIDE, _NARROW = 4, 2
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class BaseSizes:
    """The sizes of a base model, from its headers and config.json, that determine its training's memory."""

    weights: int
    """Number of all weights."""
    linear: int
    """Weights in the matrices that get an adapter and are quantised."""
    inputs: int
    """Sum of the input widths of all these matrices."""
    outputs: int
    matrices: int
    largest: int
    """Weights of the largest of these matrices."""
    width: int
    """Bytes per saved weight."""
    layers: int
    hidden: int
    inner: int
    """Width of the feed-forward layer."""
    attention: int
    """Width of all query heads together."""
    vocabulary: int


def base_sizes(folder: Path) -> BaseSizes:
    """
    Return the sizes of the base model in `folder`, from its headers and config.json; most that are missing are 0.

    Raises `ValueError` if a weights file is not a complete safetensors file, `OSError` if one cannot be read.
    """
    try:
        files = weight_files(folder)
    except NotSafetensorsError:
        files = []
    return _base_sizes(folder, tuple(files), tuple(map(signature, [folder / "config.json", *files])))


@lru_cache(maxsize=8)
def _base_sizes(folder: Path, files: tuple[Path, ...], _signatures: object) -> BaseSizes:
    weights = stored = 0
    linear = []
    for path, shapes, header in read_all_shapes(files):
        weights += sum(math.prod(shape) for shape in shapes.values())
        stored += path.stat().st_size - header
        linear += [
            shape for name, shape in shapes.items() if len(shape) > 1 and not any(word in name for word in _NO_LORA)
        ]
    part = text_part(try_read_object(folder / "config.json") or {})
    hidden = _size(part, "hidden_size", "n_embd", "d_model")
    heads = _size(part, "num_attention_heads", "n_head", "n_heads")
    return BaseSizes(
        weights=weights,
        linear=sum(math.prod(shape) for shape in linear),
        inputs=sum(shape[-1] * math.prod(shape[:-2]) for shape in linear),
        outputs=sum(shape[-2] * math.prod(shape[:-2]) for shape in linear),
        matrices=sum(math.prod(shape[:-2]) for shape in linear),
        largest=max((math.prod(shape[-2:]) for shape in linear), default=0),
        width=max(_NARROW, round(stored / max(1, weights))),
        layers=_size(part, "num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        hidden=hidden,
        inner=_size(part, "intermediate_size", "n_inner") or 4 * hidden,
        attention=heads * _size(part, "head_dim") or hidden,
        vocabulary=_size(part, "vocab_size"),
    )


def nf4_bytes(base: BaseSizes) -> int:
    """Return the bytes of all weights with those of the linear layers in NF4."""
    return int((base.weights - base.linear) * base.width + base.linear * _NF4_BYTES)


def trained_numbers(base: BaseSizes, train: TrainConfig) -> int:
    """Return the most parameters that a training with the settings `train` changes, in an adapter or in the base."""
    if train.method == "full":
        return base.weights
    if train.method == "galore":
        return base.linear
    if train.method == "spectrum":
        return base.linear * train.chosen(base.layers) // max(1, base.layers)
    # DoRA has one more number per output.
    return train.rank * (base.inputs + base.outputs) + (train.method == "dora") * base.outputs


def moment_numbers(base: BaseSizes, train: TrainConfig) -> int:
    """Return how many numbers the optimizer stores: two per trained parameter, or GaLore's moments and projectors."""
    if train.method == "galore":
        return 2 * train.rank * (base.inputs + base.outputs)
    return 2 * trained_numbers(base, train)


def has_8_bit_moments(train: TrainConfig, device: Literal["cpu", "cuda"]) -> bool:
    """Return whether Adam's moments have 8 bits instead of float32: with `spectrum` and `full`, on a GPU."""
    return device == "cuda" and train.method in {"spectrum", "full"}


def estimate(
    base: BaseSizes,
    plan: MemoryPlan,
    train: TrainConfig,
    device: Literal["cpu", "cuda"],
    *,
    arithmetic_in_16_bits: bool = True,
) -> dict[str, int]:
    """
    Return a training's estimated memory on `device`, in bytes by purpose, for micro-batches of `plan.batch_tokens`.

    The purposes, whose sum is the total: weights, trained, optimizer, activations, logits, libraries. Between forward
    and backward pass each adapted layer saves its input, and attention, norms and feed-forward layer what they need, as
    counted for a Llama. All experts of a mixture count. An output head that scales its logits computes them for all
    tokens and needs more.
    """
    width = base.width if arithmetic_in_16_bits else _WIDE
    if device == "cuda":
        width = _NARROW
    is_wide = width == _WIDE and (plan.quantization == "none" or not arithmetic_in_16_bits)
    number = _WIDE if is_wide else _NARROW
    # Products with an NF4 matrix use a copy of it in the dtype of the arithmetic (computed, not measured).
    dequantised = base.largest * number if plan.quantization == "nf4" else 0
    rank = 0 if train.trains_full_weights else train.rank
    activations = plan.batch_tokens * _activation_bytes(base, plan, rank, number)
    quantised = base.linear if plan.quantization == "nf4" else 0
    trained = trained_numbers(base, train)
    unfrozen = trained if train.trains_full_weights else 0
    moments = wide = moment_numbers(base, train)
    if has_8_bit_moments(train, device):
        # Transformers lets bitsandbytes keep an embedding's moments in float32.
        wide = 2 * base.vocabulary * base.hidden if train.method == "full" else 0
    return {
        "weights": int((base.weights - quantised - unfrozen) * width + quantised * _NF4_BYTES) + dequantised,
        "trained": trained * _TRAINED_BYTES,
        "optimizer": wide * _WIDE + moments - wide,
        "activations": int(activations * OVERHEAD[device]),
        "logits": min(plan.batch_tokens * base.vocabulary * _WIDE, LOGITS_BYTES[device]) * _LOGITS_COPIES,
        "libraries": _LIBRARIES_BYTES[device],
    }


def _activation_bytes(base: BaseSizes, plan: MemoryPlan, rank: int, number: int) -> int:
    """Return the bytes of activations per token, in elements of `number` bytes: those saved, and those recomputed."""
    layers = _kept_numbers(base, rank, number) * number
    if plan.activations != "kept":
        # The input of a recomputed layer is saved, and one layer at a time is recomputed.
        half = -(-base.layers // 2)
        whole, inputs = (1, base.layers) if plan.activations == "recomputed" else (half, half)
        layers = layers // max(1, base.layers) * whole + inputs * base.hidden * number
    return layers + base.hidden * _WIDE


def _kept_numbers(base: BaseSizes, rank: int, number: int) -> int:
    """Return the activations saved per token over all layers, in elements of `number` bytes."""
    of_adapters = base.inputs + rank * base.matrices
    if number == _WIDE:
        # Without mixed precision layers share a saved input: queries, keys and values; gate and up.
        of_adapters -= 3 * base.hidden * base.layers
    # Queries, keys, values and attention's output; gate, up and the activated gate.
    of_layers = base.outputs - 2 * base.hidden * base.layers + (base.attention + base.inner) * base.layers
    # Both norms save their input in float32.
    of_norms = 2 * base.layers * base.hidden * _WIDE // number
    return of_adapters + max(0, of_layers) + of_norms


def peak_resident() -> int:
    """Return this process's peak resident memory in bytes; getrusage would include its parent's before exec."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)


def available_memory() -> int:
    """Return the bytes that this process can still allocate, by the machine's free memory and its cgroups (v2)."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
    groups = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    # cgroup v2 has one line, for hierarchy 0; v1 has no hierarchy 0.
    path = next((line.removeprefix("0::").lstrip("/") for line in groups if line.startswith("0::")), "")
    folder = _CGROUPS / path
    while True:
        free = min(free, _left_in_group(folder, free))
        if folder == _CGROUPS or _CGROUPS not in folder.parents:
            return free
        folder = folder.parent


def free_on_gpus() -> list[int]:
    """
    Return the free memory of each visible GPU in bytes, less the context of the process that reads it; [] without any.

    That process takes seconds to import torch; a context in this one would stay until it ends. Raises `StepFailed` if
    it fails.
    """
    code = "import torch; print(*(torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        hint = "see nvidia-smi: every GPU in CUDA_VISIBLE_DEVICES must be free for several processes"
        raise StepFailed(f"the free memory of the GPUs cannot be read: {reason}", hint)
    return [int(free) for free in done.stdout.split()]


def _left_in_group(folder: Path, unlimited: int) -> int:
    """Return the bytes that a cgroup still allows, page cache counted as free; `unlimited` without a readable limit."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return unlimited
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return unlimited
    return max(0, int(limit) - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0)))


def _size(config: Mapping[str, Any], *names: str) -> int:
    return next((value for value in (config.get(name) for name in names) if isinstance(value, int)), 0)
