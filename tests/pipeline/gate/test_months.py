"""Months in which nobody is better, and candidates that are: bench/gate.py whole, here a seeded sample of it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

pytestmark = pytest.mark.long

MONTHS, CANDIDATES = 60, 150


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location("bench_gate", Path(__file__).parents[3] / "bench/gate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gate"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("metric", ["exact_match", "rougeL"])
def test_a_month_of_equal_challengers_rarely_ends_in_a_promotion(bench: ModuleType, metric: str) -> None:
    counts = np.array([bench.month(metric, seed) for seed in range(MONTHS)])
    months = dict(zip(bench.RULES_TRIED, np.count_nonzero(counts, axis=0).tolist(), strict=True))
    assert stats.binomtest(months["ours"], MONTHS, bench.MOST_FALSE, alternative="greater").pvalue > 0.01
    assert months["naive (higher mean)"] > 0.85 * MONTHS


@pytest.mark.parametrize("metric", ["exact_match", "rougeL"])
def test_the_gain_that_the_card_states_is_promoted_with_the_power_of_the_whole_decision(
    bench: ModuleType, metric: str
) -> None:
    gain = float(np.median([bench.stated_gain(metric, seed) for seed in range(20)]))
    for case in (bench.EVEN, bench.STILL):
        whole, half = (
            float(np.mean([bench.promoted(metric, size, case, seed, ("all",)) for seed in range(CANDIDATES)]))
            for size in (gain, gain / 2)
        )
        assert whole >= bench.LEAST_POWER
        # It is no gain that any gate would see: half of it is mostly not promoted.
        assert half < 0.5
