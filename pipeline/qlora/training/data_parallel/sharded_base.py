"""
A frozen base whose layers are divided among the processes of a training, as by FSDP or ZeRO's third stage.

Each process keeps an equal part of each decoder layer's matrices, as bytes. Before a layer computes, forwards or
backwards, all send each other their parts of it into one buffer, which all layers' weights are views of. Frozen weights
have no gradient to send back. Bytes travel as bytes: what is packed in 4 bits is no number, and as one it can change
(bitsandbytes issue 1945).
"""

import sys
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import CannotTrain
from pipeline.qlora.loading import Device, load_model
from pipeline.qlora.training.data_parallel.sharing import Place

if TYPE_CHECKING:
    import torch

#: Where a weight may begin in the buffer, in bytes: kernels read several numbers at once.
_ALIGNED = 256
#: For the other processes to load the base. One that dies meanwhile is noticed by the step's own.
_PATIENCE = timedelta(hours=12)

Weight = tuple["torch.nn.Module", str]
"""The module that a weight belongs to, and its name there."""


def load_sharded(
    folder: Path, device: Device, quantization: Literal["nf4", "none"], dtype: "torch.dtype | None", place: Place
) -> Any:
    """
    Do what `load_model` does, with the layers' matrices divided among the processes.

    The whole base is in the host's memory, of one process after the other; never on a card. Raises what `load_model`
    raises, and `CannotTrain` if the architecture has no layers that can be divided.
    """
    from torch import distributed

    sys.stderr.write("each process loads the whole base into the host's memory, one after the other\n")
    turns = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    model: Any = None
    for turn in range(place.processes):
        if turn == place.rank:
            model = load_model(folder, "cpu", quantization, dtype)
            shard(model, device, place)
        distributed.barrier(turns)
    return model


def shard(model: Any, device: Device, place: Place) -> None:
    """
    Divide the matrices in the layers of `model`, which is on the CPU, and put what is left of it on `device`.

    A weight that is used in several places stays whole. Raises `CannotTrain` if there is nothing to divide.
    """
    import torch

    of_layers = _weights_by_layer(model)
    if not of_layers:
        message = "one card does not hold the base model, and its architecture has no layers that can be divided"
        raise CannotTrain(message, "use a smaller base model, or a card with more memory")
    plans = {layer: _places(weights, place.processes) for layer, weights in of_layers.items()}
    buffer = torch.empty(max(size for _, size in plans.values()), dtype=torch.uint8, device=device)
    base = _Base(buffer)
    for layer, (begins, size) in plans.items():
        whole = torch.zeros(size, dtype=torch.uint8)
        views = []
        for (module, name), begin in begins.items():
            weight = getattr(module, name)
            packed = bytes_of(weight)
            whole[begin : begin + len(packed)] = packed
            view = buffer[begin : begin + len(packed)].view(weight.dtype).view(weight.shape)
            # Its place in the buffer, not its value: versions, which autograd looks at, are the weight's own.
            weight.data = view
            views.append(((module, name), view))
        part = whole.view(place.processes, -1)[place.rank].to(device, copy=True)
        gather = partial(base.gather, _Layer(part, tuple(views)))
        layer.register_forward_pre_hook(lambda *_, gather=gather: gather())
        layer.register_forward_hook(lambda _, __, made, gather=gather: _before_backward(made, gather))
    # Not the model's own, which refuses what is quantised; that moves the scales, too.
    torch.nn.Module.to(model, device)
    model.hf_device_map = {"": 0 if device == "cuda" else device}


def bytes_of(weight: "torch.Tensor") -> "torch.Tensor":
    """Return the bytes of a weight as a flat tensor of uint8, without a change of type on the way."""
    import torch

    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - a 4-bit weight is more than its bytes
        return weight.detach().as_subclass(torch.Tensor).contiguous().view(-1).view(torch.uint8)


@dataclass(frozen=True)
class _Layer:
    """What a process keeps of a layer, and the layer's weights with their views of the buffer."""

    part: "torch.Tensor"
    views: tuple[tuple[Weight, "torch.Tensor"], ...]


@dataclass
class _Base:
    """The buffer, and which layer is in it: the same in all processes, as all run the same passes."""

    buffer: "torch.Tensor"
    held: _Layer | None = None

    def gather(self, layer: _Layer) -> None:
        """Let the buffer hold a layer. Raises `RuntimeError` if a weight is elsewhere by now, so not this one's."""
        from torch import distributed

        if self.held is layer:
            return
        for (module, name), view in layer.views:
            if getattr(module, name).data_ptr() != view.data_ptr():
                raise RuntimeError(f"{name} of a sharded {type(module).__name__} was replaced")
        size = len(layer.part) * distributed.get_world_size()
        # The second name is the first one's before torch 2.13.
        send = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
        send(self.buffer[:size], layer.part)
        self.held = layer


def _before_backward(made: Any, gather: Any) -> None:
    """Have a layer gathered once the gradient of what it made is there, before its own backward pass begins."""
    for one in made if isinstance(made, tuple) else (made,):
        if getattr(one, "requires_grad", False):
            one.register_hook(lambda _: gather())


def _weights_by_layer(model: Any) -> dict[Any, list[Weight]]:
    """Return the matrices that are used in one place alone, by the layer, as transformers recomputes them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    uses = Counter(id(weight) for module in modules for weight in module.parameters(recurse=False))
    found: dict[Any, list[Weight]] = {}
    for layer in modules:
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        for module in layer.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.dim() > 1 and uses[id(weight)] == 1:
                    found.setdefault(layer, []).append((module, name))
                    uses[id(weight)] += 1  # not once more in a layer inside this one
    return found


def _places(weights: list[Weight], processes: int) -> tuple[dict[Weight, int], int]:
    """Return where each of a layer's weights begins in the buffer, and the layer's size: equal parts, in bytes."""
    begins, end = {}, 0
    for module, name in weights:
        begins[module, name] = end
        end += -(-getattr(module, name).nbytes // _ALIGNED) * _ALIGNED
    return begins, -(-end // (processes * _ALIGNED)) * processes * _ALIGNED
