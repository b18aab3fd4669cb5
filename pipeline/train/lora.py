"""LoRA and DoRA: PEFT's configuration, the layers that are trained, and a fused forward and backward pass."""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

from pipeline.config import TrainConfig
from pipeline.errors import CannotTrain


def lora_config(model: Any, config: TrainConfig) -> Any:
    """
    Return PEFT's configuration of the adapter.

    An update is `alpha / rank * B A`, with rsLoRA `alpha / sqrt(rank) * B A` (arXiv:2312.03732); DoRA also trains the
    norm of each output's weights (arXiv:2402.09353). Raises `CannotTrain` if a target layer is not in `model`.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.method == "dora",
        target_modules=target_layers(model, config.targets),
        task_type="CAUSAL_LM",
    )


def target_layers(model: Any, targets: Sequence[str]) -> list[str]:
    """
    Return the sorted full names of the linear layers that `targets` select.

    "all-linear" selects all but the output head, "mlp" those within a module of that name; any other target is a
    layer's name, or the end of it. Raises `CannotTrain` for a target without a layer, and for the output head.
    """
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    layers = {name: module for name, module in model.named_modules() if isinstance(module, (Linear, Conv1D))}
    head = next((name for name, module in layers.items() if module is model.get_output_embeddings()), None)
    selected: set[str] = set()
    for target in targets:
        if target == "all-linear":
            named = layers.keys() - {head}
        elif target == "mlp":
            named = {name for name in layers if "mlp" in name.split(".")[:-1]}
        else:
            named = {name for name in layers if f".{name}".endswith(f".{target}")}
        if head in named:
            raise CannotTrain(
                f"train.targets has {target!r}, the output head, whose weight is often shared with the input",
                f"take it out of train.targets; {_known(layers, head)}",
            )
        if not named:
            raise CannotTrain(
                f"train.targets has {target!r}, and the base model has no such linear layer", _known(layers, head)
            )
        selected |= named
    return sorted(selected)


def _known(layers: Any, head: str | None) -> str:
    names = sorted({name.rsplit(".", 1)[-1] for name in layers if name != head})
    return f'allowed are "all-linear", "mlp" and the layers {", ".join(names)}'


def fuse(model: Any) -> int:
    """
    Replace the forward of each plain LoRA layer of a PEFT `model` by a fused one; return how many were replaced.

    PEFT's forward takes a dozen operations, and as many backwards, with a copy of the input in float32. A plain layer
    is LoRA or rsLoRA without dropout over a linear layer of 16 or 32 bits, or in NF4. Other layers keep PEFT's forward.
    """
    from peft.tuners import lora

    plain = {lora.Linear, lora.Linear4bit}
    layers = [module for module in model.modules() if type(module) in plain and _is_plain(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    return len(layers)


def _is_plain(layer: Any) -> bool:
    from bitsandbytes.nn import Linear4bit
    from torch import nn

    base, adapters = layer.get_base_layer(), layer.active_adapters
    if type(base) not in {nn.Linear, Linear4bit} or len(adapters) != 1 or layer.lora_variant:
        return False
    (name,) = adapters
    biases = (layer.lora_A[name].bias, layer.lora_B[name].bias)
    return biases == (None, None) and isinstance(layer.lora_dropout[name], nn.Identity)


def _forward(layer: Any, x: Any) -> Any:
    (name,) = layer.active_adapters
    base, a, b = layer.get_base_layer(), layer.lora_A[name].weight, layer.lora_B[name].weight
    if not hasattr(base.weight, "quant_state"):
        return _product()(x.to(base.weight.dtype), base, a, b, layer.scaling[name])
    return _product()(x.to(base.compute_dtype), base, a, b, layer.scaling[name]).to(x.dtype)


def _times(rows: Any, base: Any) -> Any:
    """Return `rows` W^T plus the bias of the layer `base`, without a gradient."""
    import torch
    from bitsandbytes import matmul_4bit

    bias = None if base.bias is None else base.bias.to(rows.dtype)
    if hasattr(base.weight, "quant_state"):
        return matmul_4bit(rows, base.weight, quant_state=base.weight.quant_state, bias=bias)
    return torch.nn.functional.linear(rows, base.weight, bias)


def _dense(base: Any, dtype: Any) -> Any:
    """Return the weight of the layer `base`, dequantised to `dtype` if it is in NF4."""
    from bitsandbytes.functional import dequantize_4bit

    if hasattr(base.weight, "quant_state"):
        return dequantize_4bit(base.weight, base.weight.quant_state).to(dtype)
    return base.weight


@cache
def _product() -> Any:
    """
    Return y = x W^T + bias + s (x A^T) B^T (arXiv:2106.09685) as a function of x, the layer of W, A, B and s.

    W is [out, in], A [rank, in], B [out, rank]; x [..., in] and y [..., out] have the dtype of the arithmetic.
    """
    import torch

    class Product(torch.autograd.Function):
        """Saves only the input and its product with A for the backward pass."""

        @staticmethod
        def forward(ctx: Any, *given: Any) -> Any:
            x, base, a, b, scaling = given
            rows = x.reshape(-1, x.shape[-1])
            a, b = a.to(x.dtype), (b * scaling).to(x.dtype)
            inner = rows @ a.t()
            ctx.save_for_backward(rows, a, b, inner)
            # The layer, as hooks on saved tensors would copy its weight, and lose the state of NF4.
            ctx.base, ctx.scaling, ctx.shape = base, scaling, x.shape
            return _times(rows, base).addmm_(inner, b.t()).view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            rows, a, b, inner = ctx.saved_tensors
            out = gradients[0].reshape(-1, gradients[0].shape[-1])
            through = out @ b
            of_x = None
            if ctx.needs_input_grad[0]:
                of_x = (out @ _dense(ctx.base, out.dtype)).addmm_(through, a).view(ctx.shape)
            return of_x, None, (through.t() @ rows).float(), (out.t() @ inner).float().mul_(ctx.scaling), None

    return Product.apply
