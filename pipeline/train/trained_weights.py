"""
Select which weights of the base itself are trained, and save what is trained, them or an adapter.

LoRA and DoRA train an adapter (`pipeline.models.adapter`). Of full fine-tuning `full` trains all weights, `galore` the
linear layers on projected gradients, `spectrum` the linear layers whose weights have the highest signal-to-noise ratio
(arXiv:2406.06623).

Such weights, their gradients and moments are float32 whatever the base's dtype is: a bfloat16 weight of 0.1 has
neighbours 0.0005 away, and a step of 2e-5 would be rounded away. The forward pass rounds them to 16 bits, as it does an
adapter's.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import distributed

from pipeline.artifacts import TRAINED_FILES
from pipeline.config import TrainConfig
from pipeline.errors import CannotTrain
from pipeline.models.adapter import target_layers
from pipeline.models.safetensors_files import NotSafetensorsError, read_header, weight_files
from pipeline.train.data_parallel import ProcessRank
from pipeline.train.galore import GaLore

_FILE = TRAINED_FILES["weights"]
#: A tensor's file and shape by its name.
Files = Mapping[str, tuple[Path, list[int]]]
#: Interquartile range of a normal distribution, in standard deviations.
_QUARTILES = 1.349
_INSTEAD = 'set train.method = "lora", which trains an adapter on any model'


def unfreeze(model: Any, base: Path, config: TrainConfig, process: ProcessRank) -> None:
    """
    Make the weights that the method trains trainable, in float32 as read from the base's files; freeze all others.

    `full` trains all, `galore` the linear layers, `spectrum` those that `chosen_layers` returns. All processes must
    call it. Raises `CannotTrain` if a trained weight is not in the files under the model's name and shape, so that it
    could not be merged; if GaLore's rank is larger than a matrix; and as `target_layers` and `chosen_layers` do.
    """
    files = _files(base)
    names = _trained_names(model, files, config, process)
    embedding = model.get_input_embeddings()
    dtype = embedding.weight.dtype
    # The output of a float32 embedding would make all layers compute in float32.
    embedding.register_forward_hook(lambda _, __, made: made.to(dtype))
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in names)
        if name in names:
            weight.data = _read(files, name, weight)


def optimizer(model: Any, config: TrainConfig) -> "torch.optim.Optimizer | None":
    """Return GaLore's optimizer if the method is `galore`, else `None` for the trainer's default optimizer."""
    if config.method != "galore":
        return None
    return GaLore(_trained(model).values(), float(config.learning_rate), config.rank, config.alpha / config.rank)


def save_trained(model: Any, folder: Path) -> None:
    """Save `model`'s PEFT adapter in `folder` or, without any, its trainable weights in `TRAINED_FILES["weights"]`."""
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.detach().contiguous() for name, weight in _trained(model).items()}, folder / _FILE)


def load_trained(model: Any, folder: Path) -> None:
    """Copy the weights that `save_trained` saved in `folder` into `model`'s trainable ones; `model` has no adapter."""
    saved = load_file(folder / _FILE)
    for name, weight in _trained(model).items():
        weight.data.copy_(saved[name])


def _trained(model: Any) -> "dict[str, torch.nn.Parameter]":
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _trained_names(model: Any, files: Files, config: TrainConfig, process: ProcessRank) -> set[str]:
    """
    Return the names of the weights to train: all for `full`, else those of the selected linear layers.

    Every process must call it; all get the names that rank 0 chose. Raises `CannotTrain` as `unfreeze` does.
    """
    if config.method == "full":
        return {name for name, _ in model.named_parameters()}
    weights = {layer: model.get_submodule(layer).weight for layer in target_layers(model, config.targets)}
    layers = list(weights)
    if config.method == "galore":
        least = min(min(weight.shape) for weight in weights.values())
        if config.rank > least:
            raise CannotTrain(
                f"train.rank is {config.rank}, and the smallest matrix that GaLore is to train has {least} rows",
                f"set train.rank = {least} or less",
            )
    elif process.rank == 0:
        layers = chosen_layers(layers, lambda layer: _read(files, f"{layer}.weight", weights[layer]), config)
    if process.count > 1:
        # Rankings could differ by rounding: rank 0's is that of all processes.
        box = [layers]
        distributed.broadcast_object_list(box)
        (layers,) = box
    return {f"{layer}.weight" for layer in layers}


def _files(base: Path) -> Files:
    """Return file and shape by tensor name. Raises `CannotTrain` if the folder has no safetensors weights."""
    try:
        paths = weight_files(base)
    except NotSafetensorsError as error:
        raise CannotTrain(f"the weights of the base model {base} cannot be found: {error}", _INSTEAD) from error
    return {name: (path, tensor.shape) for path in paths for name, tensor in read_header(path)[0].items()}


def _read(files: Files, name: str, weight: "torch.nn.Parameter") -> "torch.Tensor":
    """
    Return the tensor `name` from the base's files in float32, on the device of `weight`.

    Raises `CannotTrain` if the files have no tensor of this name and the shape of `weight`.
    """
    if name not in files or files[name][1] != list(weight.shape):
        raise CannotTrain(
            f"{name} in the base model's files has another name or shape than in the model: transformers converts it",
            _INSTEAD,
        )
    with safe_open(files[name][0], framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor.float().to(weight.device)


def signal_to_noise(weight: "torch.Tensor") -> float:
    """
    Return the signal-to-noise ratio of a matrix.

    Singular values above s (1 + sqrt(short / long)) are signal, the others noise: this is the Marchenko-Pastur law's
    edge for noise of standard deviation s, which is estimated from the singular values' interquartile range. The ratio
    of both sums is divided by the largest singular value; it is infinite without noise.
    """
    wide = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().T
    # A fifth of the time of a decomposition; in float64 squaring loses no relevant digits.
    values = torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0).sqrt()
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75]).to(values)).tolist()
    edge = (high - low) / _QUARTILES * (1 + math.sqrt(min(weight.shape) / max(weight.shape)))
    signal, noise = float(values[values > edge].sum()), float(values[values <= edge].sum())
    return signal / noise / float(values[-1]) if noise else math.inf


def chosen_layers(layers: Iterable[str], read: "Callable[[str], torch.Tensor]", config: TrainConfig) -> list[str]:
    """
    Return the layers with the highest signal-to-noise ratio: the share `config.share` per last name, sorted by name.

    At least one layer of each last name (as "q_proj") is chosen. `read` returns a layer's weight; only one weight at a
    time is in memory. The choice is also written to stderr. Raises `CannotTrain` if a weight is not finite.
    """
    kinds: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for name in layers:
        weight = read(name)
        if not bool(weight.isfinite().all()):
            raise CannotTrain(
                f"the base model's {name} holds numbers that are not finite",
                "download the model again from a trusted source, or use another one",
            )
        kinds[name.rsplit(".", 1)[-1]].append((signal_to_noise(weight), name))
    chosen = sorted(
        name for ranked in kinds.values() for _, name in sorted(ranked, reverse=True)[: config.chosen(len(ranked))]
    )
    sys.stderr.write(f"spectrum trains these layers: {', '.join(chosen)}\n")
    return chosen
