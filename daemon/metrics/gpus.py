"""Memory of NVIDIA cards, read from the driver if nvidia-ml-py is installed."""

from collections.abc import Iterator
from typing import NamedTuple


class Gpu(NamedTuple):
    """One NVIDIA card and its memory."""

    number: int
    used_bytes: int
    total_bytes: int


def gpus() -> Iterator[Gpu]:
    """Yield the cards of this machine; none if module, driver or card is missing."""
    try:
        import pynvml  # noqa: PLC0415 - nvidia-ml-py comes with some of the training stack
    except ImportError:
        return
    try:
        pynvml.nvmlInit()
        for number in range(pynvml.nvmlDeviceGetCount()):
            memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(number))
            yield Gpu(number, int(memory.used), int(memory.total))
    except pynvml.NVMLError:
        return
