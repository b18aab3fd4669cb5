"""What an earlier version left in a state folder is read by this one, and means what it meant."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.contract import StepSpec
from pipeline.steps import BY_NAME

#: A step's order and what each step handed over, as the version with this database schema wrote them.
RELEASED = sorted((Path(__file__).parent / "released").glob("*.json"))


@pytest.mark.parametrize("place", RELEASED, ids=lambda place: place.stem)
def test_orders_and_artifacts_of_a_released_version_are_read_with_all_that_they_say(place: Path) -> None:
    left: dict[str, dict[str, Any]] = json.loads(place.read_text(encoding="utf-8"))
    for name, written in left.items():
        kind = StepSpec if name == "spec" else BY_NAME[name].writes
        found = kind.model_validate(written).model_dump(mode="json")
        assert _within(written, found), name
    assert set(left) == {"spec", "prepare", "train", "merge", "evaluate", "decide"}


@pytest.mark.parametrize("place", RELEASED, ids=lambda place: place.stem)
def test_a_run_that_was_claimed_by_a_released_version_keeps_its_limits(place: Path) -> None:
    config = StepSpec.model_validate(json.loads(place.read_text(encoding="utf-8"))["spec"]).config
    assert (config.gate.alpha, config.gate.approval, config.evaluate.batch_size) == (0.01, "auto", 16)
    assert not BY_NAME["judge"].wanted(config)


def _within(part: Any, whole: Any) -> bool:
    """Say whether all that `part` says is in `whole`, which may say more."""
    if isinstance(part, dict):
        return all(name in whole and _within(value, whole[name]) for name, value in part.items())
    return bool(part == whole)
