"""Automatic learning rate and epochs: by method and size, by rows and preset; numbers are kept."""

from typing import Any

import pytest

from pipeline.config import TrainConfig
from pipeline.train.job import with_numbers

SMALL, LARGE = 135_000_000, 8_000_000_000


def chosen(rows: int, weights: int = SMALL, **settings: Any) -> Any:
    return with_numbers(TrainConfig.model_validate(settings), rows, weights)


@pytest.mark.parametrize(
    ("rows", "settings", "epochs"),
    [
        (30, {}, 4),
        (400, {}, 4),
        (640, {}, 2.5),
        (641, {}, 2.47),  # the last step of a pass has one row
        (640, {"batch_size": 16}, 4),
        (640, {"preset": "fast"}, 1.25),
        (640, {"preset": "quality"}, 4),
        (3200, {"preset": "quality"}, 1),
        (1_000_000, {}, 1),
        (1_000_000, {"epochs": 0.25}, 0.25),
    ],
)
def test_automatic_epochs_give_the_presets_steps_within_one_to_four_passes(
    rows: int, settings: dict[str, Any], epochs: float
) -> None:
    assert chosen(rows, **settings).epochs == epochs


def test_the_automatic_learning_rate_is_lower_for_large_models_and_for_the_bases_own_weights() -> None:
    rates = {
        (method, weights): chosen(100, weights, method=method).learning_rate
        for method in ("lora", "dora", "galore", "spectrum", "full")
        for weights in (SMALL, LARGE)
    }
    for method in ("lora", "dora", "galore", "spectrum", "full"):
        assert rates[method, LARGE] < rates[method, SMALL]
    for weights in (SMALL, LARGE):
        assert rates["dora", weights] == rates["lora", weights] > rates["galore", weights] > rates["full", weights]
    assert chosen(100, rslora=True).learning_rate == rates["lora", SMALL] / 4, "its updates are four times as large"
    assert chosen(100, LARGE, method="full", learning_rate=2e-4).learning_rate == 2e-4
