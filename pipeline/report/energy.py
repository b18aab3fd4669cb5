"""Energy that the machine's processors and graphics cards take, by counters of their own; whoever uses them."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

_POWERCAP = Path("/sys/class/powercap")


@dataclass
class _Counter:
    """One counter of joules, which begins anew at `range`, if that is not 0."""

    read: Callable[[], float]
    range: float = 0.0
    last: float = 0.0


class EnergyMeter:
    """
    Adds up the joules of all processor packages (RAPL) and NVIDIA cards (NVML) that can be read.

    RAPL: `energy_uj` and `max_energy_range_uj` of Linux's powercap, most often for root alone. NVML:
    nvmlDeviceGetTotalEnergyConsumption in millijoules, where the package pynvml is installed.
    """

    def __init__(self, powercap: Path = _POWERCAP) -> None:
        """Begin to count."""
        self._joules = 0.0
        self._counters = []
        for counter in (*_packages(powercap), *_cards()):
            with suppress(OSError):
                counter.last = counter.read()
                self._counters.append(counter)

    @property
    def joules(self) -> float | None:
        """Return what was taken up to the last sample; `None` if nothing can be read."""
        return self._joules if self._counters else None

    def sample(self) -> None:
        """Read the counters; to be called more often than they begin anew, which takes minutes at least."""
        for counter in self._counters:
            with suppress(OSError):
                value = counter.read()
                more = value - counter.last
                self._joules += more if more >= 0 else more + counter.range
                counter.last = value


def _packages(powercap: Path) -> Iterator[_Counter]:
    # intel-rapl:0 is a package, also one of AMD's; intel-rapl:0:0 is a part of it.
    for zone in sorted(powercap.glob("intel-rapl:*")):
        if zone.name.count(":") == 1:
            with suppress(OSError):
                whole = _joules(zone / "max_energy_range_uj")
                yield _Counter(partial(_joules, zone / "energy_uj"), whole)


def _joules(path: Path) -> float:
    """Return what a file of microjoules says. Raises `OSError`."""
    return int(path.read_text()) / 1e6


def _cards() -> Iterator[_Counter]:
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    except Exception:  # noqa: BLE001 - no package, no driver, no card: then there is nothing to count
        return
    for handle in handles:
        yield _Counter(partial(_card_joules, nvml, handle))


def _card_joules(nvml: Any, handle: Any) -> float:
    """Return the joules that a card took since its driver was loaded. Raises `OSError` if it does not say."""
    try:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except nvml.NVMLError as error:
        raise OSError(str(error)) from error
