"""
Describe the GPUs, and try on the first the operations of a training.

`python -m pipeline.models.gpu_check` prints a line of JSON, what `check` returns. If no training can use the GPU the
line is {"error": MESSAGE, "hint": REMEDY}, and the exit code is the error's. It runs in its own process, for callers
that must not load the training stack.
"""

import sys
from collections.abc import Callable
from typing import Any

from pipeline.models.ask import run, say
from pipeline.models.gpu_driver import nvidia_driver
from pipeline.models.loading import Device, check_gpu, chosen_device


def check(device: Device) -> dict[str, Any]:
    """
    Return the versions `driver`, `torch` and `cuda`, the GPUs, and errors of a training's operations on `device`.

    `gpus` has a dict per GPU: `name`, compute `capability`, `free` and `total` bytes. `bitsandbytes` is whether its
    library is built for CUDA. `nf4` and `packed_attention` are errors of a forward and a backward pass, "" without any.
    Raises `CannotTrain` if `device` cannot compute in bf16.
    """
    import bitsandbytes
    import torch

    check_gpu(device)
    gpus = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        gpus.append({"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "free": free, "total": total})
    return {
        "driver": nvidia_driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
        "gpus": gpus,
        "bitsandbytes": bitsandbytes.cextension.lib.compiled_with_cuda,
        "nf4": _error_of(_try_nf4, device),
        "packed_attention": _error_of(_try_packed_attention, device),
    }


def _try_nf4(rows: Any) -> Any:
    import bitsandbytes
    import torch

    layers: Any = bitsandbytes.nn
    layer = layers.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4").to(rows.device)
    return layer(rows)


def _try_packed_attention(rows: Any) -> Any:
    import torch
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, 5, 12], dtype=torch.int32, device=rows.device)
    return varlen_attn(rows, rows, rows, ends, ends, 7, 7, window_size=(-1, 0))


def _error_of(operation: Callable[[Any], Any], device: Device) -> str:
    """Return the error of an operation on 12 tokens of 4 heads and of its gradient, "" without any."""
    import torch

    rows = torch.randn(12, 4, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    try:
        (gradient,) = torch.autograd.grad(operation(rows).float().square().sum(), rows)
    except Exception as error:  # noqa: BLE001 - libraries raise errors of every kind without a kernel for a GPU
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return "" if bool(gradient.isfinite().all()) else "its gradient is not finite"


if __name__ == "__main__":
    sys.exit(run(lambda: say(**check(chosen_device())), "see nvidia-smi"))
