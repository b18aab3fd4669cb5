"""A run's cost, by the results of its attempts."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import durable
from pipeline.contract import RESULT_NAME, StepResult
from pipeline.report.cost import cost_words, run_cost


def attempt(run: Path, name: str, artifact: dict[str, Any] | None = None, **more: Any) -> None:
    status = "failed" if artifact is None else "ok"
    values = {"key": f"1-{name}", "fence": "f", "status": status, "exit_code": 0, "artifact": artifact, **more}
    (run / "attempts" / name).mkdir(parents=True)
    durable.write_json(run / "attempts" / name / RESULT_NAME, StepResult.model_validate(values).model_dump())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    attempt(tmp_path, "train-1", seconds=60, peak_memory_bytes=3_000_000_000, price=0.5)
    attempt(tmp_path, "train-2", {"trained_tokens": 1000}, seconds=120, peak_memory_bytes=2_000_000_000, price=1.0)
    scores = {"generated": 10, "answer_tokens": 12.5}
    attempt(tmp_path, "evaluate-1", {"candidate": scores, "champion": {**scores, "generated": 0}}, seconds=20)
    return tmp_path


def test_all_attempts_count_those_that_failed_too(run: Path) -> None:
    cost = run_cost(run, 4.0)
    assert (cost.seconds, cost.tokens, cost.peak_memory_bytes) == (200, 1125, 3_000_000_000)
    assert (cost.price, cost.seconds_per_point, cost.price_per_point) == (1.5, 50, 0.375)
    words = "3 min 20 s, 1,125 tokens, 3.0 GB of memory, price 1.50; a point gained: 50 s, 0.38"
    assert cost_words(cost) == words


@pytest.mark.parametrize("gain", [None, 0.0, -3.0])
def test_no_point_gained_has_no_cost(run: Path, gain: float | None) -> None:
    cost = run_cost(run, gain)
    assert (cost.seconds_per_point, cost.price_per_point) == (None, None)
    assert "point" not in cost_words(cost)


def test_what_is_not_known_is_not_shown(tmp_path: Path) -> None:
    attempt(tmp_path, "merge-1", {}, seconds=3)
    assert cost_words(run_cost(tmp_path, None)) == "3 s"


def test_a_damaged_result_is_left_out(run: Path) -> None:
    (run / "attempts/train-1" / RESULT_NAME).write_bytes(b"\xff")
    assert run_cost(run, None).seconds == 140


def test_a_small_price_has_digits_that_say_something(tmp_path: Path) -> None:
    attempt(tmp_path, "merge-1", {}, seconds=3, price=0.00312)
    assert cost_words(run_cost(tmp_path, None)) == "3 s, price 0.0031"
