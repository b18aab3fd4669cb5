"""Fixtures of the tests on a GPU. `make gpu` runs them; without NVIDIA's driver they are left out."""

import pytest
import torch

from tests.conftest import HAS_GPU

collect_ignore_glob = [] if HAS_GPU else ["test_*.py"]


@pytest.fixture(autouse=True)
def _on_one_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPFORGE_DEVICE", "cuda")
    # On several each training has processes of its own, in which nothing is patched.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
