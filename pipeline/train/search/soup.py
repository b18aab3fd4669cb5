"""
Combine two adapters of one base without training, by PEFT's `add_weighted_adapter`.

`cat` and `svd` are the mean of both updates, exactly or at the larger of both ranks; `ties` and `dare_ties` first drop
the smallest values, or random ones, and those whose sign contradicts the majority (arXiv:2306.01708, arXiv:2311.03099).
"""

from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.errors import StepFailed
from pipeline.models.generation import memory_errors
from pipeline.models.loading import Device, arithmetic_dtype, load_model

_SAME_RANK = {"ties", "dare_ties"}
#: Share of each adapter's values that `ties` and `dare_ties` keep, and the weights: these two average by themselves.
_DENSITY, _WHOLE, _HALF = 0.5, 1.0, 0.5


def combine(base: Path, device: Device, method: str, pair: tuple[Path, Path], target: Path) -> None:
    """
    Combine the adapters in two folders, both for the model `base`, and save the result in the empty `target`.

    Raises `StepFailed` if they cannot be combined by this method, or the base does not fit into memory.
    """
    import torch
    from peft import PeftModel

    configs = [durable.read_object(folder / "adapter_config.json") for folder in pair]
    if any(config.get("use_dora") or config.get("use_rslora") for config in configs):
        raise StepFailed("one of the adapters uses DoRA or rsLoRA, which PEFT cannot combine", "set train.soup = []")
    ranks = [config.get("r") for config in configs]
    if method in _SAME_RANK and ranks[0] != ranks[1]:
        message = f"the adapters' ranks are {ranks[0]} and {ranks[1]}, and {method} needs equal ones"
        raise StepFailed(message, 'set train.soup = ["cat"]')
    peft: Any = PeftModel
    with memory_errors():
        loaded = load_model(base, device, dtype=arithmetic_dtype(device))
        model = peft.from_pretrained(loaded, pair[0], "first")
        model.load_adapter(pair[1], "second")
        # `dare_ties` drops values at random.
        torch.manual_seed(0)
        weight = _WHOLE if method in _SAME_RANK else _HALF
        density = _DENSITY if method in _SAME_RANK else None
        model.add_weighted_adapter(["first", "second"], [weight] * 2, "soup", method, density=density)
    model.save_pretrained(target, selected_adapters=["soup"])
    for path in (target / "soup").iterdir():
        path.rename(target / path.name)
    (target / "soup").rmdir()
    (target / "README.md").unlink(missing_ok=True)
