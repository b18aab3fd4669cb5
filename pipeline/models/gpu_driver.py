"""What the machine shows of a GPU's driver; read without torch, so the daemon can use it, too."""

import os
import re
from pathlib import Path

#: Exists while the kernel module of NVIDIA's driver is loaded.
NVIDIA = Path("/proc/driver/nvidia/version")
#: Exists with any AMD graphics, so it says nothing unless torch is built for ROCm.
AMD = Path("/dev/kfd")
_DEVICES = Path("/dev")


def nvidia_driver() -> str:
    """Return the version of NVIDIA's driver, "unknown" if its file has none; "" if the driver is not loaded."""
    if not NVIDIA.exists():
        return ""
    version = re.search(r"\d{3,}\.[\d.]*\d", NVIDIA.read_text(encoding="utf-8"))
    return version[0] if version else "unknown"


def closed_device() -> tuple[str, str] | None:
    """Return a sentence on a device file of the driver, missing or closed to this user, and the remedy, or `None`."""
    # With -u nvidia-modprobe makes the files of nvidia-uvm alone, without it the GPU's and, as number 255, nvidiactl.
    made_by = {"nvidiactl": "nvidia-modprobe -c 0 -c 255", "nvidia-uvm": "nvidia-modprobe -u -c 0"}
    nvidia = [*map(_DEVICES.joinpath, made_by), *sorted(_DEVICES.glob("nvidia[0-9]*"))]
    for path in nvidia if NVIDIA.exists() else [AMD] * AMD.exists():
        if not path.exists():
            return f"{path} does not exist", f"run as root: {made_by[path.name]}"
        if not os.access(path, os.R_OK | os.W_OK):
            return f"this user may not open {path}", f"add the user to the group of {path} (ls -l shows it)"
    return None
