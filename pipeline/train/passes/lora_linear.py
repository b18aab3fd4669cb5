"""
A fused LoRA linear layer with a hand-written backward pass.

PEFT's layer takes a dozen operations forwards and as many backwards, with a copy of the input in float32. On records of
some hundred tokens they cost a CPU as much as the matrix products.
"""

from functools import cache, partial
from typing import Any


def fuse(model: Any) -> int:
    """
    Replace the forward of each plain LoRA layer of a PEFT `model` by the fused one; return how many were replaced.

    Plain is LoRA or rsLoRA without dropout and bias over an `nn.Linear` of 16 or 32 bits. Others keep PEFT's forward.
    """
    from peft.tuners.lora.layer import Linear

    layers = [module for module in model.modules() if type(module) is Linear and _is_plain(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    return len(layers)


def _is_plain(layer: Any) -> bool:
    from torch import nn

    base, adapters = layer.get_base_layer(), layer.active_adapters
    if type(base) is not nn.Linear or base.bias is not None or len(adapters) != 1 or layer.lora_variant:
        return False
    (name,) = adapters
    biases = (layer.lora_A[name].bias, layer.lora_B[name].bias)
    return biases == (None, None) and isinstance(layer.lora_dropout[name], nn.Identity)


def _forward(layer: Any, x: Any) -> Any:
    (name,) = layer.active_adapters
    weight = layer.get_base_layer().weight
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _product()(x.to(weight.dtype), weight, a, b, layer.scaling[name])


@cache
def _product() -> Any:
    """
    Return y = x W^T + s (x A^T) B^T (arXiv:2106.09685) as a function of x, W, A, B and s.

    W is [out, in], A [rank, in], B [out, rank]; x [..., in] and y [..., out] have the dtype of W.
    """
    import torch

    class Product(torch.autograd.Function):
        """Saves only the input and its product with A for the backward pass."""

        @staticmethod
        def forward(ctx: Any, *given: Any) -> Any:
            x, weight, a, b, scaling = given
            rows = x.reshape(-1, x.shape[-1])
            a, b = a.to(weight.dtype), (b * scaling).to(weight.dtype)
            inner = rows @ a.t()
            ctx.save_for_backward(rows, weight, a, b, inner)
            ctx.scaling, ctx.shape = scaling, x.shape
            return (rows @ weight.t()).addmm_(inner, b.t()).view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            rows, weight, a, b, inner = ctx.saved_tensors
            out = gradients[0].reshape(-1, weight.shape[0])
            through = out @ b
            of_x = (out @ weight).addmm_(through, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
            return of_x, None, (through.t() @ rows).float(), (out.t() @ inner).float().mul_(ctx.scaling), None

    return Product.apply
