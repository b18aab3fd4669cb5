"""The linear layer with LoRA as one operation: PEFT's loss and gradients; what is not plain stays PEFT's."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pipeline.models.loading import load_model
from pipeline.train.lora import fuse

LINEAR_LAYERS = 14
TOKENS = torch.arange(3, 27).reshape(2, 12)


def adapted(base: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Return the tiny Llama with an adapter that is away from the zero that it begins at."""
    model = get_peft_model(
        load_model(base, "cpu", "none", dtype), LoraConfig(r=4, target_modules="all-linear", **options)
    )
    dice = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = torch.empty_like(weight, dtype=torch.float32).normal_(0, 0.1, generator=dice)
    return model


def outcome(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the loss and each gradient of a pass as the trainer makes it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return {"loss": loss.detach(), **found}


#: Of float32 an epsilon over some hundred terms, of bfloat16 the rounding of each of the layers.
@pytest.mark.parametrize(
    ("dtype", "rslora", "tolerance"),
    [(torch.float32, False, 1e-5), (torch.float32, True, 1e-5), (torch.bfloat16, False, 0.1)],
)
def test_loss_and_gradients_are_pefts(tiny_llama: Path, dtype: torch.dtype, rslora: bool, tolerance: float) -> None:
    model = adapted(tiny_llama, dtype, lora_alpha=16, use_rslora=rslora)
    fused = deepcopy(model)
    assert fuse(fused) == LINEAR_LAYERS
    expected, found = outcome(model, dtype), outcome(fused, dtype)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype
        assert torch.linalg.vector_norm(found[name] - gradient) <= tolerance * torch.linalg.vector_norm(gradient), name


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_what_is_not_plain_stays_pefts(tiny_llama: Path, options: dict[str, Any]) -> None:
    model = adapted(tiny_llama, lora_alpha=8, **options)
    assert fuse(model) == 0
