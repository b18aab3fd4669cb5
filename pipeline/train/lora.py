"""LoRA and DoRA: PEFT's configuration, and the layers that are trained."""

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

from pipeline.config import TrainConfig
from pipeline.errors import CannotTrain


def add_adapter(model: Any, config: TrainConfig) -> Any:
    """
    Return `model` with a new adapter, whose random numbers follow from `config.seed`.

    An update is `alpha / rank * B A`, with rsLoRA `alpha / sqrt(rank) * B A` (arXiv:2312.03732); DoRA also trains the
    norm of each output's weights (arXiv:2402.09353). Raises `CannotTrain` if a target layer is not in `model`.
    """
    adapter = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.method == "dora",
        target_modules=target_layers(model, config.targets),
        task_type="CAUSAL_LM",
    )
    set_seed(config.seed)
    return get_peft_model(model, adapter)


def target_layers(model: Any, targets: Sequence[str]) -> list[str]:
    """
    Return the sorted full names of the linear layers that `targets` select.

    "all-linear" selects all but the output head, "mlp" those within a module of that name; any other target is a
    layer's name, or the end of it. Raises `CannotTrain` for a target without a layer, and for the output head.
    """
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
    names = sorted({name.rsplit(".", 1)[-1] for name in layers if name != head})
    return f'allowed are "all-linear", "mlp" and the layers {", ".join(names)}'
