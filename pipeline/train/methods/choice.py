"""
Which of the base's weights are trained, as what, and where they are kept.

Trained weights are float32, as are their gradients and moments, whatever the base is: a bfloat16 weight of 0.1 has
neighbours 0.0005 away, and a step of 2e-5 would be rounded away again. The forward pass rounds them to 16 bits, as it
does an adapter's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import TRAINED_FILES
from pipeline.config import TrainConfig
from pipeline.errors import CannotTrain
from pipeline.models.safetensors_files import NotSafetensorsError, read_shapes, weight_files
from pipeline.train.data_parallel.sharing import Place
from pipeline.train.method import target_layers
from pipeline.train.methods.galore import galore
from pipeline.train.methods.spectrum import chosen_layers

if TYPE_CHECKING:
    import torch

_FILE = TRAINED_FILES["weights"]
#: By a tensor's name its file and shape.
Files = Mapping[str, tuple[Path, list[int]]]
_INSTEAD = 'set train.method = "lora", which trains an adapter on any model'


def unfreeze(model: Any, base: Path, config: TrainConfig, place: Place) -> None:
    """
    Let the weights that the method trains be trained, in float32 as the base's files have them, and no others.

    Raises `CannotTrain` if a weight is not in the files by the name and in the shape that the model has it, so that
    nothing could be put in its place; if GaLore's rank is larger than a matrix; and as `target_layers` does.
    """
    files = _files(base)
    names = _trained_names(model, files, config, place)
    embedding = model.get_input_embeddings()
    dtype = embedding.weight.dtype
    # What a float32 embedding gives would be added up in float32 through all layers.
    embedding.register_forward_hook(lambda _, __, made: made.to(dtype))
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in names)
        if name in names:
            weight.data = _read(files, name, weight)


def optimizer(model: Any, config: TrainConfig) -> "torch.optim.Optimizer | None":
    """Return the method's own optimizer; `None` where it is the trainer's."""
    if config.method != "galore":
        return None
    return galore(_trained(model).values(), config.learning_rate, config.rank, config.alpha / config.rank)


def save_trained(model: Any, folder: Path) -> None:
    """Write what was trained to `folder`: PEFT's adapter, or the weights by the base's names."""
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
    else:
        _save_weights(model, folder)


def keeping_weights(trainer_class: Any) -> Any:
    """Return a trainer's class whose checkpoints hold the weights that are trained, and not the base again."""

    class Trainer(trainer_class):  # type: ignore[misc, unused-ignore]
        """The trainer, with other files in its checkpoints."""

        def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
            _save_weights(self.model, Path(output_dir))

        def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
            from safetensors.torch import load_file

            found = load_file(Path(resume_from_checkpoint) / _FILE)
            for name, weight in _trained(self.model).items():
                weight.data.copy_(found[name])

    return Trainer


def _save_weights(model: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.detach().contiguous() for name, weight in _trained(model).items()}, folder / _FILE)


def _trained(model: Any) -> "dict[str, torch.nn.Parameter]":
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _trained_names(model: Any, files: Files, config: TrainConfig, place: Place) -> set[str]:
    """Return the names of the weights that are trained: all, or those of linear layers."""
    if config.method == "full":
        return {name for name, _ in model.named_parameters()}
    weights = {layer: model.get_submodule(layer).weight for layer in target_layers(model, config.targets)}
    layers = list(weights)
    if config.method == "galore":
        least = min(min(weight.shape) for weight in weights.values())
        if config.rank > least:
            message = f"train.rank is {config.rank}, and the smallest matrix that GaLore is to train has {least} rows"
            raise CannotTrain(message, f"set train.rank = {least} or less")
    elif place.rank == 0:
        layers = chosen_layers(layers, lambda layer: _read(files, f"{layer}.weight", weights[layer]), config)
    return {f"{layer}.weight" for layer in _from_first(layers, place)}


def _from_first(layers: list[str], place: Place) -> list[str]:
    """Return what the first process found: of two layers that are nearly alike, another one could take the other."""
    if place.processes == 1:
        return layers
    from torch import distributed

    box = [layers]
    distributed.broadcast_object_list(box)
    return box[0]


def _files(base: Path) -> Files:
    """Return in which of the base's files each tensor is, and its shape."""
    try:
        paths = weight_files(base)
    except NotSafetensorsError as error:
        raise CannotTrain(f"the weights of the base model {base} cannot be found: {error}", _INSTEAD) from error
    return {name: (path, shape) for path in paths for name, shape in read_shapes(path).items()}


def _read(files: Files, name: str, weight: "torch.nn.Parameter") -> "torch.Tensor":
    """Return a weight of the model as the base's files have it: in float32, where the model has it."""
    from safetensors import safe_open  # noqa: PLC0415

    if name not in files or files[name][1] != list(weight.shape):
        message = f"{name} is not in the base model's files as the model has it: transformers converts its weights"
        raise CannotTrain(message, _INSTEAD)
    with safe_open(files[name][0], framework="pt") as file:
        found: torch.Tensor = file.get_tensor(name)
    return found.float().to(weight.device)
