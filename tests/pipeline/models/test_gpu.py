"""A GPU that torch cannot use is an error with the reason, never a training on the CPU; what a GPU is tried with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

from pipeline.errors import CannotTrain, StepFailed
from pipeline.models import gpu_check, gpu_driver, loading
from pipeline.models.loading import chosen_device

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040)."
OPEN_MODULE = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@host)\n"
CLOSED_MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\n"


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Load NVIDIA's driver, with all its device files, on a machine whose torch sees no GPU; return their folder."""
    (tmp_path / "version").write_text(OPEN_MODULE)
    folder = tmp_path / "dev"
    folder.mkdir()
    for name in ("nvidiactl", "nvidia-uvm", "nvidia0"):
        (folder / name).touch()
    monkeypatch.setattr(gpu_driver, "NVIDIA", tmp_path / "version")
    monkeypatch.setattr(gpu_driver, "_DEVICES", folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", too_old)
    return folder


def too_old() -> None:
    raise RuntimeError(TOO_OLD)


#: What is wrong, and what is said of it: the reason and the remedy.
REASONS: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], object], str, str]] = {
    "torch for the CPU": (
        lambda _, patch: patch.setattr(torch.version, "cuda", None),
        f"torch {torch.__version__} is built for the CPU",
        "install a torch that is built for CUDA",
    ),
    "no nvidia-uvm": (
        lambda devices, _: (devices / "nvidia-uvm").unlink(),
        "nvidia-uvm does not exist",
        "nvidia-modprobe -u -c 0",
    ),
    "no nvidiactl": (
        lambda devices, _: (devices / "nvidiactl").unlink(),
        "nvidiactl does not exist",
        "nvidia-modprobe -c 0 -c 255",
    ),
    "another group": (
        lambda _, patch: patch.setattr("os.access", lambda path, _mode: path.name != "nvidia0"),
        "this user may not open",
        "add the user to the group",
    ),
    "an old driver": (lambda *_: None, TOO_OLD, "see nvidia-smi"),
}


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
@pytest.mark.parametrize(("spoil", "words", "remedy"), REASONS.values(), ids=REASONS)
def test_a_gpu_that_torch_cannot_use_is_an_error_with_reason_and_remedy(
    spoil: Any, words: str, remedy: str, wanted: str, devices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(devices, monkeypatch)
    monkeypatch.setenv("DROPFORGE_DEVICE", wanted)
    with pytest.raises(StepFailed) as failed:
        chosen_device()
    assert words in failed.value.message
    assert remedy in failed.value.hint
    assert failed.value.hint.endswith('or set device = "cpu"')
    monkeypatch.setenv("DROPFORGE_DEVICE", "cpu")
    assert chosen_device() == "cpu"


def test_auto_is_the_cpu_where_no_driver_is_loaded_or_the_gpus_are_hidden(
    devices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DROPFORGE_DEVICE", raising=False)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert chosen_device() == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    gpu_driver.NVIDIA.unlink()
    assert chosen_device() == "cpu"
    # Any AMD graphics have this file; only who installed a torch for ROCm wants to train there.
    monkeypatch.setattr(loading, "AMD", devices / "nvidia0")
    assert chosen_device() == "cpu"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(StepFailed, match="too old"):
        chosen_device()


@pytest.mark.parametrize(
    ("text", "version"), [(OPEN_MODULE, "580.65.06"), (CLOSED_MODULE, "550.54.14"), ("x", "unknown")]
)
def test_the_drivers_version_is_read(text: str, version: str, devices: Path) -> None:
    (devices.parent / "version").write_text(text)
    assert gpu_driver.nvidia_driver() == version


def test_a_card_without_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: including_emulation)
    with pytest.raises(CannotTrain, match="Tesla T4 cannot compute in bf16"):
        gpu_check.check("cuda")


def test_each_operation_of_a_training_is_tried_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    card: Any = type("Properties", (), {"name": "RTX 4090", "major": 8, "minor": 9})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (index + 1, 3))
    monkeypatch.setattr(bitsandbytes.cextension.lib, "compiled_with_cuda", False)
    said = gpu_check.check("cpu")
    assert [(gpu["name"], gpu["capability"], gpu["free"], gpu["total"]) for gpu in said["gpus"]] == [
        ("RTX 4090", "8.9", 1, 3),
        ("RTX 4090", "8.9", 2, 3),
    ]
    # NF4 works on a CPU, with the library for it; torch's attention over packed records has no kernel there.
    assert (said["nf4"], said["bitsandbytes"]) == ("", False)
    assert said["packed_attention"].startswith("NotImplementedError: ")
    assert gpu_check._error_of(lambda rows: rows * float("nan"), "cpu") == "its gradient is not finite"
