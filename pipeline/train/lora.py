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
    is LoRA or rsLoRA without dropout and bias over an `nn.Linear` of 16 or 32 bits. Other layers keep PEFT's forward.
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
