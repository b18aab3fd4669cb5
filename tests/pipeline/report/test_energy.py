"""Counters of energy, as Linux and NVIDIA's library show them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.report.energy import EnergyMeter


def zone(powercap: Path, name: str, microjoules: int, whole: int = 1_000_000) -> Path:
    folder = powercap / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{whole}\n")
    return folder


def test_packages_are_added_up_across_the_counters_end_and_their_parts_are_not(tmp_path: Path) -> None:
    for name in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"):
        zone(tmp_path, name, 900_000)
    meter = EnergyMeter(tmp_path)
    assert meter.joules == 0
    zone(tmp_path, "intel-rapl:0", 950_000)
    zone(tmp_path, "intel-rapl:1", 100_000)
    zone(tmp_path, "intel-rapl:0:0", 999_000)
    meter.sample()
    assert meter.joules == pytest.approx(0.05 + 0.2)
    meter.sample()
    assert meter.joules == pytest.approx(0.05 + 0.2)


def test_where_nothing_can_be_read_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl:0").mkdir()
    meter = EnergyMeter(tmp_path)
    meter.sample()
    assert meter.joules is None


def test_a_counter_that_cannot_be_read_any_more_stops_nothing(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", 0)
    meter = EnergyMeter(tmp_path)
    zone(tmp_path, "intel-rapl:0", 500_000)
    meter.sample()
    (folder / "energy_uj").unlink()
    meter.sample()
    assert meter.joules == pytest.approx(0.5)


def test_cards_count_in_millijoules_where_they_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    taken: dict[int, int] = {0: 1000}

    def total(card: int) -> int:
        if card not in taken:
            raise NVMLError
        return taken[card]

    library = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda number: number, nvmlDeviceGetTotalEnergyConsumption=total,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", library)
    meter = EnergyMeter(tmp_path)
    taken[0] = 4500
    meter.sample()
    assert meter.joules == pytest.approx(3.5)
