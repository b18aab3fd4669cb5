"""
What a training changes in the weights of the model that it started from, by the names of the weights in files.

A change is applied to a few rows of a weight at a time. What cannot be changed so is merged with the whole model in
memory, adapters by PEFT.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from pipeline.artifacts import TRAINED_FILES
from pipeline.errors import CannotTrain, StepFailed
from pipeline.models.loading import load_config, load_model
from pipeline.models.safetensors_files import Header, read_header

if TYPE_CHECKING:
    import torch

TRAIN_AGAIN = "train it again: dropforge retry RUN --from train"
#: Maps some rows of a base weight, and their slice, to the same rows of the merged weight.
Change = Callable[["torch.Tensor", slice], "torch.Tensor"]


class NeedsWholeModel(Exception):
    """A model or an adapter can only be merged with the whole model in memory; the message says why."""


def changes(base: Path, trained: Path, tensors: Header) -> dict[str, Change]:
    """
    Return the change of each trained weight, and of those tied to it, by name: a function that merges some of its rows.

    `trained` is a PEFT adapter folder, or a safetensors file of weights that replace the base's of the same names;
    `tensors` has the base's. If the whole model must be loaded, the reason is written to stderr, and every weight has a
    change. Raises `CannotTrain` if a weight is not in the base's files, `StepFailed` if the adapter's file and config
    differ, and what `load_model` raises.
    """
    try:
        return _changes_by_name(base, trained, tensors)
    except NeedsWholeModel as why:
        sys.stderr.write(f"merged with the whole model in memory: {why}\n")
        return _changes_of_whole(base, trained, tensors)


def _changes_by_name(base: Path, trained: Path, tensors: Header) -> dict[str, Change]:
    """
    Return the changes as `changes` does, without the weights in memory.

    Raises `NeedsWholeModel` if the model cannot be created on the meta device, if transformers converts such weights
    when it loads them, or if a trained weight is not in the base's files under its name and shape; and as `_updates`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        from transformers.conversion_mapping import get_model_conversion_mapping

        config = load_config(base)
        with init_empty_weights():
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model.tie_weights()
        converted = get_model_conversion_mapping(model, add_legacy=False)
    except Exception as error:  # loading the whole model reports the error
        raise NeedsWholeModel(
            f"the model cannot be created on the meta device: {type(error).__name__}: {error}"[:500]
        ) from error
    if converted:
        raise NeedsWholeModel(f"transformers converts the weights of a {config.model_type} when it loads them")
    shapes = {name: list(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    tied: Mapping[str, str] = model.all_tied_weights_keys
    changes = _replacements(trained) if trained.is_file() else _updates(model, trained)
    for name in changes:
        if name in tied or name not in tensors or tensors[name].shape != shapes[name]:
            raise NeedsWholeModel(f"{name} is trained, and the base's files have it under another name or shape")
    return changes | {name: changes[source] for name, source in tied.items() if source in changes}


def _replacements(weights: Path) -> dict[str, Change]:
    file: Any = safe_open(weights, framework="pt")

    def replaced(name: str, block: "torch.Tensor", rows: slice) -> Any:
        return file.get_slice(name)[rows].view(block.shape)

    return {name: partial(replaced, name) for name in file.keys()}  # noqa: SIM118 - it is no dict


def _updates(model: Any, adapter: Path) -> dict[str, Change]:
    """
    Return the adapter's change of each base weight, by the weight's name; add the adapter to `model`.

    Raises what `check_pairs` raises, and `NeedsWholeModel` for an adapter on other than linear layers.
    """
    from peft import PeftConfig, PeftModel
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.torch import load_file
    from torch import nn

    config: Any = PeftConfig.from_pretrained(str(adapter), local_files_only=True)
    check_pairs(PeftModel(model, config, low_cpu_mem_usage=True), adapter)
    pairs = load_file(adapter / TRAINED_FILES["adapter"])
    changes = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear:
            kind = type(getattr(layer, "base_layer", layer)).__name__
            raise NeedsWholeModel(f"the adapter changes {name}, which is a {kind}, not linear")
        prefix = f"base_model.model.{name}"
        changes[f"{name}.weight"] = _lora(
            pairs[f"{prefix}.lora_A.weight"].float(),
            pairs[f"{prefix}.lora_B.weight"].float(),
            layer.scaling["default"],
            pairs.get(f"{prefix}.lora_magnitude_vector"),
        )
    return changes


def _lora(a: "torch.Tensor", b: "torch.Tensor", scale: float, magnitude: "torch.Tensor | None") -> Change:
    """
    Return the function that applies an adapter to rows of a linear layer's weight, of the shape (outputs, inputs).

    `a` is (rank, inputs), `b` (outputs, rank); LoRA (arXiv:2106.09685) gives W + scale B A. With DoRA
    (arXiv:2402.09353) each row of the result, an output's, is scaled to the length in `magnitude`, of the shape
    (outputs,).
    """
    import torch

    def merged(block: "torch.Tensor", rows: slice) -> "torch.Tensor":
        full = (b[rows] @ a).mul_(scale).add_(block)
        if magnitude is not None:
            full.mul_((magnitude[rows].float() / torch.linalg.norm(full, dim=1)).view(-1, 1))
        return full

    return merged


def check_pairs(model: Any, adapter: Path) -> None:
    """
    Raise `StepFailed`, naming a matrix, unless an adapter's file has exactly the matrices that its config implies.

    Names and shapes are compared. `model` is the base with the adapter in the folder `adapter`. PEFT itself only warns
    of a missing matrix, and leaves it untrained.
    """
    from peft import get_peft_model_state_dict

    parameters = dict(model.named_parameters())
    matrices = get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False)
    implied = {(name, *matrix.shape) for name, matrix in matrices.items()}
    saved = {(name, *matrix.shape) for name, matrix in read_header(adapter / TRAINED_FILES["adapter"])[0].items()}
    if implied != saved:
        name = min(implied ^ saved)[0]
        raise StepFailed(f"the adapter's file and its adapter_config.json do not agree on {name}", TRAIN_AGAIN)


def _changes_of_whole(base: Path, trained: Path, tensors: Header) -> dict[str, Change]:
    """
    Merge with the whole model in memory, an adapter by PEFT; return all weights as changes, by their names in files.

    Raises as `changes` does.
    """
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers.core_model_loading import revert_weight_conversion

    model: Any = load_model(base, "cpu")
    if trained.is_file():
        weights = dict(model.named_parameters(remove_duplicate=False))
        for name, numbers in load_file(trained).items():
            weights[name].data = numbers.to(weights[name].dtype)
    else:
        adapted: Any = PeftModel.from_pretrained(model, trained, local_files_only=True)
        check_pairs(adapted, trained)
        model = adapted.merge_and_unload()
    prefix = f"{model.base_model_prefix}."  # some files, as GPT-2's, leave it out
    merged = {
        short if (short := name.removeprefix(prefix)) in tensors else name: weight
        for name, weight in revert_weight_conversion(model, model.state_dict()).items()
    }
    # Of tied weights one name is enough.
    placed = {weight.data_ptr() for name, weight in merged.items() if name in tensors}
    for name, weight in merged.items():
        if weight.data_ptr() not in placed or (name in tensors and tensors[name].shape != list(weight.shape)):
            message = f"the base's files have the weight {name} under another name or shape, so it cannot be merged"
            raise CannotTrain(message, "save the base again with transformers' save_pretrained, and train on that")

    def taken(weight: torch.Tensor, block: torch.Tensor, rows: slice) -> torch.Tensor:
        new = weight[rows]
        # What did not change keeps the precision that it has in the base's files.
        return torch.where(block.to(new.dtype) == new, block, new.to(block.dtype))

    return {name: partial(taken, weight.reshape((*weight.shape, 1)[0], -1)) for name, weight in merged.items()}
