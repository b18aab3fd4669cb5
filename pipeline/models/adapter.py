"""
Add an adapter to a model, and find without its weights whether that is possible.

`python -m pipeline.models.adapter < REQUEST` tries it with `try_adapter`: the request is {"folder": BASE, "train":
SETTINGS} as JSON. It prints a line of JSON, {"layers": N, "experts": WEIGHTS}, or {"error": MESSAGE, "hint": REMEDY}
with the error's exit code. It runs in its own process, for callers that must not load the training stack.
"""

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import TrainConfig
from pipeline.errors import CannotTrain
from pipeline.models.ask import run, say
from pipeline.models.loading import load_config

_OTHER_BASE = "use another base model"
_ERROR_CHARACTERS = 500
#: Dimensions of a weight of several experts: experts, outputs, inputs.
_STACKED = 3


class Adapted(NamedTuple):
    """What a training changes in a base model."""

    layers: int
    """Number of linear layers that are trained; 0 with the method `full`, which trains all weights."""
    experts: int
    """Number of weights of a mixture's experts that are not trained."""


def add_adapter(model: Any, config: TrainConfig) -> Any:
    """
    Add a new adapter to `model` in place; return the PEFT model. Seeds all random generators with `config.seed`.

    An update is `alpha / rank * B A`, with rsLoRA `alpha / sqrt(rank) * B A` (arXiv:2312.03732); DoRA also trains the
    norm of each output's weights (arXiv:2402.09353). Raises `CannotTrain` if a target layer is not in `model`, or if
    PEFT refuses the model or would adapt other layers than `target_layers`.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import set_seed

    planned = target_layers(model, config.targets)
    adapter = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.method == "dora",
        target_modules=planned,
        task_type="CAUSAL_LM",
    )
    set_seed(config.seed)
    kind = type(model).__name__
    try:
        with warnings.catch_warnings():
            # What PEFT moves is refused below; that it sets `fan_in_fan_out` itself concerns nobody.
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, adapter)
    except Exception as error:  # PEFT raises errors of every kind for an architecture that it does not support
        words = " ".join(str(error).split())[:_ERROR_CHARACTERS]
        hint = f"name other layers in train.targets (of {', '.join(_last_names(planned))}), or {_OTHER_BASE}"
        raise CannotTrain(f"PEFT cannot add an adapter to a {kind}: {words}", hint) from error
    prefix = "base_model.model."
    layers = {name.removeprefix(prefix) for name, part in adapted.named_modules() if isinstance(part, BaseTunerLayer)}
    # For some mixtures PEFT moves a layer's adapter to the experts of another layer, because of its name.
    if missing := sorted(set(planned) - layers):
        others = [name for name in _last_names(planned) if name not in _last_names(missing)]
        hint = f"set train.targets = {json.dumps(others)}, or {_OTHER_BASE}" if others else _OTHER_BASE
        raise CannotTrain(
            f"PEFT leaves {len(missing)} of the {len(planned)} linear layers to train in a {kind} without an adapter, "
            f"as {missing[0]}",
            hint,
        )
    return adapted


def target_layers(model: Any, targets: Sequence[str]) -> list[str]:
    """
    Return the sorted full names of the linear layers that `targets` select.

    "all-linear" selects all but the output head, "mlp" those within a module of that name; any other target is a
    layer's name, or the end of it. Raises `CannotTrain` for a target without a layer, and for the output head.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
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
    names = _last_names([name for name in layers if name != head])
    return f'allowed are "all-linear", "mlp" and the layers {", ".join(names)}'


def _last_names(layers: Sequence[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in layers})


def try_adapter(folder: Path, config: TrainConfig) -> Adapted:
    """
    Return what a training with the settings `config` would change in the base model in `folder`; read no weights.

    The model is created on the meta device by its config.json, and the adapter added to it. Raises `CannotTrain` if the
    model cannot be created, and as `add_adapter` and `target_layers` do.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(load_config(folder), trust_remote_code=False)
    except Exception as error:  # libraries raise errors of every kind for a config.json that they do not know
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"[:_ERROR_CHARACTERS]
        hint = "use a causal language model that the installed transformers supports"
        raise CannotTrain(f"the model in {folder} cannot be created from its config.json: {words}", hint) from error
    if config.method == "full":
        return Adapted(0, 0)
    experts = sum(model.get_parameter(name).numel() for name in expert_weights(model))
    found = Adapted(len(target_layers(model, config.targets)), experts)
    if not config.trains_full_weights:
        add_adapter(model, config)
    return found


def expert_weights(model: Any) -> list[str]:
    """Return the sorted full names of the weights that hold all experts of a layer, of three dimensions."""
    from torch import nn

    convolutions = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Conv1d)}
    return sorted(
        name for name, weight in model.named_parameters() if weight.ndim == _STACKED and name not in convolutions
    )


def _try() -> None:
    request = json.load(sys.stdin)
    say(**try_adapter(Path(request["folder"]), TrainConfig.model_validate(request["train"]))._asdict())


if __name__ == "__main__":
    sys.exit(run(_try, "see whether transformers loads the folder"))
