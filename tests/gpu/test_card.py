"""The card itself: torch and bitsandbytes use it."""

import pytest
import torch

from pipeline.models.loading import chosen_device


def test_the_card_is_chosen_and_computes_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DROPFORGE_DEVICE")
    assert chosen_device() == "cuda"
    assert torch.cuda.is_bf16_supported(including_emulation=False)


def test_nf4_keeps_a_weight_but_for_its_rounding() -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # noqa: PLC0415 - it loads CUDA's libraries

    weight = torch.randn(256, 512, dtype=torch.bfloat16, device="cuda")
    found = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    # Of normal numbers NF4 loses a tenth of their length (arXiv:2305.14314).
    assert torch.linalg.vector_norm((found - weight).float()) < 0.15 * torch.linalg.vector_norm(weight.float())
